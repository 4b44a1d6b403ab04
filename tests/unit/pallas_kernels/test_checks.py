"""The cases for a GPU find a kernel that is wrong: here the reference with one thing changed stands in for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.checks import all_checks
from pallas_kernels.sign_pack import api, check, reference

SHAPE = (2, 64)
CHANGES = {
    "nothing": lambda carry, bits, squares: (carry, bits, squares),
    "a rounding": lambda carry, bits, squares: (carry * (1 + 2.0**-24), bits, squares),
    "a value": lambda carry, bits, squares: (carry.at[1, 5].multiply(1 + 1e-5), bits, squares),
    "a bit": lambda carry, bits, squares: (carry, bits.at[1, 5].set(bits[1, 5] ^ 4), squares),
    "a square": lambda carry, bits, squares: (carry, bits, squares * (1 + 1e-4)),
    "not a number": lambda carry, bits, squares: (carry.at[0, 0].set(jnp.nan), bits, squares),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_kernel_is_found(change):
    rng = np.random.default_rng(0)
    x, carry = (jnp.asarray(array, jnp.float32) for array in rng.standard_normal((2, *SHAPE)))
    scale = jnp.ones(SHAPE[0])

    def op(x, carry, scale, *, implementation):
        right = reference.feed_back(x, carry, scale, mask=None, length=None)
        return right if implementation == "xla" else CHANGES[change](*right)

    error = check._error(op, jnp.abs(x) + jnp.abs(carry) + 1, x, carry, scale)
    assert (error <= 1) == (change in ("nothing", "a rounding"))


def test_unpack_agrees_with_its_definition_and_a_wrong_one_is_found(monkeypatch):
    [case] = [each for each in all_checks() if each.name == "unpack [2, 3, 1024]"]
    assert case.error() == 0
    monkeypatch.setattr(api, "unpack", lambda bits, scales: reference.unpack(bits[:, :, ::-1], scales))
    assert case.error() == float("inf")
