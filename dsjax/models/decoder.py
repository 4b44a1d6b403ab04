"""A decoder-only transformer, assembled from layers/: embedding, blocks, final norm, tied logits.

Blocks are kept in segments: runs of equal layers whose parameters are stacked along a first dimension and scanned.
The default (1, L-2, 1) keeps the first and last layer apart, which random layer-token dropping needs; slicing them
out of one stack would copy all of it.

Shapes: B rows, T positions, D model, H heads, K head size, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from dsjax.layers.attention import Attention, Visibility, attend, document_mask
from dsjax.layers.cross_entropy import logits
from dsjax.layers.dropout import dropout, fold
from dsjax.layers.embedding import Embedding
from dsjax.layers.mlp import MLP, residual_scale
from dsjax.layers.norm import LayerNorm
from dsjax.layers.parameter import derive, use
from dsjax.layers.positions import alibi_bias
from dsjax.mesh.layout import Layout
from dsjax.models.config import DecoderConfig, ModelConfig

Cache = tuple[tuple[jax.Array, jax.Array], ...]
"""Keys and values [n, B, S, H, K] of each segment."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What sets one family apart from another.

    Attributes:
        positions: where order comes from.
        max_positions: rows of a learned position table; 0 when there is none.
        embedding_norm: a LayerNorm between the embedding and the first block.
        residual_after_norm: residuals start from the LayerNorm's output instead of its input.
    """

    positions: Literal["alibi", "learned"]
    max_positions: int = 0
    embedding_norm: bool = False
    residual_after_norm: bool = False


class Block(nnx.Module):
    """One pre-LayerNorm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, architecture: Architecture, *, key: jax.Array) -> None:
        scale = residual_scale(config.num_layers, config.scale_residual_init)
        init = {"std": config.init_std, "residual_scale": scale}
        self.attention_norm = LayerNorm(config.model_dim, eps=config.norm_eps)
        self.attention = Attention(config.model_dim, config.num_heads, key=derive(key, "attention"), **init)
        self.mlp_norm = LayerNorm(config.model_dim, eps=config.norm_eps)
        self.mlp = MLP(config.model_dim, config.hidden_dim, key=derive(key, "mlp"), **init)
        self.config = config
        self.residual_after_norm = architecture.residual_after_norm

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Visibility,
        *,
        keys: Key[Array, "B"] | None,
        layout: Layout | None,
    ) -> Float[Array, "B T D"]:
        """The layer's output for a whole row; `keys` are this layer's dropout keys, one a row."""
        h = self.attention_norm(x_BTD, layout=layout)
        q, k, v = self.attention.project(h, layout=layout)
        mixed = attend(q, k, v, visibility, dropout_keys=fold(keys, 0), dropout_rate=self.config.attention_dropout)
        return self._finish(x_BTD, h, mixed, keys=keys, layout=layout)

    def decode(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Visibility,
        cache: tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]],
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]]:
        """The same for T new positions, whose keys and values are written to the cache at `start`."""
        h = self.attention_norm(x_BTD, layout=None)
        q, k, v = self.attention.project(h, layout=None)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)
        keys, values = put(cache[0], k), put(cache[1], v)
        mixed = attend(q, keys.astype(q.dtype), values.astype(q.dtype), visibility)
        return self._finish(x_BTD, h, mixed, keys=None, layout=None), (keys, values)

    def _finish(self, x_BTD, h_BTD, mixed_BTHK, *, keys, layout: Layout | None):
        """From the attended values to the layer's output."""
        rate = self.config.dropout
        residual = h_BTD if self.residual_after_norm else x_BTD
        x_BTD = residual + dropout(self.attention.finish(mixed_BTHK, layout=layout), fold(keys, 1), rate=rate)
        if layout is not None:
            x_BTD = layout.activation(x_BTD, None, None)
        h_BTD = self.mlp_norm(x_BTD, layout=layout)
        residual = h_BTD if self.residual_after_norm else x_BTD
        x_BTD = residual + dropout(self.mlp(h_BTD, layout=layout), fold(keys, 2), rate=rate)
        return x_BTD if layout is None else layout.activation(x_BTD, None, None)


