"""Parameters that name their dimensions, and how a layer takes one up for use."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsjax.mesh.layout import Axes, Layout


def normal(key: jax.Array, shape: tuple[int, ...], axes: Axes, *, std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2), its dimensions named by `axes`."""
    assert len(shape) == len(axes)
    return nnx.Param(std * jax.random.normal(key, shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """A float32 parameter filled with one value, its dimensions named by `axes`."""
    assert len(shape) == len(axes)
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def use(parameter: nnx.Param, layout: Layout | None, dtype: DTypeLike) -> jax.Array:
    """The parameter in the compute dtype, gathered from its ZeRO shards.

    The cast comes before the gather: half the bytes travel when computing in bfloat16.
    """
    value = parameter[...].astype(dtype)
    return value if layout is None else layout.weight(value, parameter.get_metadata("axes"))
