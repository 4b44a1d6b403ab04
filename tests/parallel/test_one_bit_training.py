"""1-bit optimizers in `dsjax train`'s programs: every stage, bad gradients, clipping, other layouts.

Their arithmetic is compared with the oracle in test_one_bit_optimizers.py; here it is what lies between: the stages one
after the other, a worker whose gradient is not finite, which norm clips, and that neither the mesh nor the cutting of
the stack of layers changes anything.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from one_bit_oracle import OURS, OneBitAdam

from dsjax.mesh.config import MeshConfig
from dsjax.models.families.build import segments_of
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.optimizers.config import OptimizerConfig
from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
from dsjax.optimizers.kinds.onebit_lamb import OneBitLambConfig
from dsjax.optimizers.kinds.zero_one_adam import ZeroOneAdamConfig
from dsjax.setup.state import TrainState
from tests.helpers import Training, assert_close, from_flat, make_params, make_rows, make_training

SMALL = LlamaConfig(
    vocab_size=64, num_layers=2, model_dim=40, num_heads=4, mlp_dim=64, tied_embedding=True, segments=(2,)
)
ONLY = ("embed.table", "out.kernel", "norm.scale")
FOUR = MeshConfig(data=4)
ZERO_ONE = ZeroOneAdamConfig(
    var_freeze_step=4, var_update_scaler=1, local_step_scaler=1, local_step_clipper=4, weight_decay=0.1
)
LAMB = OneBitLambConfig(freeze_step=2, weight_decay=0.1)
CLIP = 0.5
RATE = 1e-2


def training_of(optimizer: OptimizerConfig, mesh: MeshConfig = FOUR) -> Training:
    return make_training(mesh, SMALL, optimizer, clip_norm=CLIP, steps=40, only=ONLY)


def drawn(training: Training, seed: int, *, bad: int | None = None) -> dict[str, np.ndarray]:
    """Gradients [W, ...] by name, float32, of another size on each worker; Inf in one value of the worker `bad`."""
    rng = np.random.default_rng(seed)
    workers, params = training.layout.mesh.shape["data"], make_params(SMALL)
    names = sorted(name for name in params if name.endswith(ONLY))
    found = {}
    for name in names:
        own = rng.standard_normal((workers, *params[name].shape)) + rng.standard_normal(params[name].shape)
        found[name] = (own * 0.02 * (1 + np.arange(workers)).reshape(-1, *[1] * params[name].ndim)).astype(np.float32)
    if bad is not None:
        found[names[1]][bad, 3] = np.inf
    return found


def placed(training: Training, named: dict[str, np.ndarray]) -> Any:
    """Gradients by name as an update wants them."""
    workers = training.layout.mesh.shape["data"]
    each = [
        from_flat({name: g[i] for name, g in named.items()}, training.model.shapes, segments_of(training.config))
        for i in range(workers)
    ]
    specs = training.model.specs(training.layout.gradient)
    return jax.tree.map(
        lambda spec, *parts: jax.device_put(np.stack(parts), training.layout.named(jax.P("data", *spec))), specs, *each
    )


def step(
    training: Training, state: TrainState, stage: str, gradients: dict[str, np.ndarray]
) -> tuple[TrainState, dict]:
    """A step of a stage: the state after it (the given one is donated), and figures."""
    loss = np.ones(training.layout.mesh.shape["data"]) if stage in training.optimizer.local else 1.0
    state, metrics = training.update(state, placed(training, gradients), loss, learning_rate=RATE, stage=stage)
    return state, jax.device_get(metrics)


def on_host(state: TrainState) -> Any:
    """What a step that is skipped leaves as it was."""
    return jax.device_get((state.params, state.opt_state))


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.all(jax.tree.map(np.array_equal, got, want))


def assert_workers_agree(tree: Any) -> None:
    """Arrays that call themselves replicated are so, to the last bit."""
    for leaf in jax.tree.leaves(tree):
        parts = {}
        for shard in leaf.addressable_shards:
            parts.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        assert all(np.array_equal(part, same[0]) for same in parts.values() for part in same)


def norm(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """The norm of each worker's gradient, float64 [W]."""
    squares = [np.square(g.astype(np.float64)).reshape(len(g), -1).sum(1) for g in gradients.values()]
    return np.sqrt(np.sum(squares, axis=0))


