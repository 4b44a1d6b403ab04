"""The Mosaic kernels on a GPU (Hopper) against numpy in float64. Run there by make gpu-check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sign_pack_oracle as oracle

import pallas_kernels

pytestmark = pytest.mark.gpu

EPSILON = 2.0**-24  # a float32 rounding


def check(got, want, size: np.ndarray) -> None:
    """Against the oracle's carry, signs and squares; `size` bounds the summands of each element."""
    carry, bits, squares = map(np.asarray, got)
    assert (np.abs(carry - want[0]) <= 4 * EPSILON * size).all()
    np.testing.assert_array_equal(bits, np.packbits(carry >= 0, axis=1))
    # Float32 sums in pairs over threads, warps and blocks.
    np.testing.assert_allclose(squares, (carry.astype(np.float64) ** 2).sum(axis=1), rtol=1e-5, atol=1e-30)


def arrays(rng, shape: tuple[int, int], kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    carry = np.where(kept, rng.standard_normal(shape), 0).astype(np.float32)
    return carry, np.abs(rng.standard_normal(shape[0])).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("masked", "cut"), [(False, 0), (True, 0), (False, 5), (True, 300)])
@pytest.mark.parametrize("shape", [(1, 512), (3, 1536), (2, 2**20), (5, 2**17 + 512)])
def test_sign_pack(shape, masked, cut, dtype):
    rng = np.random.default_rng(shape[1])
    mask = (rng.random(shape) < 0.7).astype(np.int8) if masked else None
    length = shape[1] - cut if cut else None
    carry, scale = arrays(rng, shape, oracle.keep(shape, mask, length))
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    pack = functools.partial(pallas_kernels.sign_pack, implementation="mosaic")
    got = jax.jit(pack, static_argnames="length")(x, carry, scale, mask=mask, length=length)
    x = np.asarray(x, np.float64)
    want = oracle.sign_pack(x, carry, scale, mask=mask, length=length)
    check(got, want, np.abs(x) + np.abs(carry) + scale[:, None])


@pytest.mark.parametrize("num_workers", [1, 2, 8, 9, 64])
@pytest.mark.parametrize("shape", [(1, 512), (3, 2**17 + 512)])
def test_unpack_average(shape, num_workers):
    rng = np.random.default_rng(num_workers)
    bits = rng.integers(0, 256, (num_workers, shape[0], shape[1] // 8), np.uint8)
    scales = np.abs(rng.standard_normal((num_workers, shape[0]))).astype(np.float32)
    carry, scale = arrays(rng, shape, oracle.keep(shape, None, shape[1] - 7))
    average = functools.partial(pallas_kernels.unpack_average, implementation="mosaic", length=shape[1] - 7)
    got = jax.jit(average)(bits, scales, carry, scale)
    want = oracle.sign_pack(oracle.average(bits, scales), carry, scale, length=shape[1] - 7)
    check(got, want, num_workers * scales.mean(axis=0)[:, None] + np.abs(carry) + scale[:, None])


def test_runs_agree_to_the_bit_and_the_carry_stays_where_it_is():
    shape = (4, 2**18)
    rng = np.random.default_rng(0)
    x, start = rng.standard_normal((2, *shape)).astype(np.float32)
    step = jax.jit(functools.partial(pallas_kernels.sign_pack, implementation="mosaic"), donate_argnames="carry")
    results = []
    for _ in range(3):
        carry = jnp.asarray(start)
        place = carry.unsafe_buffer_pointer()
        results.append(step(x, carry=carry, scale=np.ones(4, np.float32)))
        assert results[-1][0].unsafe_buffer_pointer() == place
    for result in results[1:]:
        for first, other in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(first, other)
