"""Whole training steps on meshes: the ZeRO stages, clipping, accumulation, per-worker gradients, skipped steps, EMA.

Adam's eps is 1e-4 where meshes are compared: with 1e-8 it turns the rounding of gradients that are zero (key biases)
into full steps.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsjax.mesh.report import path_name
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.optimizers.kinds.lamb import LambConfig
from dsjax.optimizers.kinds.sgd import SGDConfig
from dsjax.setup.placement import evaluation_placement
from tests.helpers import MESHES, ONE, TINY, assert_close, make_params, make_rows, make_training

ADAMW = AdamWConfig(eps=1e-4)
# Parameters after three steps: rounding differs by mesh and is carried along; a wrong step is off by 1e-1.
TOLERANCE = 2e-5
CLIP = 0.2


@functools.cache
def trained(mesh_name: str | None, optimizer=ADAMW, accumulation: int = 1):
    """Losses, gradient norms and parameters of three steps that are all clipped."""
    training = make_training(MESHES[mesh_name] if mesh_name else ONE, TINY, optimizer, clip_norm=CLIP)
    state, history = training.train(training.state(), 3, accumulation=accumulation)
    losses = np.array([metrics["loss"] for metrics in history])
    norms = np.array([metrics["grad_norm"] for metrics in history])
    assert all(metrics["finite"] for metrics in history)
    assert (norms > CLIP).all()
    return losses, norms, training.named(state.params)


@pytest.mark.parametrize(
    ("mesh_name", "optimizer"),
    [
        *((name, ADAMW) for name in ("data", "expert", "zero1", "all")),
        ("all", LambConfig(eps=1e-4)),
        *(pytest.param(name, ADAMW, marks=pytest.mark.slow) for name in ("fsdp", "tensor")),  # "all" cuts both axes
    ],
)
def test_three_steps_are_those_of_one_device(mesh_name, optimizer):
    losses, norms, params = trained(mesh_name, optimizer, accumulation=2)
    want_losses, want_norms, want_params = trained(None, optimizer)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-5)
    assert_close(params, want_params, TOLERANCE, what=mesh_name)
    assert max(np.abs(params[name] - value).max() for name, value in make_params(TINY).items()) > 1e-2


def test_every_zero_stage_is_among_the_meshes():
    assert {mesh.zero_stage for mesh in MESHES.values()} == {0, 1, 2, 3}
    assert {MESHES[name].zero_stage for name in ("data", "expert", "zero1", "all")} == {0, 1, 2, 3}


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_gives_the_large_batch(accumulation):
    losses, norms, params = trained(None, accumulation=accumulation)
    want_losses, want_norms, want_params = trained(None)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-6)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-5)
    assert_close(params, want_params, TOLERANCE, what=f"accumulation {accumulation}")


@pytest.mark.parametrize("mesh_name", [pytest.param("data", marks=pytest.mark.slow), "all"])
def test_per_worker_gradients_average_to_the_gradient(mesh_name):
    mesh = MESHES[mesh_name]
    mean, each = make_training(mesh, TINY, ADAMW, clip_norm=CLIP), make_training(mesh, TINY, ADAMW, per_worker=True)
    state = mean.state()
    want, metrics = mean.gradient(state, make_rows(), accumulation=2)
    got, worker_figures = each.gradient(state, make_rows(), accumulation=2)
    assert all(leaf.shape[0] == mesh.data for leaf in jax.tree.leaves(got))
    averaged = each.named(jax.tree.map(lambda g: g.mean(0), jax.device_get(got)))
    assert_close(averaged, mean.named(want), 1e-5, what="mean over workers")
    np.testing.assert_allclose(worker_figures["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(np.mean(worker_figures["worker_loss"]), metrics["loss"], rtol=1e-6)
    # The masks are very unequal: so are the workers.
    assert np.ptp(worker_figures["worker_loss"]) > 0.1


def poisoned(gradients, name: str, value: float):
    """The gradients with one element of one tensor replaced."""
    put = lambda path, leaf: leaf.at[(0,) * leaf.ndim].set(value) if path_name(path) == name else leaf
    assert name in [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradients)]
    return jax.tree_util.tree_map_with_path(put, gradients)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value):
    training = make_training(MESHES["all"], TINY, ADAMW, clip_norm=CLIP, ema_decay=0.9)
    state, _ = training.train(training.state(), 1, accumulation=2)
    before = jax.device_get(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    gradients, metrics = training.gradient(state, make_rows(), accumulation=2)
    bad = poisoned(poisoned(gradients, "segments/0/0/mlp/up/kernel", value), "segments/0/0/mlp_norm/bias", value)
    new, more = training.update(state, bad, metrics["loss"])
    after = jax.device_get(dataclasses.replace(new, key=jax.random.key_data(new.key)))
    assert not more["finite"]
    names = training.model.tensor_names()
    assert names[int(more["first_bad"])] == "layers.0.mlp.up.kernel"
    assert after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, step=before.step), before)


def test_a_loss_that_is_not_finite_changes_nothing():
    training = make_training(ONE, TINY, ADAMW, clip_norm=CLIP)
    state = training.state()
    before = training.named(state.params)
    gradients, _ = training.gradient(state, make_rows())
    state, more = training.update(state, gradients, np.nan)
    assert not more["finite"] and int(more["first_bad"]) == -1  # the loss, and no tensor
    assert_close(training.named(state.params), before, 0, what="skipped")
    assert int(state.step) == 1


def test_a_batch_of_padding_alone_does_nothing_bad():
    training = make_training(ONE, TINY, ADAMW, clip_norm=CLIP)
    rows = make_rows()
    rows["loss_mask"] = np.zeros_like(rows["loss_mask"])
    rows["segments"] = np.zeros_like(rows["segments"])
    gradients, metrics = training.gradient(training.state(), rows)
    assert float(metrics["loss"]) == 0 and int(metrics["tokens"]) == 0
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))


def test_moving_average_of_parameters():
    """ema <- decay ema + (1 - decay) params after each step, in float64; it starts from the initial parameters."""
    training = make_training(MESHES["all"], TINY, ADAMW, clip_norm=CLIP, ema_decay=0.9)
    state = training.state()
    want = {name: value.astype(np.float64) for name, value in training.named(state.params).items()}
    for _ in range(3):
        state, _ = training.train(state, 1, accumulation=2)
        now = training.named(state.params)
        want = {name: 0.9 * value + 0.1 * now[name] for name, value in want.items()}
    # A few float32 roundings.
    assert_close(training.named(state.ema), want, 1e-6, what="ema")


@pytest.mark.parametrize("mesh_name", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("fsdp", "tensor")), "all"])
def test_fresh_parameters_are_the_same_bits_on_every_mesh(mesh_name):
    here, one = make_training(MESHES[mesh_name]), make_training(ONE)
    want, got = one.fresh_state(seed=3), here.fresh_state(seed=3)
    assert_close(here.named(got.params), one.named(want.params), 0, what=mesh_name)
    np.testing.assert_array_equal(jax.random.key_data(got.key), jax.random.key_data(want.key))
    spread = {name: value.std() for name, value in one.named(want.params).items() if name.endswith(("kernel", "table"))}
    assert all(0.005 < std < 0.03 for std in spread.values())


def test_evaluation_is_the_loss_without_dropout_on_every_mesh():
    rows, results = make_rows(), []
    for mesh in (ONE, MESHES["all"]):
        training = make_training(mesh)
        batch = evaluation_placement(training.layout, batch_size=16)(rows)
        sums = training.programs.evaluate(training.params(), batch)
        loss, tokens = sums["loss"], sums["count"]
        assert int(tokens) == rows["loss_mask"].sum()
        results.append(float(loss))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


STACKS = {"scanned": (3,), "segmented": (1, 2), "unrolled": (1, 1, 1)}
OPTIMIZERS = {"adamw": ADAMW, "lamb": LambConfig(eps=1e-4), "sgd": SGDConfig()}


PAIRS = [(stack, optimizer) for stack in ("segmented", "unrolled") for optimizer in OPTIMIZERS]
FAST = [("segmented", "adamw"), ("unrolled", "lamb")]


@pytest.mark.parametrize(
    ("stack", "optimizer"), [pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow]) for pair in PAIRS]
)
def test_stacks_train_identically(stack, optimizer):
    """Whether layers are scanned or not, and in which runs, changes rounding only, tensor by tensor by name."""
    ends = []
    for segments in (STACKS["scanned"], STACKS[stack]):
        config = dataclasses.replace(TINY, num_layers=3, segments=segments)
        training = make_training(ONE, config, OPTIMIZERS[optimizer], clip_norm=CLIP)
        state, history = training.train(training.state(), 3)
        ends.append((training.named(state.params), [metrics["loss"] for metrics in history]))
    np.testing.assert_allclose(ends[1][1], ends[0][1], rtol=1e-6)
    assert_close(ends[1][0], ends[0][0], TOLERANCE, what=f"{stack}, {optimizer}")


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_recomputing_changes_nothing(remat):
    """Dropout included: its masks are drawn again from the same keys. Stage 3 has a policy of its own for 'none'."""
    plain = make_training(ONE)
    want, _ = plain.gradient(plain.state(), make_rows())
    training = make_training(MESHES["fsdp"], dataclasses.replace(TINY, remat=remat))
    got, _ = training.gradient(training.state(), make_rows(), accumulation=2)
    assert_close(training.named(got), plain.named(want), 1e-5, what=remat)