def test_clipping_and_bad_gradients_in_every_stage():
    """0/1 Adam on four workers, from full steps to steps alone and the next sync."""
    training = training_of(ZERO_ONE)
    named, state = training.named, training.state()

    # Full: by the norm of the mean.
    g = drawn(training, 0)
    mean = {name: x.mean(0, keepdims=True, dtype=np.float64) for name, x in g.items()}
    state, metrics = step(training, state, "full", g)
    np.testing.assert_allclose(metrics["grad_norm"], norm(mean)[0], rtol=1e-5)
    assert norm(mean)[0] > 2 * CLIP and metrics["finite"]
    share = CLIP / norm(mean)[0]
    mu = named(state.opt_state.displaced.mu)
    assert_close({k: x[1] for k, x in mu.items()}, {k: 0.1 * share * x[0] for k, x in mean.items()}, 1e-5, what="full")
    before = on_host(state)
    state, metrics = step(training, state, "full", drawn(training, 1, bad=2))
    assert not metrics["finite"] and metrics["first_bad"] >= 0
    assert_same(on_host(state), before)

    # Compressed, right after it: by the root mean square of the workers' norms. What a worker sends is its gradient.
    g = drawn(training, 2)
    state, metrics = step(training, state, "compressed", g)
    together = np.sqrt(np.mean(norm(g) ** 2))
    np.testing.assert_allclose(metrics["grad_norm"], together, rtol=1e-5)
    carry = {k: x.reshape(4, -1)[:, : g[k][0].size] for k, x in named(state.opt_state.feedback.worker).items()}
    assert_close(carry, {k: CLIP / together * x.reshape(4, -1) for k, x in g.items()}, 1e-5, what="compressed")
    before = on_host(state)
    state, metrics = step(training, state, "compressed", drawn(training, 3, bad=1))
    assert not metrics["finite"] and metrics["first_bad"] >= 0
    assert_same(on_host(state), before)

    # Alone: each by its own norm, and a bad gradient stops its own worker only.
    state, metrics = step(training, state, "first_sync", drawn(training, 4))
    assert metrics["worker_skips"] == 0 and metrics["finite"].tolist() == [True] * 4
    before = on_host(state)
    good, bad = drawn(training, 5), drawn(training, 5, bad=2)
    states = {}
    for which, g in (("good", good), ("bad", bad)):
        state = TrainState(step=np.int32(5), params=before[0], opt_state=before[1], key=jax.random.key(5))
        states[which], metrics = step(training, jax.device_put(state, training.shardings), "local", g)
        np.testing.assert_allclose(metrics["grad_norm"][[0, 1, 3]], norm(good)[[0, 1, 3]], rtol=1e-5)
    assert metrics["finite"].tolist() == [True, True, False, True]
    assert (metrics["first_bad"] >= 0).tolist() == [False, False, True, False]
    old, done, other = (x.displaced for x in (before[1], on_host(states["good"])[1], on_host(states["bad"])[1]))
    mu = {
        k: 0.9 * x + 0.1 * (CLIP / norm(good)).reshape(-1, *[1] * (x.ndim - 1)) * good[k]
        for k, x in named(old.mu).items()
    }
    assert_close(named(done.mu), mu, 1e-5, what="local")
    for what in ("mu", "shift"):
        was, good_, bad_ = (named(vars(x)[what]) for x in (old, done, other))
        for name in was:
            assert np.array_equal(bad_[name][2], was[name][2])
            assert np.array_equal(bad_[name][[0, 1, 3]], good_[name][[0, 1, 3]])
            assert not np.array_equal(good_[name][2], was[name][2])
    assert (other.rates > 0).tolist() == [True, True, False, True] and other.skipped.tolist() == [0, 0, 1, 0]
    assert_same(on_host(states["bad"])[0], before[0])

    # The count travels with the sync, together with that of the sync's own step.
    state, metrics = step(training, states["bad"], "sync", drawn(training, 6, bad=0))
    assert metrics["worker_skips"] == int(state.opt_state.skipped) == 2
    assert metrics["finite"].tolist() == [False, True, True, True]
    assert_workers_agree((state.params, state.opt_state.nu))
    displaced = jax.device_get(state.opt_state.displaced)
    assert all(not np.any(x) for x in jax.tree.leaves((displaced.shift, displaced.rates, displaced.skipped)))
    assert all(np.array_equal(x[0], x[i]) for x in named(displaced.mu).values() for i in range(4))


