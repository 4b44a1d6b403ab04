"""Models of any family by their config: built, described without being built, and checked against mesh and rows."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from dsjax.models.config import ModelConfig
from dsjax.models.families.family import architecture_of, family_of
from dsjax.models.stack import Segments


@functools.lru_cache(maxsize=64)
def segments_of(config: ModelConfig) -> Segments:
    """The stack of a model's layers.

    Example:
        >>> from dsjax.models.families.gpt2.config import GPT2Config
        >>> [segment.num_layers for segment in segments_of(GPT2Config(num_layers=12))]
        [1, 10, 1]
    """
    return architecture_of(config).segments(config.segment_lengths)


def create(config: ModelConfig, *, key: jax.Array) -> Any:
    """A model with fresh float32 parameters on the default device."""
    params = jax.jit(lambda key: initial_params(config, key))(key)  # one program instead of hundreds of small ones
    return nnx.merge(nnx.graphdef(abstract(config)), params)


def initial_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters as nested dicts; to be traced under `jax.jit`."""
    return nnx.to_pure_dict(nnx.state(_build(config, key), nnx.Param))


def abstract(config: ModelConfig, *, tensor: int = 1) -> Any:
    """The model with ShapeDtypeStructs for parameters; nothing is allocated.

    Args:
        config: the model.
        tensor: more than 1 gives the part of it that one of so many devices of this mesh axis computes.
    """
    return nnx.merge(*_abstract_parts(config, tensor))


@functools.lru_cache(maxsize=16)
def _abstract_parts(config: ModelConfig, tensor: int) -> tuple[Any, Any]:
    """Kept, since tracing a deep model takes seconds and whoever loads one asks more than once."""
    return nnx.split(nnx.eval_shape(lambda: _build(config, jax.random.key(0), tensor=tensor)))


def _build(config: ModelConfig, key: jax.Array, *, tensor: int = 1) -> Any:
    architecture = architecture_of(config)
    part = architecture if tensor == 1 else architecture.on_one_device(tensor)
    return family_of(config.kind).build(config, part, key=key)


def check_divisible(config: ModelConfig, mesh_shape: Mapping[str, int]) -> None:
    """Refuse a mesh whose tensor axis does not divide the model.

    Args:
        config: the model.
        mesh_shape: sizes of the mesh axes.

    Raises:
        ValueError: names every dimension that does not fit, and the nearest sizes of `tensor` that divide all.

    Example:
        >>> from dsjax.models.families.gpt2.config import GPT2Config
        >>> check_divisible(GPT2Config(num_heads=12, vocab_size=50304), {"tensor": 4})
    """
    tensor = mesh_shape["tensor"]
    dims = architecture_of(config).divided_by_tensor
    bad = {name: size for name, size in dims.items() if size % tensor}
    if not bad:
        return
    fitting = [size for size in range(1, 2 * tensor) if not any(dim % size for dim in dims.values())]
    near = sorted(sorted(fitting, key=lambda size: abs(size - tensor))[:3])
    listed = ", ".join(f"model.{name} = {size}" for name, size in bad.items())
    hint = "; a vocab_size rounded up (rows that no token uses) divides more sizes" if "vocab_size" in bad else ""
    raise ValueError(
        f"mesh.tensor = {tensor} does not divide {listed}; the nearest sizes that divide the model are "
        f"{', '.join(map(str, near))}{hint}"
    )


def check_length(config: ModelConfig, sequence_length: int) -> None:
    """Refuse rows that are longer than the model's positions.

    Raises:
        ValueError: says both lengths and what to change.

    Example:
        >>> from dsjax.models.families.bloom.config import BloomConfig
        >>> check_length(BloomConfig(), 1_000_000)
    """
    limit = architecture_of(config).max_positions
    if limit and sequence_length > limit:
        raise ValueError(
            f"data.sequence_length = {sequence_length} is more than the model's positions, model.max_positions = "
            f"{limit}; shorten the rows or raise max_positions"
        )
