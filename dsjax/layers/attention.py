"""Multi-head attention (arXiv 1706.03762): softmax(q k^T / sqrt(K) + bias) v, over one document at a time.

With grouped queries (arXiv 2305.13245) H / G neighbouring heads share a key and a value.

Shapes: B batch, T queries, S keys, D model, H heads, G heads of keys and values, K head size.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from dsjax.layers.context import Context
from dsjax.layers.dropout import dropout, fold
from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive
from dsjax.layers.positions import Rotation, rotate
from dsjax.mesh.layout import Layout

MOST_BLOCKS, SHORTEST_BLOCK = 4, 64
"""Into how many blocks of queries a row is cut where no fused kernel does it, and how long a block is at least."""


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which key each query may see, at what penalty, from where; the same for all layers of a model.

    Attributes:
        mask: [B or 1, 1, T, S], True where a query sees a key; None means all keys, or those up to it when causal.
        bias: [B or 1, H, T, S] float32 added to the scores, or None.
        causal: no query sees a key after it (the mask, if there is one, says so too).
        rotation: by which queries and new keys are turned, cosines and sines [B or 1, T, K / 2], or None.
    """

    mask: Bool[Array, "#B 1 T S"] | None
    bias: Float[Array, "#B H T S"] | None
    causal: bool = True
    rotation: Rotation | None = None


@dataclasses.dataclass(frozen=True)
class Seen:
    """The part that all views share.

    Attributes:
        visibility: which keys a query sees.
    """

    visibility: Visibility

    @property
    def rotation(self) -> Rotation | None:
        """The turn of queries and new keys, or None."""
        return self.visibility.rotation


