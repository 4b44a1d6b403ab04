"""Checks of the three phases' arguments: every mistake in a shape or dtype is named before anything is traced."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


def check_same(name: str, array: jax.Array, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Raise ValueError unless an array has this shape and one of these dtypes."""
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}: must be {shape}")
    if str(array.dtype) not in dtypes:
        raise ValueError(f"{name} is {array.dtype}: must be {' or '.join(dtypes)}")


def check_values(name: str, array: jax.Array) -> tuple[int, int]:
    """(S, N) of an array of S tensors of N values, N a positive multiple of 8."""
    if array.ndim != 2:
        raise ValueError(f"{name} has the shape {array.shape}: must be [S, N], S tensors of N values")
    if array.shape[1] % 8 or not array.shape[1]:
        raise ValueError(
            f"{name} has {array.shape[1]} values in a tensor: must be a positive multiple of 8; pad with zeros"
        )
    return array.shape[0], array.shape[1]


def check_bits(bits: jax.Array, scales: jax.Array) -> tuple[int, int, int]:
    """(W, S, K) of packed signs [W, S, K // 8] with scales [W, S]."""
    if bits.ndim != 3 or not bits.shape[0] or not bits.shape[2]:
        raise ValueError(f"bits has the shape {bits.shape}: must be [W, S, K // 8], packed signs from W workers")
    check_same("bits", bits, bits.shape, ("uint8",))
    check_same("scales", scales, bits.shape[:2], ("float32",))
    return bits.shape[0], bits.shape[1], bits.shape[2] * 8


def check_state(carry: jax.Array, scale: jax.Array, shape: tuple[int, int]) -> None:
    """The carry [S, N] and its scale [S], both float32."""
    check_same("carry", carry, shape, ("float32",))
    check_same("scale", scale, shape[:1], ("float32",))


def check_mask(mask: jax.Array | None, length: int | jax.Array | None, shape: tuple[int, int]) -> None:
    """The mask [S, N], bool or int8; the length, an int in 0..N or an int32 scalar (whose value is not checked)."""
    if mask is not None:
        check_same("mask", mask, shape, ("bool", "int8"))
    if isinstance(length, jax.Array):
        if length.shape or length.dtype != jnp.int32:
            raise ValueError(f"length is {length.dtype}{list(length.shape)}: must be an int or an int32 scalar")
    elif length is not None and not 0 <= length <= shape[1]:
        raise ValueError(f"length is {length}: must be between 0 and the {shape[1]} values of a tensor")


class Tiling(NamedTuple):
    """Walk of a thread block of the Mosaic kernel over a tensor: `per_block` tiles of `rows` rows of 8 values."""

    rows: int
    per_block: int

    def blocks(self, size: int) -> int:
        """Number of thread blocks for a tensor of `size` values."""
        return math.ceil(size / (8 * self.rows * self.per_block))


def tiling(shape: tuple[int, ...]) -> Tiling:
    """The tiles of the S tensors of N values of a shape (S, N): 64 to 256 rows, up to 8 tiles to a block.

    Raises:
        ValueError: unless N is a multiple of 512, the smallest tile, and S at most 65,535, a grid's second dimension.

    Example:
        >>> tiling((24, 1024 * 1024))
        Tiling(rows=256, per_block=8)
        >>> tiling((24, 1000))
        Traceback (most recent call last):
        ...
        ValueError: the Mosaic kernel needs a multiple of 512 values in a tensor, not 1000: pad with zeros ...
    """
    num_tensors, size = shape
    if num_tensors > 65535:
        raise ValueError(
            f"the Mosaic kernel takes at most 65535 tensors in a call, not {num_tensors}: use several calls"
        )
    if size % 512 or not 0 < size < 2**31:  # places are int32
        raise ValueError(
            f"the Mosaic kernel needs a multiple of 512 values in a tensor, not {size}: pad with zeros (`length` keeps"
            " the padding out of norms and errors), or use implementation='xla'"
        )
    return Tiling(rows=8 * math.gcd(size // 64, 32), per_block=8)
