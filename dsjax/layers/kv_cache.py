"""Keys and values of the positions so far, laid out for the step that reads all of them: keys [B, G, K, S], values
[B, G, S, K]. Both products of a step then take them as they lie.

Two views of attention: `Prefill` computes whole rows and fills a cache with them, `Slots` adds positions to a cache and
attends to all of it.

Shapes: B batch, T new positions, S slots of the cache, H heads, G heads of keys and values, K head size.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.layers.attention import Seen, Visibility, attend
from dsjax.layers.context import Context
from dsjax.mesh.layout import ONE_DEVICE, Layout

KeyValues = tuple[Float[Array, "B G K S"], Float[Array, "B G S K"]]


@dataclasses.dataclass(frozen=True)
class Prefill(Seen):
    """The view of whole rows that fills a cache with their keys and values.

    Attributes:
        num_slots: S, for how many positions the cache has room.
    """

    num_slots: int

    def mix(
        self,
        q_BTHK: Float[Array, "B T H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        context: Context,
        *,
        dropout: float,
    ) -> tuple[Float[Array, "B T H K"], KeyValues]:
        """Attend within rows; a cache is for inference, where nothing is dropped."""
        assert context.keys is None or dropout == 0
        mixed = attend(q_BTHK, k_BTGK, v_BTGK, self.visibility)
        return mixed, _placed(stored(k_BTGK, v_BTGK, self.num_slots), context.layout)


@dataclasses.dataclass(frozen=True)
class Slots(Seen):
    """The view of a cache: new positions go to its slots from `start` on, and see all slots that they may.

    Attributes:
        cache: keys and values so far.
        start: first new slot, of all rows [] or of each row [B].
    """

    cache: KeyValues
    start: Int[Array, "*B"]

    def mix(
        self,
        q_BTHK: Float[Array, "B T H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        context: Context,
        *,
        dropout: float,
    ) -> tuple[Float[Array, "B T H K"], KeyValues]:
        """Write to the cache, then attend to it; a cache is for inference, where nothing is dropped."""
        assert context.keys is None or dropout == 0
        cache = appended(self.cache, k_BTGK, v_BTGK, self.start, layout=context.layout)
        return attend_to_cache(q_BTHK, cache, self.visibility), cache


def _placed(cache: KeyValues, layout: Layout) -> KeyValues:
    """Keys and values split over devices by their heads."""
    keys, values = (layout.activation(x, "kv_heads", None, None) for x in cache)
    return keys, values


def stored(k_BTGK: Float[Array, "B T G K"], v_BTGK: Float[Array, "B T G K"], num_slots: int) -> KeyValues:
    """A cache that holds T positions and has room up to num_slots.

    Example:
        >>> keys, values = stored(jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 4)), 8)
        >>> keys.shape, values.shape, float(keys.sum())
        ((1, 2, 4, 8), (1, 2, 8, 4), 24.0)
    """
    room = (0, num_slots - k_BTGK.shape[1])
    keys = jnp.pad(k_BTGK.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), room))
    return keys, jnp.pad(v_BTGK.transpose(0, 2, 1, 3), ((0, 0), (0, 0), room, (0, 0)))


def appended(
    cache: KeyValues,
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    start: Int[Array, "*B"],
    *,
    layout: Layout = ONE_DEVICE,
) -> KeyValues:
    """The cache with T more positions from the slot `start` on; written in place if the cache is donated.

    Args:
        cache: keys and values so far.
        k_BTGK: new keys.
        v_BTGK: new values.
        start: of all rows [], which is one copy, or of each row [B].
        layout: placement on a mesh.

    Example:
        >>> old, new = stored(jnp.zeros((2, 1, 1, 1)), jnp.zeros((2, 1, 1, 1)), 4), jnp.ones((2, 1, 1, 1))
        >>> appended(old, new, new, jnp.array([1, 3]))[1][:, 0, :, 0].tolist()
        [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    keys = _written(cache[0], k_BTGK.transpose(0, 2, 3, 1), start, axis=3)
    values = _written(cache[1], v_BTGK.transpose(0, 2, 1, 3), start, axis=2)
    # XLA would merge the update into what reads the cache, and then copy the whole cache (three times, measured on CPU)
    # so that it can still be read after it was written to.
    return jax.lax.optimization_barrier(_placed((keys, values), layout))


def _written(old: jax.Array, new: jax.Array, start: jax.Array, *, axis: int) -> jax.Array:
    """New slices along one dimension, from `start` on."""
    if start.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=axis)
    return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))(old, new, start)


def attend_to_cache(
    q_BTHK: Float[Array, "B T H K"], cache: KeyValues, visibility: Visibility
) -> Float[Array, "B T H K"]:
    """Attention of new positions over all slots of the cache, with a float32 softmax.

    Args:
        q_BTHK: queries.
        cache: keys and values, those of the new positions included.
        visibility: mask [B, 1, T, S] (required) and bias [1 or B, H, T, S] or None.
    """
    keys, values = cache
    assert visibility.mask is not None
    batch, length, heads, size = q_BTHK.shape
    groups, slots = keys.shape[1], keys.shape[3]
    q_BGNK = q_BTHK.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
    scores = jnp.einsum("bgnk,bgks->bgns", q_BGNK, keys, preferred_element_type=jnp.float32) / math.sqrt(size)
    scores = scores.reshape(batch, groups, heads // groups, length, slots)
    if visibility.bias is not None:
        scores += visibility.bias.reshape(-1, groups, heads // groups, length, slots)
    scores = jnp.where(visibility.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(batch, groups, -1, slots)
    mixed = jnp.einsum("bgns,bgsk->bgnk", weights, values)
    mixed = mixed.reshape(batch, groups, heads // groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q_BTHK.shape)
