"""Cases for a GPU: the kernels against reference.py, and XLA's `unpack` against its definition.

The shapes are one tile, several tensors of three tiles, tensors that fill their blocks, tensors that do not, and BERT-
Large's largest stack of matrices; with and without mask and padding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.checks import Check
from pallas_kernels.sign_pack import api, reference

EPSILON = 2.0**-24  # a float32 rounding
SMALLEST = 1e-30
SQUARES = 1e-5  # relative: float32 sums in pairs over threads, warps and blocks

# [S, N], the dtype of x, whether there is a mask, and how many elements at the end are padding.
PACKS = (
    ((1, 512), "float32", False, 0),
    ((1, 512), "bfloat16", False, 0),
    ((3, 1536), "float32", True, 535),
    ((5, 2**17 + 512), "bfloat16", True, 300),
    ((2, 2**20), "bfloat16", False, 5),
    ((24, 2**22), "float32", False, 0),
)
# W and [S, K].
AVERAGES = ((1, (1, 512)), (9, (2, 2048)), (2, (3, 2**17 + 512)), (64, (2, 2**17)), (8, (24, 2**19)))
UNPACKS = ((2, 3, 1024), (8, 5, 2**17 + 512))


def checks() -> list[Check]:
    """Every op of this folder in every shape.

    Example:
        >>> checks()[2].name, checks()[0].implementation
        ('sign_pack [3, 1536] float32, mask, length 1001', 'mosaic')
    """
    found = [_pack(*case) for case in PACKS]
    found += [_average(num_workers, shape) for num_workers, shape in AVERAGES]
    return found + [_unpack(*shape) for shape in UNPACKS]


def _pack(shape: tuple[int, int], dtype: str, masked: bool, padding: int) -> Check:
    def error() -> float:
        keys = jax.random.split(jax.random.key(shape[1]), 4)
        x = jax.random.normal(keys[0], shape).astype(dtype)
        mask = jax.random.bernoulli(keys[3], 0.7, shape).astype(jnp.int8) if masked else None
        carry, scale = _state(keys[1], keys[2], shape, mask, length)
        pack = functools.partial(api.sign_pack, mask=mask, length=length)
        bound = jnp.abs(x.astype(jnp.float32)) + jnp.abs(carry) + scale[:, None]
        return _error(pack, bound, x, carry, scale)

    length = shape[1] - padding if padding else None
    name = f"sign_pack {list(shape)} {dtype}{', mask' if masked else ''}{f', length {length}' if padding else ''}"
    return Check(name, "mosaic", shape[0] * shape[1], error)


def _average(num_workers: int, shape: tuple[int, int]) -> Check:
    def error() -> float:
        keys = jax.random.split(jax.random.key(num_workers), 4)
        bits = jax.random.bits(keys[0], (num_workers, shape[0], shape[1] // 8), jnp.uint8)
        scales = jnp.abs(jax.random.normal(keys[1], (num_workers, shape[0])))
        carry, scale = _state(keys[2], keys[3], shape, None, None)
        bound = num_workers * scales.mean(axis=0)[:, None] + jnp.abs(carry) + scale[:, None]
        return _error(api.unpack_average, bound, bits, scales, carry, scale)

    return Check(f"unpack_average {list(shape)} W {num_workers}", "mosaic", num_workers * shape[0] * shape[1], error)


def _unpack(num_workers: int, num_tensors: int, size: int) -> Check:
    def error() -> float:
        bits = jax.random.bits(jax.random.key(0), (num_workers, num_tensors, size // 8), jnp.uint8)
        scales = jnp.abs(jax.random.normal(jax.random.key(1), (num_workers, num_tensors)))
        got = jax.jit(api.unpack)(bits, scales).reshape(num_tensors, num_workers, size)
        places = jnp.arange(size)
        bit = (bits[:, :, places // 8] >> (7 - places % 8).astype(jnp.uint8)) & 1
        want = (scales[:, :, None] * (2.0 * bit - 1)).swapaxes(0, 1)
        return 0.0 if bool((got == want).all()) else float("inf")

    shape = [num_workers, num_tensors, size]
    return Check(f"unpack {shape}", "xla", num_workers * num_tensors * size, error)


def _state(
    carry_key: jax.Array, scale_key: jax.Array, shape: tuple[int, int], mask: jax.Array | None, length: int | None
) -> tuple[jax.Array, jax.Array]:
    """A carry as an earlier call left it, zero where nothing is sent, and its scale."""
    carry = reference.keep(jax.random.normal(carry_key, shape), mask, length)
    return carry, jnp.abs(jax.random.normal(scale_key, shape[:1]))


def _error(op: Callable, bound: jax.Array, *inputs: jax.Array) -> float:
    """The kernel against XLA; `bound` is as large as the summands of each element are together."""
    got, want = (jax.jit(functools.partial(op, implementation=name))(*inputs) for name in ("mosaic", "xla"))
    carry, bits, squares = got
    # A product and a sum may be rounded once or twice, so a bit is right if it is the sign of the kernel's own carry.
    of_carry = jnp.max(jnp.abs(carry - want[0]) / jnp.maximum(4 * EPSILON * bound, SMALLEST))
    wrong_bits = jnp.any(bits != jnp.packbits(carry >= 0, axis=1))
    true_squares = jnp.sum(carry * carry, axis=1)
    of_squares = jnp.max(jnp.abs(squares - true_squares) / jnp.maximum(SQUARES * true_squares, SMALLEST))
    return float("inf") if bool(wrong_bits) else float(jnp.maximum(of_carry, of_squares))
