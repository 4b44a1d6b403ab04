"""Which tokens random-LTD keeps, and what it does to those that it does not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.layers.dropout import sample_keys
from dsjax.layers.random_ltd import Dropping, draw_kept, random_ltd

B = 3


@partial(jax.jit, static_argnums=0)
def make_keys(num_rows: int = B, *, seed: int = 0, step: int = 0):
    return sample_keys(jax.random.key(seed), jnp.int32(step), jnp.arange(num_rows))


@partial(jax.jit, static_argnames=("num_kept", "num_positions"))
def make_indices(keys, *, num_kept: int, num_positions: int, length: int, kept: int):
    """What the layers 1 and 2 keep."""
    dropping = Dropping(keys, range(1, 3), num_kept, length=length, kept=kept)
    return dropping.indices(jnp.arange(1, 3), num_positions)


_draw = jax.jit(draw_kept, static_argnums=1, static_argnames="num_positions")


# Few shapes, so that few programs are compiled; what varies freely inside them is traced.
@settings(max_examples=150, deadline=None)
@given(st.sampled_from([(1, 1), (7, 4), (8, 8), (33, 16)]), st.integers(0, 2**31 - 1), st.data())
def test_kept_positions_are_sorted_distinct_and_real(shape, seed, data):
    num_positions, num_kept = shape
    length = data.draw(st.integers(1, num_positions))
    kept = data.draw(st.integers(0, num_kept + 2))
    drawn = np.asarray(_draw(make_keys(seed=seed), num_kept, num_positions=num_positions, length=length, kept=kept))
    assert drawn.shape == (B, num_kept) and drawn.dtype == np.int32
    assert (np.diff(drawn, axis=1) > 0).all()
    count = min(kept, length, num_kept)
    assert (drawn[:, :count] < length).all() and (drawn[:, :count] >= 0).all()
    assert (drawn[:, count:] == num_positions + np.arange(count, num_kept)).all()


def test_every_set_of_positions_is_equally_likely():
    """k = 3 of 6 positions, two of which are not real: the 4 sets, a chi-square test; then how often each is kept."""
    draws = 12_000
    sets = np.asarray(_draw(make_keys(draws), 4, num_positions=6, length=4, kept=3))[:, :3]
    counts = np.unique(sets, axis=0, return_counts=True)[1]
    assert len(counts) == 4
    # Three degrees of freedom: one in a million draws is above 30.7.
    assert ((counts - draws / 4) ** 2 / (draws / 4)).sum() < 30.7
    kept = np.zeros((draws, 50))
    many = np.asarray(_draw(make_keys(draws, seed=1), 24, num_positions=50, length=47, kept=20))[:, :20]
    np.put_along_axis(kept, many, 1, axis=1)
    share = 20 / 47
    z = (kept.mean(0)[:47] - share) / np.sqrt(share * (1 - share) / draws)
    assert np.abs(z).max() < 5 and not kept[:, 47:].any()
    # Two positions together: k (k - 1) / (s (s - 1)) of the rows, without replacement.
    together = 20 * 19 / (47 * 46)
    pairs = (kept.T @ kept / draws)[np.triu_indices(47, 1)]
    assert np.abs((pairs - together) / np.sqrt(together * (1 - together) / draws)).max() < 6


def test_layers_samples_and_steps_draw_independent_sets():
    """Of 2 x 1,000 sets of 32 among 64 the expected overlap is 16, whatever it is that tells them apart."""
    rows = 1000
    draw = partial(make_indices, num_kept=32, num_positions=64, length=64, kept=32)
    first, second = np.asarray(draw(make_keys(rows)))
    (next_step, _) = np.asarray(draw(make_keys(rows, step=1)))
    kept = lambda drawn: (drawn[:, :, None] == np.arange(64)).any(1)
    variance = 32 * 0.5 * 0.5 * 32 / 63  # hypergeometric
    for other in (second, np.roll(first, 1, axis=0), next_step):
        overlap = (kept(first) & kept(other)).sum(1)
        assert abs(overlap.mean() - 16) < 5 * np.sqrt(variance / rows)
        assert 0.8 < overlap.var() / variance < 1.2


def test_a_sample_keeps_its_tokens_wherever_it_is():
    """In another place of the batch, or in a bucket of more slots, a row's set is the same."""
    draw = partial(make_indices, num_positions=32, length=20, kept=6)
    whole = draw(make_keys(), num_kept=8)
    np.testing.assert_array_equal(draw(make_keys()[::-1], num_kept=8), whole[:, ::-1])
    np.testing.assert_array_equal(draw(make_keys(), num_kept=16)[:, :, :6], whole[:, :, :6])


def test_dropped_tokens_and_their_gradients_pass_bit_by_bit():
    """The library's form, around a layer that mixes the tokens it gets; 5 of 6 slots are in use."""
    rng = np.random.default_rng(1)
    x, out = rng.standard_normal((2, B, 16, 8)).astype(np.float32)
    weights = rng.standard_normal((8, 8)).astype(np.float32)

    def forward(x):
        layer = lambda tokens, positions: jnp.tanh(tokens @ weights) + tokens.sum(1, keepdims=True)
        return random_ltd(x, layer, keys=make_keys(), num_kept=6, length=14, kept=5)

    y, gradient = jax.jit(lambda x: (forward(x), *jax.vjp(forward, x)[1](out)))(x)
    indices = np.asarray(_draw(make_keys(), 6, num_positions=16, length=14, kept=5))
    x, out = np.asarray(x, np.float64), np.asarray(out, np.float64)
    for row, at in enumerate(indices[:, :5]):
        rest = np.setdiff1d(np.arange(16), at)
        np.testing.assert_array_equal(y[row, rest], x[row, rest].astype(np.float32))
        np.testing.assert_array_equal(gradient[row, rest], out[row, rest].astype(np.float32))
        inner = np.tanh(x[row, at] @ np.asarray(weights, np.float64))
        np.testing.assert_allclose(y[row, at], inner + x[row, at].sum(0), atol=1e-5)
        by_hand = (out[row, at] * (1 - inner**2)) @ np.asarray(weights, np.float64).T + out[row, at].sum(0)
        np.testing.assert_allclose(gradient[row, at], by_hand, atol=1e-5)


@pytest.mark.parametrize("num_kept", [0, 9])
def test_more_slots_than_positions_are_refused(num_kept):
    with pytest.raises(ValueError, match=f"num_kept must be in 1..8, the row's positions; got {num_kept}"):
        draw_kept(make_keys(), num_kept, num_positions=8)