class WholeRows(Seen):
    """The view of whole rows: queries meet the keys of their own row, and nothing is kept."""

    def mix(
        self,
        q_BTHK: Float[Array, "B T H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        context: Context,
        *,
        dropout: float,
    ) -> tuple[Float[Array, "B T H K"], None]:
        """Attend within rows."""
        keys = fold(context.keys, 0)
        return attend(q_BTHK, k_BTGK, v_BTGK, self.visibility, dropout_keys=keys, dropout_rate=dropout), None


def document_mask(
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    query_positions: Int[Array, " T"],
    key_positions: Int[Array, " S"],
    *,
    causal: bool = True,
) -> Bool[Array, "B 1 T S"]:
    """True where the key is in the same document and, if causal, not after the query.

    Example:
        >>> s = jnp.array([[1, 1, 2]])
        >>> document_mask(s, s, jnp.arange(3), jnp.arange(3))[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    seen = query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        seen &= query_positions[:, None] >= key_positions[None, :]
    return seen[:, None]


def attend(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    visibility: Visibility,
    *,
    dropout_keys: Key[Array, "B"] | None = None,
    dropout_rate: float = 0.0,
) -> Float[Array, "B T H K"]:
    """Attention with a float32 softmax; cuDNN's fused kernel on a GPU in bfloat16, XLA's elsewhere."""
    if dropout_keys is not None and dropout_rate > 0:
        return _attend_with_dropout(q_BTHK, k_BSGK, v_BSGK, visibility, dropout_keys, dropout_rate)
    if jax.default_backend() == "gpu" and q_BTHK.dtype == jnp.bfloat16:
        bias = None if visibility.bias is None else visibility.bias.astype(q_BTHK.dtype)
        mask, causal = visibility.mask, visibility.mask is None and visibility.causal
        if mask is not None:  # JAX's rule for the vmap over workers takes no mask for all heads
            mask = jnp.broadcast_to(mask, (mask.shape[0], q_BTHK.shape[2], q_BTHK.shape[1], k_BSGK.shape[1]))
        return jax.nn.dot_product_attention(
            q_BTHK, k_BSGK, v_BSGK, bias, mask, is_causal=causal, implementation="cudnn"
        )
    return _attend_in_blocks(q_BTHK, k_BSGK, v_BSGK, visibility)


def _attend_in_blocks(q_BTHK, k_BSGK, v_BSGK, visibility: Visibility):
    """XLA's attention; in whole rows a block of queries leaves out the keys after it, which it could not see anyway.

    Measured on a CPU at T = 256, forward and backward: 0.091 s in one piece, 0.054 s in four.
    """
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    blocks = min(MOST_BLOCKS, num_queries // SHORTEST_BLOCK) if visibility.causal and num_queries == num_keys else 1
    while blocks > 1 and num_queries % blocks:
        blocks -= 1
    blocks = max(blocks, 1)
    # Pieces by lax.split, whose gradient is one concatenation: that of a slice is a sum with zeros, a pass for each.
    length, out = num_queries // blocks, []
    pieces = lambda x: jax.lax.split(x, (x.shape[1] // blocks,) * blocks, axis=1)
    q_pieces, k_pieces, v_pieces = pieces(q_BTHK), pieces(k_BSGK), pieces(v_BSGK)
    for number in range(blocks):
        queries = slice(number * length, (number + 1) * length)
        keys = slice(0, queries.stop if blocks > 1 else num_keys)
        if visibility.mask is not None:
            mask = visibility.mask[:, :, queries, keys]
        elif visibility.causal:
            mask = (jnp.arange(num_queries)[queries, None] >= jnp.arange(num_keys)[keys])[None, None]
        else:
            mask = None
        bias = None if visibility.bias is None else visibility.bias[:, :, queries, keys]
        k, v = (jnp.concatenate(seen[: number + 1], axis=1) for seen in (k_pieces, v_pieces))
        out.append(jax.nn.dot_product_attention(q_pieces[number], k, v, bias, mask, implementation="xla"))
    return jnp.concatenate(out, axis=1)


def _attend_with_dropout(q_BTHK, k_BSGK, v_BSGK, visibility: Visibility, keys, rate: float):
    """The same with dropped attention weights, which no fused kernel offers."""
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    k_BSHK, v_BSHK = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BSGK, v_BSGK))
    scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    scores *= 1 / math.sqrt(q_BTHK.shape[-1])
    if visibility.bias is not None:
        scores += visibility.bias
    mask = visibility.mask
    if mask is None and visibility.causal:
        mask = jnp.tril(jnp.ones((num_queries, num_keys), bool))[None, None]
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1), keys, rate=rate)
    return jnp.einsum("bhts,bshk->bthk", weights.astype(v_BSHK.dtype), v_BSHK)


def for_each_query(x_BSGK: Float[Array, "B S G K"], num_heads: int) -> Float[Array, "B S H K"]:
    """Keys or values repeated for every head of queries, where the mesh splits these and each device holds all of x.

    As a product with zeros and ones, of which each device has the columns of its own heads, and in the backward pass
    one sum over the devices. A broadcast would be split over parts of the mesh's axis, heads by groups, and exchanged.

    Example:
        >>> for_each_query(jnp.array([[[[1.0], [2.0]]]]), 4)[0, 0, :, 0].tolist()
        [1.0, 1.0, 2.0, 2.0]
    """
    heads = jnp.arange(num_heads) * x_BSGK.shape[2] // num_heads
    choice_GH = jax.nn.one_hot(heads, x_BSGK.shape[2], dtype=x_BSGK.dtype, axis=0)
    return jnp.einsum("bsgk,gh->bshk", x_BSGK, choice_GH, precision=jax.lax.Precision.HIGHEST)  # no TF32: bits stay


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """A kind of attention.

    Attributes:
        num_heads: H.
        num_kv_heads: G; 0 means H.
        head_dim: K; 0 means dim / H.
        fused: one kernel for queries, keys and values instead of three.
        use_bias: whether the projections have biases.
        scores_by_layer: scores of layer i, counted from 0, are divided by i + 1.
        dropout: rate at which attention weights are dropped in training.
    """

    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    fused: bool = True
    use_bias: bool = True
    scores_by_layer: bool = False
    dropout: float = 0.0


class Attention(nnx.Module):
    """Projects to queries, keys and values, attends, and projects back; the heads are the tensor-parallel dimension.

    Either one fused kernel [D, 3, H * K] (query, key and value blocks, heads contiguous in each), as GPT-2 and BLOOM
    have it, or three: [D, H, K] and twice [D, G, K].
    """

    def __init__(self, spec: AttentionSpec, dim: int, *, key: jax.Array, std: float, residual_scale: float) -> None:
        heads, head_dim = spec.num_heads, spec.head_dim or dim // spec.num_heads
        make = partial(Linear, std=std, use_bias=spec.use_bias)
        if spec.fused:
            self.qkv = make((dim, 3, dim), ("embed", "qkv", "heads"), key=derive(key, "qkv"))
        else:
            shared = (dim, spec.num_kv_heads or heads, head_dim)
            self.q = make((dim, heads, head_dim), ("embed", "heads", "head"), key=derive(key, "q"))
            self.k = make(shared, ("embed", "kv_heads", "head"), key=derive(key, "k"))
            self.v = make(shared, ("embed", "kv_heads", "head"), key=derive(key, "v"))
        self.spec = spec
        self.out = Linear(
            (heads * head_dim, dim),
            ("heads", "embed"),
            key=derive(key, "out"),
            std=std * residual_scale,
            use_bias=spec.use_bias,
        )

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Any]:
        """Attention of x as the context's view has it, and the view's cache (None of whole rows)."""
        view = context.view
        assert view is not None
        q, k, v = self._project(x_BTD, view.rotation, context)
        if self.spec.scores_by_layer:  # scores are divided by dividing the queries
            q = (q.astype(jnp.float32) / jnp.float32(context.number + 1)).astype(q.dtype)
        mixed, cache = view.mix(q, k, v, context, dropout=self.spec.dropout)
        merged = context.layout.activation(mixed.reshape(*mixed.shape[:2], -1), None, "heads")
        return self.out(merged, context), cache

    def _project(
        self, x_BTD: Float[Array, "B T D"], turn: Rotation | None, context: Context
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
        """Queries, keys and values of x; queries and keys turned to their positions if the model does so.

        Where the mesh splits the queries' heads but not the fewer ones of keys and values, these are repeated: G is H.
        """
        layout = context.layout
        if self.spec.fused:
            qkv = layout.activation(self.qkv(x_BTD, context), None, None, "heads")
            heads = (*x_BTD.shape[:2], self.spec.num_heads, qkv.shape[-1] // self.spec.num_heads)
            q, k, v = (part.reshape(heads) for part in jax.lax.split(qkv, (1, 1, 1), axis=2))
        else:
            q, k, v = (part(x_BTD, context) for part in (self.q, self.k, self.v))
            q = layout.activation(q, None, "heads", None)
            k, v = (layout.activation(x, None, "kv_heads", None) for x in (k, v))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if self._are_whole(q.shape[2], k.shape[2], layout):
            k, v = (layout.activation(for_each_query(x, q.shape[2]), None, "heads", None) for x in (k, v))
        return q, k, v

    @staticmethod
    def _are_whole(heads: int, kv_heads: int, layout: Layout) -> bool:
        """Whether a device has all heads of keys and values beside some of the queries' heads."""
        # The planner traces one device's part of a layer, in which fewer queries than keys may be left.
        if heads % kv_heads:
            return True
        return layout.is_split("heads", heads) and not layout.is_split("kv_heads", kv_heads)
