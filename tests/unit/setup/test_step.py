"""Pieces of the training step: norms per layer, clipping, what the loss counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.models.tree import ModelTree
from dsjax.optimizers.kinds.sgd import SGDConfig
from dsjax.setup.step import make_update, squared_norms
from tests.helpers import ONE, TINY, make_rows, make_training

SGD = SGDConfig(momentum=0.0, weight_decay=0.0)


def make_gradients(training, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.float32(rng.standard_normal(leaf.shape)), training.model.shapes)


def test_norms_are_per_layer():
    training = make_training(ONE, TINY, SGD)
    gradients = make_gradients(training)
    squares = squared_norms(training.model, gradients)
    kernel = np.float64(gradients["segments"][0][0]["mlp"]["up"]["kernel"])
    np.testing.assert_allclose(squares["segments"][0][0]["mlp"]["up"]["kernel"], (kernel**2).sum((1, 2)), rtol=1e-6)
    table = np.float64(gradients["embed"]["table"])
    np.testing.assert_allclose(squares["embed"]["table"], (table**2).sum(), rtol=1e-6)


def test_norms_are_per_expert():
    """Against a loop over single tensors: two layers of three experts, and one table."""
    gradients = {
        name: np.random.default_rng(0).standard_normal(shape)
        for name, shape in (("bank", (2, 3, 4, 5)), ("table", (6, 4)))
    }
    tree = ModelTree(None, None, None, {"bank": 2, "table": 0})
    squares = squared_norms(tree, jax.tree.map(jnp.float32, gradients))
    want = [[(gradients["bank"][layer, expert] ** 2).sum() for expert in range(3)] for layer in range(2)]
    np.testing.assert_allclose(squares["bank"], want, rtol=1e-6)
    np.testing.assert_allclose(squares["table"], (gradients["table"] ** 2).sum(), rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e6])
def test_clipping_scales_all_or_nothing(clip_norm):
    training = make_training(ONE, TINY, SGD)
    update = make_update(training.model, training.optimizer, "full", clip_norm=clip_norm, ema_decay=0.0)
    gradients, state = make_gradients(training), training.state()
    norm = np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(gradients)))
    new, metrics = jax.jit(update)(state, gradients, jnp.float32(1), jnp.float32(0.1))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
    scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
    for old, gradient, got in zip(*map(jax.tree.leaves, (state.params, gradients, new.params)), strict=True):
        # Differences of parameters of size 0.2, in float32.
        np.testing.assert_allclose(got - old, -0.1 * scale * gradient, atol=1e-7 + 1e-6 * 0.1 * scale)


def test_only_real_targets_count():
    """Rows cut anyhow: the loss is the mean over tokens, not the mean of rows' means; masked targets do not matter."""
    training = make_training(ONE, dataclasses.replace(TINY, dropout=0.0))
    rows = make_rows()
    losses = []
    for row in range(16):
        one = {name: value[row : row + 1] for name, value in rows.items()}
        sums = training.programs.evaluate(training.params(), one)
        loss, tokens = sums["loss"], sums["count"]
        losses.append((float(loss), int(tokens)))
    _, metrics = training.gradient(training.state(), rows, accumulation=4)
    total, tokens = np.sum(losses, axis=0)
    assert float(metrics["loss"]) == pytest.approx(total / tokens, rel=1e-6)
    assert float(metrics["loss"]) != pytest.approx(np.mean([s / max(n, 1) for s, n in losses]), rel=1e-3)
    others = {**rows, "targets": np.where(rows["loss_mask"], rows["targets"], 0)}
    assert float(training.gradient(training.state(), others, accumulation=4)[1]["loss"]) == float(metrics["loss"])


def test_dropout_changes_with_the_step_alone():
    training = make_training(ONE)
    state, rows = training.state(), make_rows()
    loss = lambda step, **parts: float(
        training.gradient(dataclasses.replace(state, step=jnp.int32(step)), rows, **parts)[1]["loss"]
    )
    assert loss(0) == loss(0) != loss(1)
    assert loss(0, accumulation=4) == pytest.approx(loss(0), rel=1e-6)