def _stack(make_block, first: int, length: int) -> Block:
    """A Block whose parameters hold `length` layers, from number `first` on, along a first dimension."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_block(0)))
    draw = lambda number: nnx.to_pure_dict(nnx.state(make_block(number)))
    if length == 1:  # a batch of one draws the same numbers, but takes three times as long to compile
        return nnx.merge(graph, jax.tree.map(lambda x: x[None], draw(first)))
    return nnx.merge(graph, jax.vmap(draw)(jnp.arange(first, first + length)))


def _remat(body, policy: str, *, gathered: bool, scanned: bool):
    """Wrap a layer so that the backward pass recomputes what the policy says.

    Only inside a scan is the forward pass out of reach of XLA's common subexpression elimination, which would undo it.
    """
    policies = jax.checkpoint_policies
    if policy == "full":
        return jax.checkpoint(body, prevent_cse=not scanned)
    if policy == "dots":
        return jax.checkpoint(body, prevent_cse=not scanned, policy=policies.dots_with_no_batch_dims_saveable)
    if gathered:
        return jax.checkpoint(body, prevent_cse=not scanned, policy=_keep_all_but_gathered)
    return body


def _keep_all_but_gathered(primitive, *_, **parameters) -> bool:
    """Recompute nothing but the gathering of weights: kept, the whole weights of all layers would undo ZeRO's saving.

    A gathered weight leaves a sharding constraint and then gets its name; as long as either may be kept, it is. (To
    constrain an activation again costs nothing.)
    """
    return primitive.name != "sharding_constraint" and parameters.get("name") != "gathered"


class Decoder(nnx.Module):
    """The whole model.

    Example:
        >>> from dsjax.models.config import BloomConfig
        >>> from dsjax.models.families import create
        >>> model = create(BloomConfig(vocab_size=11, num_layers=2, model_dim=8, num_heads=2), key=jax.random.key(0))
        >>> model(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
    """

    def __init__(self, config: ModelConfig, architecture: Architecture, *, key: jax.Array) -> None:
        self.config, self.architecture = config, architecture
        self.embed = Embedding(
            config.vocab_size, config.model_dim, rows="vocab", key=derive(key, "embed"), std=config.init_std
        )
        if architecture.positions == "learned":
            self.positions = Embedding(
                architecture.max_positions,
                config.model_dim,
                rows="positions",
                key=derive(key, "positions"),
                std=config.init_std,
            )
        if architecture.embedding_norm:
            self.embed_norm = LayerNorm(config.model_dim, eps=config.norm_eps)
        make = lambda number: Block(config, architecture, key=derive(derive(key, "layers"), number))
        self.segments, first = nnx.List([]), 0
        for length in config.layer_runs:
            self.segments.append(_stack(make, first, length))
            first += length
        self.final_norm = LayerNorm(config.model_dim, eps=config.norm_eps)

    def __call__(
        self, input_ids: Int[Array, "B T"], attention_mask: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Logits in float32. attention_mask: 1 for tokens, 0 for padding on either side."""
        graph, state = nnx.split(self, nnx.Param)
        return _logits(graph, nnx.to_pure_dict(state), input_ids, attention_mask)

    def generate(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        *,
        max_new_tokens: int,
        **how,
    ) -> Int[np.ndarray, "B N"]:
        """The prompts and max_new_tokens more, greedily unless told otherwise; see models/generate.py for `how`."""
        from dsjax.models.generate import generate  # it is built on this class

        return generate(self, input_ids, attention_mask, max_new_tokens=max_new_tokens, **how)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        keys: Key[Array, "B"] | None = None,
        layout: Layout | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states before the logits.

        Args:
            tokens: input ids.
            segments: number of the document each token belongs to; tokens see only their own. None: one document.
            positions: position of each token in its document, for learned positions. None: 0 .. T-1.
            keys: dropout keys, one a row (see layers/dropout.py); None for no dropout.
            layout: placement on a mesh; None on one device.
        """
        keys = keys if self.config.dropout or self.config.attention_dropout else None
        x_BTD = self.embedded(tokens, positions, layout=layout)
        x_BTD = dropout(x_BTD, fold(fold(keys, self.config.num_layers), 0), rate=self.config.dropout)
        if layout is not None:
            x_BTD = layout.activation(x_BTD, None, None)
        visibility = self.visibility(tokens.shape[1], segments)
        first = 0
        for stack in self.segments:
            graph, parameters = nnx.split(stack)
            length = jax.tree.leaves(parameters)[0].shape[0]
            numbers = jnp.arange(first, first + length)

            def layer(x, inputs, graph=graph):
                number, layer_parameters = inputs
                block = nnx.merge(graph, layer_parameters)
                return block(x, visibility, keys=fold(keys, number), layout=layout), None

            # Below ZeRO 3 nothing needs gathering, but a scan would stack another copy of what the constraint gives.
            gathered = layout is not None and (layout.zero_stage >= 3 or length > 1)
            body = _remat(layer, self.config.remat, gathered=gathered, scanned=length > 1)
            if length == 1:
                x_BTD, _ = body(x_BTD, (numbers[0], jax.tree.map(lambda p: p[0], parameters)))
            else:
                x_BTD, _ = jax.lax.scan(body, x_BTD, (numbers, parameters))
            first += length
        return self.final_norm(x_BTD, layout=layout)

    def embedded(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None, *, layout: Layout | None = None
    ) -> Float[Array, "B T D"]:
        """The first block's input, before dropout."""
        dtype = jnp.dtype(self.config.compute_dtype)
        x_BTD = self.embed(tokens, layout=layout, dtype=dtype)
        if self.architecture.positions == "learned":
            where = jnp.arange(tokens.shape[1]) if positions is None else positions
            x_BTD += self.positions(where, layout=layout, dtype=dtype)
        return self.embed_norm(x_BTD, layout=layout) if self.architecture.embedding_norm else x_BTD

    def visibility(self, length: int, segments: Int[Array, "B T"] | None) -> Visibility:
        """Masks and biases for whole rows of `length` tokens."""
        places = jnp.arange(length)
        mask = None if segments is None else document_mask(segments, segments, places, places)
        alibi = self.architecture.positions == "alibi"
        # Inside a document places differ from positions by a constant, which the softmax does not see.
        bias = alibi_bias(self.config.num_heads, places[None], places[None]) if alibi else None
        return Visibility(mask, bias)

    def empty_cache(self, num_rows: int, length: int) -> Cache:
        """Room for the keys and values of `length` positions: per segment a pair [n, B, S, H, K]."""
        heads = self.config.num_heads
        dtype = jnp.dtype(self.config.compute_dtype)
        shape = (num_rows, length, heads, self.config.model_dim // heads)
        return tuple((jnp.zeros((n, *shape), dtype), jnp.zeros((n, *shape), dtype)) for n in self.config.layer_runs)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        start: Int[Array, ""],
        valid: Bool[Array, "B S"],
        positions: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Features of T new tokens that go to the cache's places start .. start + T - 1, and the cache with them.

        Args:
            tokens: input ids.
            cache: keys and values so far, from `empty_cache`.
            start: first new place.
            valid: False where a place of the cache holds padding; places after the new tokens are never seen.
            positions: positions of the new tokens in their documents, for learned positions.
        """
        x_BTD = self.embedded(tokens, positions)
        places, key_places = start + jnp.arange(tokens.shape[1]), jnp.arange(valid.shape[1])
        mask = (places[:, None] >= key_places)[None, None] & valid[:, None, None, :]
        alibi = self.architecture.positions == "alibi"
        bias = alibi_bias(self.config.num_heads, places[None], key_places[None]) if alibi else None
        new_cache = []
        for stack, segment_cache in zip(self.segments, cache, strict=True):
            graph, parameters = nnx.split(stack)

            def layer(x, inputs, graph=graph):
                layer_parameters, layer_cache = inputs
                return nnx.merge(graph, layer_parameters).decode(x, Visibility(mask, bias), layer_cache, start)

            x_BTD, grown = jax.lax.scan(layer, x_BTD, (parameters, segment_cache))
            new_cache.append(grown)
        return self.final_norm(x_BTD, layout=None), tuple(new_cache)

    def table(self, *, layout: Layout | None = None) -> Float[Array, "V D"]:
        """The tied embedding in the compute dtype, as the logits use it."""
        return use(self.embed.table, layout, jnp.dtype(self.config.compute_dtype))

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of hidden states, float32."""
        return logits(x_BTD, self.table())


@partial(jax.jit, static_argnames="graph")
def _logits(graph, params, input_ids, attention_mask):
    model: Decoder = nnx.merge(graph, params)
    if attention_mask is None:
        return model.logits(model.features(input_ids))
    positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    return model.logits(model.features(input_ids, segments=attention_mask, positions=positions))
