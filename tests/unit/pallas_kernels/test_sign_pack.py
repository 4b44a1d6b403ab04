"""The XLA path of sign_pack, unpack_average and unpack against numpy in float64, and the protocol's invariants."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import sign_pack_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels

EPSILON = 2.0**-24  # a float32 rounding

cases = settings(max_examples=15, deadline=None)


@pytest.fixture
def unchecked():
    """Without the tests' checks of annotations, which would come before the op's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@st.composite
def problems(draw):
    """A generator, a shape [S, N] from a few (each compiles), a mask and a length."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(1, 8), (3, 104)]))
    mask = rng.random(shape) < 0.7 if draw(st.booleans()) else None
    length = draw(st.one_of(st.none(), st.integers(0, shape[1])))
    return rng, shape, mask, length


def traced(length: int | None) -> jax.Array | None:
    """A length as an operand: one program for all its values."""
    return None if length is None else jnp.int32(length)


def check(got, want, size: np.ndarray) -> None:
    """Against the oracle's carry, signs and squares; `size` bounds the summands of each element, [S, N]."""
    carry, bits, squares = map(np.asarray, got)
    # Three float32 operations, each off by half a unit of a number no larger than `size`.
    assert (np.abs(carry - want[0]) <= 4 * EPSILON * size).all()
    signs = np.unpackbits(bits, axis=1).astype(bool)
    np.testing.assert_array_equal(signs, carry >= 0)
    assert (signs == want[1])[np.abs(want[0]) > 4 * EPSILON * size].all()
    exact = (carry.astype(np.float64) ** 2).sum(axis=1)
    # Of float32's sum of at most 104 non-negative numbers.
    np.testing.assert_allclose(squares, exact, rtol=104 * EPSILON, atol=1e-30)
    assert (carry.dtype, bits.dtype, squares.dtype) == (np.float32, np.uint8, np.float32)


@cases
@given(problems(), st.sampled_from(["float32", "bfloat16"]))
def test_sign_pack_against_float64(problem, dtype):
    rng, shape, mask, length = problem
    x = jnp.asarray(rng.standard_normal(shape), dtype)
    scale = np.abs(rng.standard_normal(shape[0])).astype(np.float32)
    carry = np.where(oracle.keep(shape, mask, length), rng.standard_normal(shape), 0).astype(np.float32)
    got = jax.jit(pallas_kernels.sign_pack)(x, carry, scale, mask=mask, length=traced(length))
    want = oracle.sign_pack(np.asarray(x, np.float64), carry, scale, mask=mask, length=length)
    check(got, want, np.abs(np.asarray(x, np.float64)) + np.abs(carry) + scale[:, None])
    kept = oracle.keep(shape, mask, length)
    assert (np.asarray(got[0])[~kept] == 0).all() and np.unpackbits(np.asarray(got[1]), axis=1)[~kept].all()


@cases
@given(problems(), st.sampled_from([1, 3]))
def test_unpack_average_against_float64(problem, num_workers):
    rng, shape, mask, length = problem
    bits = rng.integers(0, 256, (num_workers, shape[0], shape[1] // 8), np.uint8)
    scales = np.abs(rng.standard_normal((num_workers, shape[0]))).astype(np.float32)
    scale = np.abs(rng.standard_normal(shape[0])).astype(np.float32)
    carry = np.where(oracle.keep(shape, mask, length), rng.standard_normal(shape), 0).astype(np.float32)
    got = jax.jit(pallas_kernels.unpack_average)(bits, scales, carry, scale, mask=mask, length=traced(length))
    want = oracle.sign_pack(oracle.average(bits, scales), carry, scale, mask=mask, length=length)
    check(got, want, num_workers * scales.mean(axis=0)[:, None] + np.abs(carry) + scale[:, None])


@cases
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]))
def test_unpack_inverts_packing_and_average_adds_in_the_workers_order(seed, num_workers):
    rng = np.random.default_rng(seed)
    signs = rng.random((num_workers, 2, 24)) < 0.5
    bits = np.packbits(signs, axis=2)
    scales = np.abs(rng.standard_normal((num_workers, 2))).astype(np.float32)
    out = np.asarray(jax.jit(pallas_kernels.unpack)(bits, scales))
    np.testing.assert_array_equal(out, oracle.unpack(bits, scales).astype(np.float32))
    np.testing.assert_array_equal(out.reshape(2, num_workers, 24) >= 0, signs.swapaxes(0, 1))
    share = scales / np.float32(num_workers)  # exact for powers of two, also where XLA multiplies by 1 / W
    in_order = np.zeros((2, 24), np.float32)
    for worker in range(num_workers):  # float32, to the bit
        in_order = in_order + np.where(signs[worker], share[worker, :, None], -share[worker, :, None])
    start = np.zeros((2, 24), np.float32), np.zeros(2, np.float32)
    np.testing.assert_array_equal(jax.jit(pallas_kernels.unpack_average)(bits, scales, *start)[0], in_order)


