"""Dropout by sample, and LayerNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.layers.context import Context
from dsjax.layers.dropout import dropout, fold, sample_keys
from dsjax.layers.norm import Norm

RUN = jax.random.key(0)


def test_as_many_elements_are_dropped_as_asked_for():
    keys = sample_keys(RUN, jnp.int32(3), jnp.arange(8))
    for rate in (0.1, 0.5, 0.9):
        out = np.asarray(dropout(jnp.ones((8, 5000)), keys, rate=rate))
        # 40,000 draws: the standard error is at most 0.0025.
        assert (out == 0).mean() == pytest.approx(rate, abs=0.0125)
        np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-6)
        # And each row by itself.
        assert np.abs((out == 0).mean(1) - rate).max() < 0.035


def test_a_rows_mask_depends_on_its_number_alone():
    """In another order and in parts, the same rows get the same masks; other rows, steps, sites and runs do not."""
    x, step, rows = jnp.ones((6, 64)), jnp.int32(3), jnp.arange(6)
    drop = lambda keys, x=x: np.asarray(dropout(x, keys, rate=0.5))
    whole = drop(sample_keys(RUN, step, rows))
    np.testing.assert_array_equal(drop(sample_keys(RUN, step, rows[::-1])), whole[::-1])
    np.testing.assert_array_equal(drop(sample_keys(RUN, step, rows[4:]), x[4:]), whole[4:])
    others = [
        drop(sample_keys(RUN, step + 1, rows)),
        drop(sample_keys(jax.random.key(1), step, rows)),
        drop(fold(sample_keys(RUN, step, rows), 0)),
        drop(fold(sample_keys(RUN, step, rows), 1)),
        np.roll(whole, 1, axis=0),
    ]
    for other in others:
        # Independent masks agree in half of the 384 places; five standard errors.
        assert (other == whole).mean() == pytest.approx(0.5, abs=0.13)


def test_no_keys_no_dropout():
    x = jnp.arange(6.0).reshape(2, 3)
    assert fold(None, 3) is None
    assert dropout(x, None, rate=0.5) is x
    assert dropout(x, sample_keys(RUN, jnp.int32(0), jnp.arange(2)), rate=0.0) is x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_is_the_formula(dtype):
    """Statistics in float32 also for bfloat16 inputs; a large mean costs no digits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 5, 32)) + 50, dtype)
    norm = Norm(32, "layer", eps=1e-5)
    scale, bias = rng.standard_normal(32), rng.standard_normal(32)
    norm.scale[...], norm.bias[...] = jnp.float32(scale), jnp.float32(bias)
    exact = np.asarray(x, np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    got = norm(x, Context())
    assert got.dtype == x.dtype
    # float32: rounding of the mean, 50 * 6e-8, beside a spread of 1; bfloat16: the result's 8 bits.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=5e-5 if dtype == "float32" else 0.03)
