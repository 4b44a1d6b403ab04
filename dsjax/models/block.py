"""One layer of the transformer, what its families differ in, and stacks of layers.

Shapes: B rows, T positions, D model, H heads, G heads of keys and values, K head size, S places of the cache.
"""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dsjax.layers.attention import Attention, Visibility, attend
from dsjax.layers.dropout import dropout, fold
from dsjax.layers.kv_cache import KeyValues, appended, attend_to_cache, stored
from dsjax.layers.mlp import MLP, Activation, residual_scale
from dsjax.layers.norm import Norm, NormKind
from dsjax.layers.parameter import derive
from dsjax.mesh.layout import Layout
from dsjax.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What sets one family apart from another; the defaults are GPT-2's.

    Attributes:
        positions: where order comes from.
        max_positions: the longest row, and rows of a learned position table; 0 when there is no limit.
        frequencies: RoPE's radians per position, [K / 2].
        causal: whether a position sees only those before it.
        norm: the kind of normalisation.
        norm_first: normalise what goes into attention and MLP (pre-LayerNorm), or what comes out, residual included.
        embedding_norm: a norm between the embedding and the first block.
        residual_after_norm: residuals start from the norm's output instead of its input.
        activation: of the MLP.
        gated: whether the MLP has a gate.
        use_bias: whether the projections have biases.
        fused_qkv: query, key and value as one projection.
        num_kv_heads: G, heads that groups of query heads share; 0 means one for each.
        head_dim: K; 0 means model_dim / num_heads.
        token_types: rows of a table of segment embeddings; 0 when there is none.
        scores_by_layer: attention scores of layer i, counted from 0, are divided by i + 1.
        tied: logits use the embedding's table.
        masked_head: a language model transforms its features once more before the logits, which have a bias.
        pooler: the first position's features go through a perceptron of one layer before they are classified.
    """

    positions: Literal["alibi", "learned", "rope"]
    max_positions: int = 0
    frequencies: tuple[float, ...] = ()
    causal: bool = True
    norm: NormKind = "layer"
    norm_first: bool = True
    embedding_norm: bool = False
    residual_after_norm: bool = False
    activation: Activation = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True
    fused_qkv: bool = True
    num_kv_heads: int = 0
    head_dim: int = 0
    token_types: int = 0
    scores_by_layer: bool = False
    tied: bool = True
    masked_head: bool = False
    pooler: bool = False


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); or norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: TransformerConfig, architecture: Architecture, *, key: jax.Array) -> None:
        scale = residual_scale(config.num_layers, config.scale_residual_init)
        init = {"std": config.init_std, "residual_scale": scale, "use_bias": architecture.use_bias}
        norm = partial(Norm, config.model_dim, architecture.norm, eps=config.norm_eps)
        self.attention_norm = norm()
        self.attention = Attention(
            config.model_dim,
            config.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            fused=architecture.fused_qkv,
            key=derive(key, "attention"),
            **init,
        )
        self.mlp_norm = norm()
        self.mlp = MLP(
            config.model_dim,
            config.hidden_dim,
            activation=architecture.activation,
            gated=architecture.gated,
            key=derive(key, "mlp"),
            **init,
        )
        self.config, self.architecture = config, architecture

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Visibility,
        *,
        number: Int[Array, ""],
        keys: Key[Array, "B"] | None,
        layout: Layout | None,
    ) -> Float[Array, "B T D"]:
        """The layer's output for a whole row.

        Args:
            x_BTD: its input.
            visibility: which position sees which.
            number: of the layer, from 0 on.
            keys: its dropout keys, one a row; None for no dropout.
            layout: placement on a mesh; None on one device.
        """
        h = self.attention_norm(x_BTD, layout=layout) if self.architecture.norm_first else x_BTD
        q, k, v = self._project(h, visibility, number, layout=layout)
        mixed = attend(q, k, v, visibility, dropout_keys=fold(keys, 0), dropout_rate=self.config.attention_dropout)
        return self._finish(x_BTD, h, mixed, keys=keys, layout=layout)

    def prefill(
        self, x_BTD: Float[Array, "B T D"], visibility: Visibility, num_places: int, *, number: Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The output for whole rows, and a cache that holds them, with room up to num_places."""
        h = self.attention_norm(x_BTD, layout=None)
        q, k, v = self._project(h, visibility, number, layout=None)
        out = self._finish(x_BTD, h, attend(q, k, v, visibility), keys=None, layout=None)
        return out, stored(k, v, num_places)

    def decode(
        self,
        x_BTD: Float[Array, "B T D"],
        visibility: Visibility,
        cache: KeyValues,
        start: Int[Array, ""],
        *,
        number: Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], KeyValues]:
        """The output for T new positions, whose keys and values are written to the cache at `start`."""
        h = self.attention_norm(x_BTD, layout=None)
        q, k, v = self._project(h, visibility, number, layout=None)
        cache = appended(cache, k, v, start)
        mixed = attend_to_cache(q, cache, visibility)
        return self._finish(x_BTD, h, mixed, keys=None, layout=None), cache

    def _project(self, h_BTD, visibility: Visibility, number, *, layout: Layout | None):
        """Queries, keys and values; scores are divided by dividing the queries."""
        q, k, v = self.attention.project(h_BTD, visibility, layout=layout)
        if self.architecture.scores_by_layer:
            q = (q.astype(jnp.float32) / (number + 1)).astype(q.dtype)
        return q, k, v

    def _finish(self, x_BTD, h_BTD, mixed_BTHK, *, keys, layout: Layout | None):
        """From the attended values to the layer's output."""
        first, rate = self.architecture.norm_first, self.config.dropout
        place = lambda x: x if layout is None else layout.activation(x, None, None)
        residual = h_BTD if self.architecture.residual_after_norm else x_BTD
        x_BTD = residual + dropout(self.attention.finish(mixed_BTHK, layout=layout), fold(keys, 1), rate=rate)
        x_BTD = place(x_BTD)
        if not first:
            x_BTD = self.attention_norm(x_BTD, layout=layout)
        h_BTD = self.mlp_norm(x_BTD, layout=layout) if first else x_BTD
        residual = h_BTD if self.architecture.residual_after_norm else x_BTD
        x_BTD = place(residual + dropout(self.mlp(h_BTD, layout=layout), fold(keys, 2), rate=rate))
        return x_BTD if first else self.mlp_norm(x_BTD, layout=layout)


def stack_of_blocks(make_block, graph: nnx.GraphDef, first: int, length: int) -> Block:
    """A Block whose parameters hold `length` layers, from number `first` on, along a first dimension.

    Args:
        make_block: number of a layer -> Block.
        graph: the structure of any of them; found once for all stacks, since that takes as long as making a block.
        first: number of the first layer.
        length: number of layers.
    """
    draw = lambda number: nnx.to_pure_dict(nnx.state(make_block(number)))
    if length == 1:  # a batch of one draws the same numbers, but takes three times as long to compile
        return nnx.merge(graph, jax.tree.map(lambda x: x[None], draw(first)))
    return nnx.merge(graph, jax.vmap(draw)(jnp.arange(first, first + length)))


def rematerialised(body, policy: str, *, gathered: bool, scanned: bool):
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
