"""The transformer of every family, assembled from layers/: embedding, blocks, final norm, logits.

Blocks are kept in segments: repeated patterns of layers, each computed by one scan, or without one where there is one
repeat (models/stack.py). The default (1, L-2, 1) keeps the first and last layer apart, which random layerwise token
dropping needs; slicing them out of one stack would copy all of it. Below 4 layers each is a segment.

Shapes: B rows, T positions, D model, H heads, G heads of keys and values, K head size, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from dsjax.layers.attention import Visibility, WholeRows, document_mask
from dsjax.layers.context import Context
from dsjax.layers.cross_entropy import logits
from dsjax.layers.dropout import dropout, fold
from dsjax.layers.embedding import Embedding
from dsjax.layers.heads import MaskedHead, Pooler, mean_pooled
from dsjax.layers.kv_cache import KeyValues, Prefill, Slots
from dsjax.layers.linear import Linear
from dsjax.layers.norm import Norm
from dsjax.layers.parameter import derive, use
from dsjax.layers.positions import Rotation, alibi_bias, rotation
from dsjax.layers.random_ltd import Dropping, among_kept, around, take
from dsjax.layers.statistics import Auxiliary, Statistics, merged
from dsjax.mesh.layout import ONE_DEVICE, Layout
from dsjax.models.architecture import Architecture
from dsjax.models.block import Block, rematerialised
from dsjax.models.families.config import TransformerConfig
from dsjax.models.stack import Segments, as_array, by_layer, check_dropping, layer_numbers, make_stack, through

Cache = list[tuple[tuple[Float[Array, "_ B G K S"], Float[Array, "_ B G S K"]], ...]]
"""Keys [n, B, G, K, S] and values [n, B, G, S, K] of the n layers at each position of each segment."""


class Transformer(nnx.Module):
    """The whole model.

    Example:
        >>> from dsjax.models.families.bloom.config import BloomConfig
        >>> from dsjax.models.families.build import create
        >>> model = create(BloomConfig(vocab_size=11, num_layers=2, model_dim=8, num_heads=2), key=jax.random.key(0))
        >>> model(jnp.zeros((1, 5), int)).shape
        (1, 5, 11)
    """

    def __init__(self, config: TransformerConfig, architecture: Architecture, *, key: jax.Array) -> None:
        self.config, self.architecture = config, architecture
        table = partial(Embedding, dim=architecture.model_dim, std=config.init_std)
        self.embed = table(architecture.vocab_size, rows="vocab", key=derive(key, "embed"))
        if architecture.positions == "learned":
            self.positions = table(architecture.max_positions, rows="positions", key=derive(key, "positions"))
        if architecture.token_types:
            self.token_types = table(architecture.token_types, rows="positions", key=derive(key, "token_types"))
        if architecture.embedding_norm:
            self.embed_norm = Norm(architecture.model_dim, architecture.norm, eps=architecture.norm_eps)
        make = lambda kind, number: Block(config, architecture, kind, key=derive(derive(key, "layers"), number))
        self.segments = make_stack(make, self.segment_specs)
        if architecture.norm_first:
            self.final_norm = Norm(architecture.model_dim, architecture.norm, eps=architecture.norm_eps)
        if not architecture.tied:
            self.unembed = table(architecture.vocab_size, rows="vocab", key=derive(key, "unembed"))
        if architecture.masked_head:
            self.masked_head = MaskedHead(
                architecture.model_dim,
                architecture.vocab_size,
                activation=architecture.activation,
                eps=architecture.norm_eps,
                std=config.init_std,
                key=derive(key, "masked_head"),
            )
        if architecture.pooler:
            self.pooler = Pooler(architecture.model_dim, std=config.init_std, key=derive(key, "pooler"))
        if config.task == "classification":
            shape = (architecture.model_dim, config.num_labels)
            self.classifier = Linear(
                shape,
                ("embed", "labels"),
                std=config.init_std,
                use_bias=architecture.pooler,
                key=derive(key, "classifier"),
            )

    @property
    def segment_specs(self) -> Segments:
        """Kinds and numbers of the layers: `segments[i][j]` holds those at position j of `segment_specs[i]`."""
        return self.architecture.segments(self.config.segment_lengths)

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None = None,
        *,
        token_types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B C"] | Float[Array, "B D"]:
        """Outputs of the model's task, float32: logits [B, T, V], classes [B, C], or unit vectors [B, D].

        Args:
            input_ids: tokens.
            attention_mask: 1 for tokens, 0 for padding on either side; None means no padding.
            token_types: first or second text of a pair (0 or 1); None means 0. Only of families that have them.
        """
        graph, state = nnx.split(self, nnx.Param)
        return _outputs(graph, nnx.to_pure_dict(state), input_ids, attention_mask, token_types)

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        max_new_tokens: int,
        layout: Layout = ONE_DEVICE,
        **options,
    ) -> Int[np.ndarray, "B N"]:
        """The prompts and at most max_new_tokens more, greedily.

        Args:
            input_ids: prompts.
            attention_mask: 1 for tokens, 0 for padding on either side; None means no padding.
            max_new_tokens: at most so many tokens for each prompt.
            layout: where the model's parameters lie; on a mesh all its devices write.
            **options: others of `dsjax.models.generate.Generation`.
        """
        from dsjax.models.generate import Generation, generate  # it is built on this class

        settings = Generation(max_new_tokens=max_new_tokens, **options)
        return generate(self, input_ids, options=settings, attention_mask=attention_mask, layout=layout)

    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None,
        keys: Key[Array, "B"] | None = None,
        valid: Bool[Array, "B T"] | None = None,
        dropping: Dropping | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Float[Array, "B T D"], Statistics]:
        """Hidden states after the last block, and what the layers counted.

        Args:
            tokens: input ids.
            segments: number of the document each token belongs to; tokens see only their own. None: one document.
            positions: position of each token in its document. None: 0 .. T-1.
            token_types: see `__call__`.
            keys: dropout keys, one a row (see layers/dropout.py); None for no dropout.
            valid: False where a position holds no real token, which no statistic counts; None: all are real.
            dropping: the layers that see some tokens only, and how many; None: all see all.
            layout: placement on a mesh.

        Returns:
            the hidden states, and statistics by name: [number of layers that have it, ...], in the layers' order.

        Raises:
            ValueError: layers that drop tokens and layers that do not are in one segment.
        """
        if dropping is not None:
            check_dropping(self.segment_specs, dropping.layers)
        keys = keys if self.config.dropout or self.config.attention_dropout else None
        x_BTD = self.embedded(tokens, positions, token_types, layout=layout)
        x_BTD = dropout(x_BTD, fold(fold(keys, self.config.num_layers), 0), rate=self.config.dropout)
        x_BTD = layout.activation(x_BTD, None, None)
        visibility = self.visibility(tokens.shape[1], segments, positions)
        kept = None if dropping is None else self._kept(dropping, tokens.shape[1], layout)

        def forward(block: Block, x_BTD: jax.Array, context: Context):
            x_BTD, _, statistics = block(x_BTD, context)
            return x_BTD, statistics

        def layer(block: Block, x_BTD: jax.Array, number: jax.Array, kept: jax.Array | None):
            context = Context(layout, fold(keys, number), number, valid, WholeRows(visibility))
            if kept is None:
                return forward(block, x_BTD, context)
            bias = self._bias(kept, kept)
            seen = among_kept(visibility, kept, segments, num_positions=x_BTD.shape[1], bias_BHKK=bias)
            real = kept < x_BTD.shape[1] if valid is None else take(valid, kept)
            context = dataclasses.replace(context, valid=real, view=WholeRows(seen))
            return around(lambda some: forward(block, some, context), x_BTD, kept, layout=layout)

        def wrap(body: Callable, scanned: bool) -> Callable:
            # Below ZeRO 3 nothing needs gathering, but a scan would stack another copy of what the constraint gives.
            gathered = layout.places and (layout.zero_stage >= 3 or scanned)
            return rematerialised(body, self.config.remat, gathered=gathered, scanned=scanned)

        x_BTD, statistics = through(self.segments, self.segment_specs, x_BTD, layer, given=kept, wrap=wrap)
        return self._final(x_BTD, layout), by_layer(statistics)

    def _final(self, x_BTD: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T D"]:
        """The features of the last block's output."""
        return self.final_norm(x_BTD, Context(layout=layout)) if self.architecture.norm_first else x_BTD

    def auxiliary(self, statistics: Statistics) -> Auxiliary:
        """Losses and metrics of one micro-batch that the kinds of the layers make of `features`' statistics.

        Raises:
            ValueError: two kinds give the same name.
        """
        kinds = dict.fromkeys(spec.feed_forward for segment in self.segment_specs for spec in segment.pattern)
        return merged([kind.from_statistics(statistics) for kind in kinds])

    def _kept(self, dropping: Dropping, length: int, layout: Layout) -> list[list[Int[Array, "n B K"] | None]]:
        """The tokens that the layers of each segment and position see; None: all."""
        drawn = lambda numbers: dropping.indices(as_array(numbers), length, layout=layout)
        return [
            [drawn(numbers) if numbers[0] in dropping.layers else None for numbers in segment]
            for segment in layer_numbers(self.segment_specs)
        ]

    def embedded(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        token_types: Int[Array, "B T"] | None = None,
        *,
        layout: Layout = ONE_DEVICE,
    ) -> Float[Array, "B T D"]:
        """The first block's input, before dropout."""
        dtype, context = jnp.dtype(self.config.compute_dtype), Context(layout=layout)
        x_BTD = self.embed(tokens, context, dtype=dtype)
        if self.architecture.positions == "learned":
            where = jnp.arange(tokens.shape[1]) if positions is None else positions
            x_BTD += self.positions(where, context, dtype=dtype)
        if self.architecture.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x_BTD += self.token_types(types, context, dtype=dtype)
        return self.embed_norm(x_BTD, context) if self.architecture.embedding_norm else x_BTD

    def visibility(
        self, length: int, segments: Int[Array, "B T"] | None, positions: Int[Array, "B T"] | None = None
    ) -> Visibility:
        """Masks, biases and turns for whole rows of `length` tokens."""
        places, causal = jnp.arange(length), self.architecture.causal
        mask = None if segments is None else document_mask(segments, segments, places, places, causal=causal)
        # Inside a document places differ from positions by a constant, which neither the softmax nor a turn sees.
        bias = self._bias(places[None], places[None])
        return Visibility(mask, bias, causal, self._rotation(places[None] if positions is None else positions))

    def _bias(
        self, query_places: Int[Array, "#B T"], key_places: Int[Array, "#B S"]
    ) -> Float[Array, "#B H T S"] | None:
        if self.architecture.positions != "alibi":
            return None
        return alibi_bias(self.architecture.num_heads, query_places, key_places)

    def _rotation(self, positions: Int[Array, "B T"]) -> Rotation | None:
        if self.architecture.positions != "rope":
            return None
        return rotation(positions, self.architecture.frequencies)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        positions: Int[Array, "B T"],
        *,
        num_slots: int,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Features of the prompts, and a cache that holds them.

        Args:
            tokens: input ids.
            valid: False where there is padding.
            positions: positions of the tokens in their documents.
            num_slots: S, for how many positions the cache has room.
            layout: placement on a mesh.
        """
        x_BTD = layout.activation(self.embedded(tokens, positions, layout=layout), None, None)
        visibility = self.visibility(tokens.shape[1], valid.astype(jnp.int32), positions)
        context = Context(layout, valid=valid, view=Prefill(visibility, num_slots))

        def layer(block: Block, x_BTD: jax.Array, number: jax.Array, _: None):
            return block(x_BTD, dataclasses.replace(context, number=number))[:2]

        x_BTD, cache = through(self.segments, self.segment_specs, x_BTD, layer)
        return self._final(x_BTD, layout), cache

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        *,
        start: Int[Array, "*B"],
        valid: Bool[Array, "B S"],
        positions: Int[Array, "B T"],
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Features of T new tokens that go to the cache's slots start .. start + T - 1, and the cache with them.

        Args:
            tokens: input ids.
            cache: keys and values so far, from `prefill`.
            start: first new slot, of all rows [] or of each row [B].
            valid: False where a slot of the cache holds padding; slots after the new tokens are never seen.
            positions: positions of the new tokens in their documents.
            layout: placement on a mesh.
        """
        x_BTD = layout.activation(self.embedded(tokens, positions, layout=layout), None, None)
        length, num_slots = tokens.shape[1], valid.shape[1]
        slots, key_slots = (start[..., None] + jnp.arange(length)).reshape(-1, length), jnp.arange(num_slots)
        mask = (slots[:, :, None] >= key_slots)[:, None] & valid[:, None, None, :]
        visibility = Visibility(mask, self._bias(slots, key_slots[None]), rotation=self._rotation(positions))

        def layer(block: Block, x_BTD: jax.Array, number: jax.Array, old: KeyValues):
            return block(x_BTD, Context(layout, number=number, view=Slots(visibility, old, start)))[:2]

        x_BTD, cache = through(self.segments, self.segment_specs, x_BTD, layer, given=cache)
        return self._final(x_BTD, layout), cache

    def table(self, *, layout: Layout = ONE_DEVICE) -> Float[Array, "V D"]:
        """The table of the logits in the compute dtype."""
        table = self.embed.table if self.architecture.tied else self.unembed.table
        return table.whole(Context(layout=layout), dtype=jnp.dtype(self.config.compute_dtype))

    def logit_inputs(
        self, x_BTD: Float[Array, "B T D"], *, layout: Layout = ONE_DEVICE
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], Float[Array, " V"] | None]:
        """The parts x, E and b of the logits x E^T + b (b is None in most families)."""
        table, context = self.table(layout=layout), Context(layout=layout)
        if not self.architecture.masked_head:
            return x_BTD, table, None
        return self.masked_head(x_BTD, context), table, use(self.masked_head.bias, context, jnp.float32)

    def logits(self, x_BTD: Float[Array, "B T D"], *, layout: Layout = ONE_DEVICE) -> Float[Array, "B T V"]:
        """Logits of hidden states, float32."""
        x_BTD, table, bias = self.logit_inputs(x_BTD, layout=layout)
        return logits(x_BTD, table, bias, layout=layout)

    def classify(
        self,
        x_BTD: Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        *,
        keys: Key[Array, "B"] | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> Float[Array, "B C"]:
        """Logits of the classes, float32: from the first real token through the pooler, else from the last one."""
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        place = jnp.argmax(mask, axis=1) if self.architecture.pooler else last
        pooled = jnp.take_along_axis(x_BTD, place[:, None, None], axis=1)[:, 0]
        if self.architecture.pooler:
            pooled = self.pooler(pooled, Context(layout=layout))
        keys = keys if self.config.dropout else None
        pooled = dropout(pooled, fold(fold(keys, self.config.num_layers), 1), rate=self.config.dropout)
        return self.classifier(pooled, Context(layout=layout)).astype(jnp.float32)


@partial(jax.jit, static_argnames="graph")
def _outputs(graph, params, input_ids, attention_mask, token_types):
    model: Transformer = nnx.merge(graph, params)
    positions = None if attention_mask is None else jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    x_BTD, _ = model.features(input_ids, segments=attention_mask, positions=positions, token_types=token_types)
    if model.config.task == "language_model":
        return model.logits(x_BTD)
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    return model.classify(x_BTD, mask) if model.config.task == "classification" else mean_pooled(x_BTD, mask)
