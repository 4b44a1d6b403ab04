"""Keys and values of the positions so far, laid out for the step that reads all of them: keys [B, G, K, S], values
[B, G, S, K]. Both products of a step then take them as they lie.

Shapes: B batch, T new positions, S places of the cache, H heads, G heads of keys and values, K head size.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.layers.attention import Visibility

KeyValues = tuple[Float[Array, "B G K S"], Float[Array, "B G S K"]]


def stored(k_BTGK: Float[Array, "B T G K"], v_BTGK: Float[Array, "B T G K"], num_places: int) -> KeyValues:
    """A cache that holds T positions and has room up to num_places.

    Example:
        >>> keys, values = stored(jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 2, 4)), 8)
        >>> keys.shape, values.shape, float(keys.sum())
        ((1, 2, 4, 8), (1, 2, 8, 4), 24.0)
    """
    room = (0, num_places - k_BTGK.shape[1])
    keys = jnp.pad(k_BTGK.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), room))
    return keys, jnp.pad(v_BTGK.transpose(0, 2, 1, 3), ((0, 0), (0, 0), room, (0, 0)))


def appended(
    cache: KeyValues, k_BTGK: Float[Array, "B T G K"], v_BTGK: Float[Array, "B T G K"], start: Int[Array, ""]
) -> KeyValues:
    """The cache with T more positions from the place `start` on; written in place if the cache is donated."""
    keys = jax.lax.dynamic_update_slice_in_dim(cache[0], k_BTGK.transpose(0, 2, 3, 1), start, axis=3)
    values = jax.lax.dynamic_update_slice_in_dim(cache[1], v_BTGK.transpose(0, 2, 1, 3), start, axis=2)
    # XLA would merge the update into what reads the cache, and then copy the whole cache (three times, measured on CPU)
    # so that it can still be read after it was written to.
    return jax.lax.optimization_barrier((keys, values))


def attend_to_cache(
    q_BTHK: Float[Array, "B T H K"], cache: KeyValues, visibility: Visibility
) -> Float[Array, "B T H K"]:
    """Attention of new positions over all places of the cache, with a float32 softmax.

    Args:
        q_BTHK: queries.
        cache: keys and values, those of the new positions included.
        visibility: mask [B, 1, T, S] (required) and bias [1, H, T, S] or None.
    """
    keys, values = cache
    assert visibility.mask is not None
    batch, length, heads, size = q_BTHK.shape
    groups, places = keys.shape[1], keys.shape[3]
    q_BGNK = q_BTHK.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)
    scores = jnp.einsum("bgnk,bgks->bgns", q_BGNK, keys, preferred_element_type=jnp.float32) / math.sqrt(size)
    scores = scores.reshape(batch, groups, heads // groups, length, places)
    if visibility.bias is not None:
        scores += visibility.bias.reshape(-1, groups, heads // groups, length, places)
    scores = jnp.where(visibility.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype).reshape(batch, groups, -1, places)
    mixed = jnp.einsum("bgns,bgsk->bgnk", weights, values)
    mixed = mixed.reshape(batch, groups, heads // groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(q_BTHK.shape)
