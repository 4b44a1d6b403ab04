"""Parameters that name their dimensions, and how a layer takes one up for use."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsjax.layers.context import Context
from dsjax.mesh.layout import Axes


def derive(key: jax.Array, name: str | jax.Array | int) -> jax.Array:
    """A key for a named part, or for a layer by its number (which may be traced).

    The words of the key are mixed with the name by a multiplication and an addition each. `jax.random.split` would do
    the same with a whole threefry block, which takes XLA a tenth of a second to compile, dozens of times in a model;
    the block that is drawn from the derived key scrambles its words anyway.

    Example:
        >>> key = jax.random.key(0)
        >>> bool(derive(key, "a") == derive(key, "b")), bool(derive(key, "a") == derive(key, "a"))
        (False, True)
    """
    words = jax.random.key_data(key)
    number = jnp.uint32(zlib.crc32(name.encode())) if isinstance(name, str) else jnp.asarray(name).astype(jnp.uint32)
    odd = jnp.arange(1, 2 * words.size, 2, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    return jax.random.wrap_key_data((words ^ (words >> 15)) * jnp.uint32(0x85EBCA6B) + (number + jnp.uint32(1)) * odd)


def constant(value: float, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """A float32 parameter filled with one value, its dimensions named by `axes`."""
    assert len(shape) == len(axes)
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def use(parameter: nnx.Param, context: Context, dtype: DTypeLike) -> jax.Array:
    """The parameter in the compute dtype, gathered from its ZeRO shards.

    It travels in the smaller of the two types: half the bytes for float32 when computing in bfloat16.
    """
    value = parameter[...]
    if value.dtype.itemsize > jnp.dtype(dtype).itemsize:
        value = value.astype(dtype)
    return context.layout.gather(value, parameter.get_metadata("axes")).astype(dtype)
