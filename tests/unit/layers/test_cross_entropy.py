"""The loss over the vocabulary and its hand-written gradient against float64 numpy, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.layers import cross_entropy
from dsjax.layers.cross_entropy import summed_loss, token_losses

B, T, D, V = 3, 12, 8, 20


def make_inputs():
    rng = np.random.default_rng(0)
    x, table = 3 * rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    return x, table, rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.6


def oracle(x, table, targets, mask):
    """Losses [B, T], and the gradients of the masked sum, in float64."""
    z = x @ table.T
    chances = np.exp(z - z.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    losses = -np.log(np.take_along_axis(chances, targets[..., None], -1))[..., 0]
    delta = (chances - np.eye(V)[targets]) * mask[..., None]
    return losses, delta @ table, np.einsum("btv,btd->vd", delta, x)


@pytest.mark.parametrize("chunk_elements", [1 << 26, 200, 1])
def test_loss_and_gradients(monkeypatch, chunk_elements):
    """1: as many chunks as positions; 200: four."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, jax.default_backend(), chunk_elements)
    x, table, targets, mask = make_inputs()
    losses, x_gradient, table_gradient = oracle(x, table, targets, mask)
    arrays = jnp.float32(x), jnp.float32(table)

    # The factor stands for what comes after the loss.
    def scaled(x, table):
        return 0.25 * summed_loss(x, table, targets, mask)

    value, (got_x, got_table) = jax.jit(jax.value_and_grad(scaled, (0, 1)))(*arrays)
    assert float(value) == pytest.approx(0.25 * losses[mask].sum(), rel=1e-6)
    # float32 sums of 20 to 36 terms of size 1.
    np.testing.assert_allclose(got_x, 0.25 * x_gradient, atol=2e-6)
    np.testing.assert_allclose(got_table, 0.25 * table_gradient, atol=1e-5)
    np.testing.assert_allclose(token_losses(*arrays, targets), losses, atol=5e-6)
    assert float(summed_loss(*arrays, targets, mask)) == pytest.approx(losses[mask].sum(), rel=1e-6)


def test_a_mask_of_nothing():
    x, table, targets, mask = make_inputs()
    arrays = jnp.float32(x), jnp.float32(table)
    value, gradients = jax.value_and_grad(summed_loss, (0, 1))(*arrays, targets, mask & False)
    assert float(value) == 0 and all(not np.asarray(g).any() for g in gradients)


def test_large_logits_do_not_overflow():
    x, table = jnp.full((1, 1, 2), 300.0), jnp.array([[300.0, 300.0], [0.0, 0.0]])
    assert token_losses(x, table, jnp.array([[0]])).tolist() == [[0.0]]
    assert token_losses(x, table, jnp.array([[1]])).tolist() == [[180000.0]]


def test_bfloat16_gradients_have_their_inputs_types():
    x, table, targets, mask = make_inputs()
    arrays = jnp.bfloat16(x), jnp.bfloat16(table)
    value, (got_x, got_table) = jax.value_and_grad(summed_loss, (0, 1))(*arrays, targets, mask)
    assert value.dtype == jnp.float32 and got_x.dtype == got_table.dtype == jnp.bfloat16
    rounded = [np.asarray(a, np.float64) for a in arrays]
    losses, x_gradient, table_gradient = oracle(*rounded, targets, mask)
    # Logits are float32 sums of exact products; the gradients are rounded to 8 bits twice.
    assert float(value) == pytest.approx(losses[mask].sum(), rel=1e-5)
    np.testing.assert_allclose(np.float64(got_x), x_gradient, atol=0.02 * np.abs(x_gradient).max())
    np.testing.assert_allclose(np.float64(got_table), table_gradient, atol=0.02 * np.abs(table_gradient).max())
