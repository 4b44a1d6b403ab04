"""Attention against float64 numpy, with documents, ALiBi and both forms (fused and with dropped weights)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.layers.attention import Visibility, attend, document_mask
from dsjax.layers.dropout import sample_keys
from dsjax.layers.positions import alibi_bias, alibi_slopes

B, T, S, H, K = 2, 7, 7, 3, 4


def oracle(q, k, v, mask, bias):
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for t in range(q.shape[1]):
                seen = np.flatnonzero(mask[b, t])
                scores = q[b, t, h] @ k[b, seen, h].T / np.sqrt(q.shape[-1]) + bias[h, t, seen]
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, seen, h]
    return out


def make_inputs(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, T, H, K)) * 2 for _ in range(3)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_is_the_formula(packed, alibi):
    q, k, v = make_inputs()
    segments = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 2]])
    mask = np.tril(np.ones((T, T), bool))[None] & (segments[:, :, None] == segments[:, None, :])
    places, documents = np.arange(T), jnp.asarray(segments)
    slopes = alibi_slopes(H)[:, None, None] if alibi else np.zeros((H, 1, 1))
    distance = places[None, :] - places[:, None]
    want = oracle(q, k, v, mask if packed else np.tril(np.ones((B, T, T), bool)), slopes * distance)
    visibility = Visibility(
        document_mask(documents, documents, *[jnp.arange(T)] * 2) if packed else None,
        alibi_bias(H, jnp.arange(T)[None], jnp.arange(T)[None]) if alibi else None,
    )
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    # float32 against float64, values of size 5.
    np.testing.assert_allclose(attend(*arrays, visibility), want, atol=1e-5)
    keys = sample_keys(jax.random.key(0), jnp.int32(0), jnp.arange(B))
    # A rate that drops nothing takes the other form to the same result.
    np.testing.assert_allclose(attend(*arrays, visibility, dropout_keys=keys, dropout_rate=1e-9), want, atol=1e-5)


def test_dropped_weights_average_to_attention():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in make_inputs())
    visibility = Visibility(None, None)

    def once(number):
        keys = sample_keys(jax.random.key(1), number, jnp.arange(B))
        return attend(q, k, v, visibility, dropout_keys=keys, dropout_rate=0.3)

    draws = jax.jit(jax.vmap(once))(jnp.arange(4000))
    # The standard error of 4,000 draws of size about 2 is 0.03; five of them.
    np.testing.assert_allclose(draws.mean(0), attend(q, k, v, visibility), atol=0.15)
    assert float(draws.std(0)[:, 1:].min()) > 0.01


def test_a_query_that_sees_nothing_stays_finite():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in make_inputs())
    visibility = Visibility(jnp.zeros((B, 1, T, T), bool), None)
    gradient = jax.grad(lambda q: attend(q, k, v, visibility).sum())(q)
    assert bool(jnp.isfinite(attend(q, k, v, visibility)).all() & jnp.isfinite(gradient).all())


def test_slopes_of_any_number_of_heads():
    """Powers of two: a geometric sequence; otherwise the odd entries of the next one follow."""
    for heads in range(1, 130):
        power = 2 ** int(np.log2(heads))
        want = [2 ** (-8 * i / power) for i in range(1, power + 1)]
        longer = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1)]
        want += longer[0::2][: heads - power]
        np.testing.assert_allclose(alibi_slopes(heads), want, rtol=1e-6)


def test_alibi_of_far_positions_keeps_its_digits():
    """Distances are taken in integers: 2^24 + 1 has no float32, the distance 1 has."""
    far = jnp.array([2**24 + 1, 2**24 + 2])
    assert alibi_bias(2, far[1:], far).tolist() == alibi_bias(2, jnp.array([1]), jnp.array([0, 1])).tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_cudnn_takes_every_mask_under_the_vmap_of_the_step(packed, alibi, monkeypatch):
    """Traced only, which asks for no GPU, but for JAX's look at the version of cuDNN: its rule for vmap is Python."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    length, heads = 16, 2
    places = jnp.arange(length)

    def total(q, k, v, segments):
        mask = document_mask(segments, segments, places, places) if packed else None
        bias = alibi_bias(heads, places[None], places[None]) if alibi else None
        return attend(q, k, v, Visibility(mask, bias)).astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((3, 4, length, heads, 8), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((3, 4, length), jnp.int32)
    gradient = jax.vmap(jax.grad(total, argnums=(0, 1, 2)))
    assert "dot_product_attention_bwd" in str(jax.make_jaxpr(gradient)(q, q, q, segments))
    assert [each.shape for each in jax.eval_shape(gradient, q, q, q, segments)] == [q.shape] * 3
