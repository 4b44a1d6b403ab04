"""What top-k and top-p leave, against the definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.models.sampling import Sampling, choose, restrict

ROWS, VOCAB = 3, 11


def kept(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """Tokens of one row that may be drawn, by the definition: sort, cut after k, cut after p."""
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or len(logits)]
    chances = np.exp((logits[order] - logits.max()) / sampling.temperature)
    before = np.cumsum(chances / chances.sum()) - chances / chances.sum()
    return {int(token) for token, mass in zip(order, before, strict=True) if mass < sampling.top_p}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.05, 0.35, 0.8, 0.99, 1.0]),
)
def test_what_is_left_is_the_definition(seed, temperature, top_k, top_p):
    # Logits that no two tokens share, none at a boundary of rounding.
    logits = np.random.default_rng(seed).permutation(np.arange(VOCAB * ROWS)).reshape(ROWS, VOCAB) / 7
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    left = np.asarray(restrict(jnp.float32(logits), sampling))
    for row in range(ROWS):
        finite = set(np.flatnonzero(np.isfinite(left[row])).tolist())
        assert finite == kept(logits[row], sampling)
        assert int(logits[row].argmax()) in finite
        some = sorted(finite)
        np.testing.assert_allclose(left[row, some], logits[row, some] / temperature, rtol=1e-6)


def test_draws_follow_the_restricted_distribution():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 5.0]])
    sampling = Sampling(temperature=2.0, top_k=3)
    draw = jax.vmap(lambda number: choose(logits, jax.random.fold_in(jax.random.key(0), number), sampling))
    draws = np.asarray(draw(jnp.arange(20000)))
    want = np.asarray(jax.nn.softmax(restrict(logits, sampling), axis=-1))
    for row in range(2):
        # 20,000 draws: the standard error is at most 0.0036; five of them.
        np.testing.assert_allclose(np.bincount(draws[:, row], minlength=4) / 20000, want[row], atol=0.018)
    # Rows draw independently.
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.035


def test_temperature_zero_is_greedy():
    logits = jnp.array([[0.0, 3.0, 1.0], [4.0, 3.0, 1.0]])
    assert choose(logits, jax.random.key(0), Sampling()).tolist() == [1, 0]
    assert choose(logits, jax.random.key(0), Sampling(temperature=1.0, top_k=1)).tolist() == [1, 0]
    assert choose(logits, jax.random.key(0), Sampling(temperature=1.0, top_p=1e-6)).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=r"temperature and top_k must be 0 or more, top_p in \(0, 1\]"):
        Sampling(**bad)