@cases
@given(problems())
def test_what_is_sent_and_the_last_error_telescope_to_what_was_given(problem):
    rng, shape, mask, length = problem
    kept = oracle.keep(shape, mask, length)
    count = np.maximum(kept.sum(axis=1), 1)
    step = jax.jit(pallas_kernels.sign_pack)
    carry, scale = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    given, sent = np.zeros(shape), np.zeros(shape)
    for _ in range(6):
        x = rng.standard_normal(shape).astype(np.float32)
        carry, bits, squares = step(x, carry, scale, mask=mask, length=traced(length))
        scale = np.sqrt(np.asarray(squares) / count).astype(np.float32)
        given += x
        sent += scale[:, None] * (np.unpackbits(np.asarray(bits), axis=1) * 2.0 - 1)
    left = oracle.error(np.asarray(carry), scale, kept)
    # Six times the rounding of three numbers that stay below about 8.
    assert np.abs(sent + left - given)[kept].max(initial=0) < 1e-5


def test_two_phases_are_the_all_reduce_of_the_definition():
    num_workers, length, shape, rng = 2, 75, (3, 80), np.random.default_rng(0)
    chunk = shape[1] // num_workers
    x = rng.standard_normal((num_workers, *shape)).astype(np.float32)
    zeros = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
    sent = [pallas_kernels.sign_pack(x[w], *zeros, length=length) for w in range(num_workers)]
    scales = jnp.stack([jnp.sqrt(squares / length) for _, _, squares in sent])
    bits = jnp.stack([bits for _, bits, _ in sent]).reshape(num_workers, shape[0], num_workers, chunk // 8)
    start = np.zeros((shape[0], chunk), np.float32), np.zeros(shape[0], np.float32)
    answers = [
        pallas_kernels.unpack_average(bits[:, :, j], scales, *start, length=min(chunk, length - j * chunk))
        for j in range(num_workers)
    ]
    total = jnp.sqrt(sum(squares for _, _, squares in answers) / length)
    result = pallas_kernels.unpack(jnp.stack([b for _, b, _ in answers]), jnp.stack([total] * num_workers))

    b = x[:, :, :length].astype(np.float64)
    s = np.sqrt((b**2).mean(axis=2, keepdims=True))
    a = (s * oracle.sgn(b)).mean(axis=0)
    want = np.sqrt((a**2).mean(axis=1, keepdims=True)) * oracle.sgn(a)
    np.testing.assert_allclose(np.asarray(result)[:, :length], want, rtol=1e-6)


def test_zeros_of_both_signs_count_as_positive():
    x = jnp.array([[0.0, -0.0] * 4])
    carry, bits, squares = pallas_kernels.sign_pack(x, jnp.zeros((1, 8)), jnp.zeros(1))
    assert bits.tolist() == [[255]] and squares.tolist() == [0.0] and not np.asarray(carry).any()


def good(**changes):
    """Arguments of sign_pack that fit, but for the changes."""
    return {"x": jnp.zeros((2, 16)), "carry": jnp.zeros((2, 16)), "scale": jnp.zeros(2)} | changes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (good(x=jnp.zeros(16)), r"x has the shape \(16,\): must be \[S, N\]"),
        (good(x=jnp.zeros((2, 12))), "x has 12 values in a tensor: must be a positive multiple of 8; pad with zeros"),
        (good(x=jnp.zeros((2, 16), "int32")), "x is int32: must be float32 or bfloat16"),
        (good(carry=jnp.zeros((2, 16), "bfloat16")), "carry is bfloat16: must be float32"),
        (good(carry=jnp.zeros((2, 8))), r"carry has the shape \(2, 8\): must be \(2, 16\)"),
        (good(scale=jnp.zeros((2, 1))), r"scale has the shape \(2, 1\): must be \(2,\)"),
        (good(mask=jnp.ones((2, 16))), "mask is float32: must be bool or int8"),
        (good(mask=jnp.ones(16, bool)), r"mask has the shape \(16,\): must be \(2, 16\)"),
        (good(length=17), "length is 17: must be between 0 and the 16 values"),
        (good(length=jnp.float32(3)), r"length is float32\[\]: must be an int or an int32 scalar"),
        (good(implementation="triton"), "implementation 'triton' of sign_pack: must be one of 'auto', 'xla', 'mosaic'"),
        (good(implementation="mosaic"), "needs a multiple of 512 values in a tensor, not 16: pad with zeros"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        pallas_kernels.sign_pack(**arguments)


@pytest.mark.usefixtures("unchecked")
def test_mistakes_in_bits_and_scales():
    bits, start = jnp.zeros((2, 3, 4), "uint8"), (jnp.zeros((3, 32)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"bits has the shape \(3, 4\): must be \[W, S, K // 8\]"):
        pallas_kernels.unpack_average(bits[0], jnp.zeros((2, 3)), *start)
    with pytest.raises(ValueError, match="bits is int8: must be uint8"):
        pallas_kernels.unpack_average(bits.astype("int8"), jnp.zeros((2, 3)), *start)
    with pytest.raises(ValueError, match=r"scales has the shape \(3,\): must be \(2, 3\)"):
        pallas_kernels.unpack(bits, jnp.zeros(3))
    with pytest.raises(ValueError, match="implementation 'mosaic' of unpack: must be one of 'auto', 'xla'"):
        pallas_kernels.unpack(bits, jnp.zeros((2, 3)), implementation="mosaic")


def test_auto_says_once_what_it_chose(caplog):
    from pallas_kernels import platform

    platform._say_once.cache_clear()
    with caplog.at_level("INFO", "pallas_kernels"):
        for _ in range(2):
            pallas_kernels.sign_pack(**good())
        pallas_kernels.sign_pack(**good(), implementation="xla")
    assert [record.getMessage() for record in caplog.records] == ["sign_pack: implementation 'auto' chose 'xla' on cpu"]


def test_carry_is_updated_in_place():
    shape = (4, 1024)
    arguments = jnp.ones(shape), jnp.zeros(shape), jnp.zeros(4)
    memory = jax.jit(pallas_kernels.sign_pack, donate_argnums=1).lower(*arguments).compile().memory_analysis()
    # Nothing of a tensor's size beside what goes in: the bits, the sums and a table of pointers come out fresh.
    assert memory.alias_size_in_bytes == 4 * 4096
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def test_what_is_masked_or_padding_need_not_be_finite():
    bad = jnp.array([[1.0, jnp.nan, -2.0, jnp.inf, 3.0, 0.0, jnp.nan, -jnp.inf]])
    mask = jnp.array([[1, 0, 1, 0, 1, 1, 1, 1]], jnp.int8)
    for length in (6, jnp.int32(6)):
        carry, bits, squares = pallas_kernels.sign_pack(bad, jnp.zeros((1, 8)), jnp.zeros(1), mask=mask, length=length)
        assert carry.tolist() == [[1.0, 0.0, -2.0, 0.0, 3.0, 0.0, 0.0, 0.0]]
        assert bits.tolist() == [[0b11011111]] and squares.tolist() == [14.0]