def test_clip_local_is_the_oracles():
    """1-bit Adam from its config: two full steps, then two in which every worker clips by its own norm, in float64."""
    training = training_of(OneBitAdamConfig(freeze_step=2, clip="local", weight_decay=0.0))
    state, first = training.state(), make_params(SMALL)
    names = sorted(drawn(training, 0))

    def oracle(clip_by: Any) -> OneBitAdam:
        rules = dataclasses.replace(OURS, clip=CLIP, clip_by=clip_by)
        return OneBitAdam([first[name] for name in names], num_workers=4, freeze_step=2, rules=rules)

    local, mean = oracle("local"), oracle("mean")
    for seed, stage in enumerate(["full", "full", "compressed", "compressed"]):
        gradients = drawn(training, seed)
        assert (norm(gradients) > CLIP).all(), "every worker clips"
        state, metrics = step(training, state, stage, gradients)
        assert metrics["finite"]
        for adam in (local, mean):
            adam.step([gradients[name] for name in names], lr=RATE)
        # Float32 against float64, as in test_one_bit_optimizers.py; a sign that rounding decides would show as a jump.
        assert_close(training.named(state.params), dict(zip(names, local.params, strict=True)), 2e-5, what=stage)
        assert_close(training.named(state.opt_state.mu), dict(zip(names, local.m, strict=True)), 2e-5, what=stage)
    assert all(np.abs(a - b).max() > 0.1 * np.abs(b).max() for a, b in zip(local.m, mean.m, strict=True))


@pytest.mark.slow
def test_lamb_is_the_same_on_other_meshes_and_cut_otherwise():
    """Coefficients by layer, moments and parameters, and the steps that are skipped at and after the freeze."""
    stages = [("freeze", None), ("freeze", 1), *[("compressed", None)] * 3, ("compressed", 0), ("compressed", None)]
    apart = dataclasses.replace(SMALL, segments=(1, 1))
    found = {}
    for name, mesh, config in (
        ("data", MeshConfig(data=2), SMALL),
        ("unrolled", MeshConfig(data=2), apart),
        ("all", MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3), SMALL),
    ):
        training = make_training(mesh, config, LAMB, clip_norm=CLIP, steps=40, only=ONLY)
        state, coefficients = training.state(), []
        for seed, (stage, bad) in enumerate(stages):
            before = on_host(state)
            state, metrics = step(training, state, stage, drawn(training, seed, bad=bad))
            assert metrics["finite"] == (bad is None)
            assert_workers_agree((state.params, state.opt_state.mu, state.opt_state.nu))
            if bad is not None and stage == "freeze":
                # Nothing moves, but what the freeze is for is done.
                (params, old), (now, new) = before, on_host(state)
                assert_same((now, new.mu, new.nu, new.count), (params, old.mu, old.nu, old.count))
                assert_same(new.nu_fresh, old.nu)
                assert not np.allclose(jax.tree.leaves(new.scaling)[0], 1)
            elif bad is not None:
                assert_same(on_host(state), before)
            coefficients.append(training.named(state.opt_state.last))
        names = ("params", "mu", "nu_fresh")
        trees = (state.params, state.opt_state.mu, state.opt_state.nu_fresh)
        found[name] = coefficients, {k: training.named(tree) for k, tree in zip(names, trees, strict=True)}
    coefficients, tensors = found["data"]
    assert len({round(float(c), 5) for c in coefficients[-1].values()}) > 4
    for name in ("unrolled", "all"):
        for one, other in zip(found[name][0], coefficients, strict=True):
            assert one.keys() == other.keys()
            for tensor in one:
                np.testing.assert_allclose(one[tensor], other[tensor], rtol=1e-5, err_msg=f"{name}: {tensor}")
        for what, tree in tensors.items():
            assert_close(found[name][1][what], tree, 1e-5, what=f"{name}: {what}")


def test_all_stages_of_a_run_compile_once_and_workers_agree():
    """Twelve steps as a run does them: the programs of a stage's first step serve all later ones."""
    training = training_of(ZERO_ONE)
    programs, optimizer, state = training.programs.with_frozen(training.frozen), training.optimizer, training.state()
    stages = [optimizer.stage(number, None) for number in range(12)]
    assert set(stages) == set(optimizer.updates)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        for number, stage in enumerate(stages):
            batch = training.place(make_rows(seed=number))
            inputs = programs.gradient_inputs(optimizer, stage, state, batch)
            gradients, metrics = programs.gradient_for(optimizer, stage)(inputs)
            state, _ = programs.updates[stage](state, gradients, metrics["loss"], np.float32(RATE / (1 + number)))
            if stage not in optimizer.no_collectives:
                assert_workers_agree((state.params, state.opt_state.nu))
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    local = training.programs.local
    assert local is not None
    assert [p._cache_size() for p in (training.programs.gradient, local, *programs.updates.values())] == [1] * 7
