"""What top-k, top-p, min-p and the repetition penalty leave, against the definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.models.sampling import Sampling, choose, penalise, restrict

ROWS, VOCAB = 3, 11


def kept(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """Tokens of one row that may be drawn, by the definition: sort, cut after k, cut after p, cut below min-p."""
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or len(logits)]
    chances = np.exp((logits[order] - logits.max()) / sampling.temperature)
    before = np.cumsum(chances / chances.sum()) - chances / chances.sum()
    likely = chances >= sampling.min_p * chances.max()
    return {
        int(token) for token, mass, keep in zip(order, before, likely, strict=True) if mass < sampling.top_p and keep
    }


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([0.05, 0.35, 0.8, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 0.77, 1.0]),
)
def test_what_is_left_is_the_definition(seed, temperature, top_k, top_p, min_p):
    # Logits that no two tokens share, none at a boundary of rounding.
    logits = np.random.default_rng(seed).permutation(np.arange(VOCAB * ROWS)).reshape(ROWS, VOCAB) / 7
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
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
    draw = jax.vmap(lambda number: choose(logits, jax.random.split(jax.random.key(number), 2), sampling))
    draws = np.asarray(draw(jnp.arange(20000)))
    want = np.asarray(jax.nn.softmax(restrict(logits, sampling), axis=-1))
    for row in range(2):
        # 20,000 draws: the standard error is at most 0.0036; five of them.
        np.testing.assert_allclose(np.bincount(draws[:, row], minlength=4) / 20000, want[row], atol=0.018)
    # Rows draw independently.
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.035


def test_temperature_zero_is_greedy():
    logits = jnp.array([[0.0, 3.0, 1.0], [4.0, 3.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert choose(logits, keys, Sampling()).tolist() == [1, 0]
    assert choose(logits, keys, Sampling(temperature=1.0, top_k=1)).tolist() == [1, 0]
    assert choose(logits, keys, Sampling(temperature=1.0, top_p=1e-6)).tolist() == [1, 0]
    assert choose(logits, keys, Sampling(temperature=1.0, min_p=1.0)).tolist() == [1, 0]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), penalty=st.sampled_from([0.5, 1.3, 4.0]))
def test_the_penalty_is_that_of_transformers(seed, penalty):
    rng = np.random.default_rng(seed)
    logits, rows = rng.normal(size=(ROWS, VOCAB)).astype(np.float32), rng.integers(0, VOCAB, (ROWS, 5))
    want, seen = logits.copy(), np.zeros((ROWS, VOCAB), bool)
    for row, tokens in enumerate(rows):
        for token in set(tokens.tolist()):  # torch.gather, where(score < 0, score * p, score / p), scatter
            score = logits[row, token]
            want[row, token] = score * np.float32(penalty) if score < 0 else score / np.float32(penalty)
            seen[row, token] = True
    got = np.asarray(penalise(jnp.asarray(logits), jnp.asarray(seen), penalty))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), ROWS)
    chosen = choose(jnp.asarray(logits), keys, Sampling(repetition_penalty=penalty), seen_BV=jnp.asarray(seen))
    np.testing.assert_array_equal(chosen, want.argmax(1))


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=r"temperature and top_k must be 0 or more, top_p in \(0, 1\]"):
        Sampling(**bad)


@pytest.mark.parametrize("bad", [{"min_p": -0.1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}])
def test_newer_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=r"min_p must be in \[0, 1\], repetition_penalty above 0"):
        Sampling(**bad)
