"""Classification and masked tokens on meshes: what eight devices compute is what one does, however a batch is cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.models.families.bert.config import BertConfig
from dsjax.setup.placement import evaluation_placement
from tests.helpers import MESHES, ONE, assert_close, batch_loss, make_params, make_rows, make_training

SIZES = {"vocab_size": 64, "num_layers": 2, "model_dim": 32, "num_heads": 8, "mlp_dim": 64, "max_positions": 16}
MODELS = {
    "classification": BertConfig(**SIZES, task="classification", num_labels=3, dropout=0.1, segments=(2,)),
    "masked": BertConfig(**SIZES, dropout=0.1, segments=(2,)),
}
# Gradients in float32: only the order of sums differs between meshes.
TOLERANCE = 1e-5


def rows_of(task: str) -> dict[str, np.ndarray]:
    """Sixteen rows: packed and very unequally hidden, or texts of 1 to 16 tokens in pairs."""
    packed = make_rows()
    if task == "masked":
        return packed
    rng = np.random.default_rng(1)
    lengths = np.arange(1, 17)[:, None]
    real = np.arange(16) < lengths
    return {
        "tokens": packed["tokens"] * real,
        "segments": real.astype(np.int32),
        "token_types": (real & (np.arange(16) >= lengths // 2)).astype(np.int32),
        "labels": rng.integers(0, 3, 16).astype(np.int32),
        "loss_mask": np.ones(16, bool),
    }


@functools.cache
def gradient(task: str, mesh_name: str | None, accumulation: int = 1, per_worker: bool = False):
    training = make_training(MESHES[mesh_name] if mesh_name else ONE, MODELS[task], per_worker=per_worker)
    got, metrics = training.gradient(training.state(), rows_of(task), accumulation=accumulation)
    if per_worker:
        got = jax.tree.map(lambda g: g.mean(0), jax.device_get(got))
    named = training.named(got)
    # The same number added to all of a query's scores changes no softmax: only rounding is left of these gradients.
    rounding = [named.pop(name) for name in list(named) if name.endswith("attention.k.bias")]
    assert rounding and all(np.abs(values).max() < 1e-6 for values in rounding)
    return named, jax.device_get(metrics)


@pytest.mark.parametrize(
    ("task", "mesh_name", "per_worker"),
    [
        pytest.param("classification", "all", False, marks=pytest.mark.slow),
        ("masked", "all", False),
        ("classification", "expert", True),
    ],
)
def test_eight_devices_are_one(task, mesh_name, per_worker):
    want, want_figures = gradient(task, None)
    got, metrics = gradient(task, mesh_name, 2, per_worker)
    np.testing.assert_allclose(metrics["loss"], want_figures["loss"], rtol=1e-6)
    assert metrics["tokens"] == want_figures["tokens"] == rows_of(task)["loss_mask"].sum()
    assert_close(got, want, TOLERANCE, what=f"{task} on {mesh_name}")


def test_the_loss_of_a_classifier_is_the_mean_over_rows_in_float64():
    config = dataclasses.replace(MODELS["classification"], dropout=0.0)
    training, rows = make_training(ONE, config), rows_of("classification")
    model = nnx.merge(training.model.graph, training.params(make_params(config)))
    z = np.asarray(model(jnp.asarray(rows["tokens"]), jnp.asarray(rows["segments"]),
                         token_types=jnp.asarray(rows["token_types"])), np.float64)  # fmt: skip
    losses = np.log(np.exp(z).sum(1)) - z[np.arange(16), rows["labels"]]
    loss, count = batch_loss(model, {name: jnp.asarray(value) for name, value in rows.items()})
    assert count == 16
    np.testing.assert_allclose(loss, losses.sum(), rtol=1e-6)
    # What is in the padding does not matter, and rows that do not exist count nothing.
    other = {**rows, "tokens": np.where(rows["segments"] > 0, rows["tokens"], 7)}
    np.testing.assert_allclose(batch_loss(model, other)[0], losses.sum(), rtol=1e-6)
    fewer = {**rows, "loss_mask": np.arange(16) < 5}
    np.testing.assert_allclose(batch_loss(model, fewer)[0], losses[:5].sum(), rtol=1e-6)
    placed = evaluation_placement(training.layout, batch_size=16)(fewer)
    sums = jax.device_get(training.programs.evaluate(training.params(), placed))
    assert sums["count"] == 5 and sums["accuracy"] == (z.argmax(1) == rows["labels"])[:5].sum()
