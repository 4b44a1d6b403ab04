"""dsjax's 1-bit optimizers with parity="deepspeed-0.19.6", on W virtual devices, replay DeepSpeed's recorded runs.

Tolerances as in test_optimizer_recordings_oracle.py, which replays the same files with numpy. Only where a recorded
number is kept in another form is it translated: an error is the carry less its scale, dsjax begins errors anew at the
first step after the freeze and the peer at the end of the one before, and the counters of 0/1 Adam, which dsjax
computes from the step, are seen in what every step did.
"""

import functools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optimizer_recordings as recordings
import pytest
from jax.sharding import PartitionSpec as P
from optimizer_recordings import ERRORS, TOLERANCE_ALONE, TOLERANCE_OF_ERRORS, assert_near
from oracle_replay import replay, replay_collective, scale_of_compressed

from dsjax.collectives.one_bit import Feedback, Scheme, one_bit_mean
from dsjax.optimizers import onebit_adam, onebit_lamb, state_specs, worker_params, zero_one_adam
from tests.helpers import FAST

BUFFERS = (*ERRORS, "exp_avg_flat")  # what DeepSpeed keeps of the collective, also with one worker
OPTIMIZERS = {"adam": onebit_adam, "lamb": onebit_lamb, "zoadam": zero_one_adam}


def mesh_of(workers: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (workers,), ("data",), devices=jax.devices()[:workers], axis_types=(jax.sharding.AxisType.Auto,)
    )


def owed(carry: jax.Array, scale: jax.Array) -> jax.Array:
    """The error that a carry [S, N] and its scale [S] stand for."""
    return carry - jnp.where(carry >= 0, scale[:, None], -scale[:, None])


def seen(kind: str, params, state) -> dict:
    """What a worker has after a step, by recorded names: arrays for each tensor."""
    switch = state if kind == "zoadam" else state[0]
    inner = switch.inner
    errors = lambda carries, scales: [
        owed(carry.reshape(1, -1), scale.reshape(1))[0] for carry, scale in zip(carries, scales, strict=True)
    ]
    feedback = inner.feedback
    found = {"step": switch.step, "count": inner.count, "nu_count": inner.nu_count, "v": inner.nu}
    worker, server = errors(feedback.worker, feedback.worker_scale), errors(feedback.server, feedback.server_scale)
    found |= {"param": worker_params(params, state)}
    if kind == "zoadam":
        squeezed = jax.tree.map(lambda x: x[0], inner.displaced)
        found |= {"m": squeezed.mu, "momentum_accumulator": squeezed.shift, "lrs": squeezed.rates}
        return found | {"worker_error": worker, "server_error": server}
    if kind == "adam":
        return found | {"m": inner.mu, "worker_error": worker, "server_error": server}
    tail = jnp.zeros(0) if inner.tail is None else inner.tail
    return found | {
        "m": inner.mu,
        "exp_avg_sq_fresh": inner.nu_fresh,
        "lamb_coeff_freeze": inner.coefficient,
        "last_factor": inner.factor,
        "scaling_coeff": inner.scaling,
        "lamb_coeffs": jnp.stack(inner.last),
        "worker_error_flat": worker[0],
        "server_error_flat": server[0],
        "exp_avg_flat": jnp.concatenate([*(m.ravel() for m in inner.mu), tail]),
    }


@functools.cache
def replayed(path: Path) -> dict:
    """All steps of a run in one program: by recorded names, arrays [T, W, ...]."""
    run = recordings.Run(path)
    mesh = mesh_of(run.workers)
    early = 1 if run.lost_before else 0
    rates = jnp.asarray([run.lr[0]] * early + run.lr, jnp.float32)
    options = dict(run.arguments)
    if run.masks is not None:
        options["momentum_mask"] = run.masks
    if run.kind == "lamb":
        options["granularity"] = "group"
    with warnings.catch_warnings(action="ignore"):  # of one worker
        tx = OPTIMIZERS[run.kind](lambda step: rates[step], mesh=mesh, parity="deepspeed-0.19.6", **options)
    params = [jnp.asarray(p) for p in run.params]
    state = tx.init(params)
    gradients = [run.all_gradients(k).swapaxes(0, 1) for k in range(len(params))]
    gradients = [np.concatenate([np.zeros_like(g[:early]), g]) for g in gradients]

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), state_specs(state), P(None, "data")),
        out_specs=P(None, "data"),
        check_vma=False,
    )
    def program(params, state, gradients):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update([g[0] for g in gradients], state, params)
            params = [p + u for p, u in zip(params, updates, strict=True)]
            return (params, state), jax.tree.map(lambda x: x[None], seen(run.kind, params, state))

        return jax.lax.scan(step, (params, state), gradients)[1]

    compiled = jax.jit(program).lower(params, state, gradients).compile(FAST)
    return jax.tree.map(lambda x: np.asarray(x)[early:], compiled(params, state, gradients))


@pytest.mark.parametrize("path", recordings.runs(), ids=lambda path: path.stem)
def test_a_recorded_run_is_replayed(path):
    check_run(recordings.Run(path), replayed(path))


def check_run(run: recordings.Run, own: dict) -> None:
    oracle = replay(run)
    # A full step updates the variance; the lost one nothing.
    updates = np.diff(own["nu_count"][:, 0], prepend=0)
    lost = own["count"][:, 0] == 0
    np.testing.assert_array_equal((updates == 1) | lost, run.flag)
    np.testing.assert_array_equal(own["step"], np.tile(run.step[:, None], run.workers))
    compared = 0
    for t in range(run.steps):
        # How large what was compressed is, is not asked of what is tested.
        reference, _ = next(oracle)
        if run.kind == "lamb" and not lost[t]:
            assert_near(own["lamb_coeffs"][t, 0], run.coefficients[t], f"coefficients at {t}")
        freezes = run.kind == "zoadam" and run.frozen_after[t] and not run.frozen_after[t - 1]
        for name, k, recorded in run.recorded(t):
            if name not in own or (name in BUFFERS and run.workers == 1):
                continue
            value = own[name] if k is None or name == "lrs" else own[name][k]
            if name in ERRORS and freezes:
                assert not recorded.any()
            elif name in ERRORS:
                scale = scale_of_compressed(reference, name, k)
                assert_near(value[t], recorded, f"{name} {k} at {t}", TOLERANCE_OF_ERRORS, largest=scale)
            elif recorded.ndim:
                assert_near(value[t], recorded, f"{name} {k} at {t}")
            else:
                for worker in range(run.workers):
                    assert_near(value[t, worker], recorded, f"{name} {k} at {t}, worker {worker}")
            compared += 1
    assert compared >= 3 * run.steps


@pytest.mark.parametrize("name", ["worker_error", "server_error"])
def test_an_error_that_is_off_is_seen(name):
    """One value of one step off by 1e-5 of what was compressed."""
    path = next(path for path in recordings.runs() if recordings.Run(path).workers > 1)
    run, own = recordings.Run(path), replayed(path)
    last = run.steps - 1
    *_, (reference, _) = replay(run)
    errors = [value.copy() for value in own[name]]
    errors[0][last, 0, 0] += 1e-5 * scale_of_compressed(reference, name, 0)
    with pytest.raises(AssertionError, match=f"{name} 0 at {last}: off by"):
        check_run(run, {**own, name: errors})


@pytest.mark.parametrize("path", recordings.collectives(), ids=lambda path: path.stem)
def test_the_recorded_collective_is_replayed(path):
    """All sizes in one call, which the peer would need a call each for."""
    record = recordings.load(path)
    sizes = [int(name.removeprefix("x_")) for name in record if name.startswith("x_")]
    x = [record[f"x_{n}"] for n in sizes]
    workers = x[0].shape[1]
    scheme = Scheme(server_scale="chunk", deepspeed_padding=True)
    mesh = mesh_of(workers)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "data"), out_specs=P(None, "data"), check_vma=False)
    def program(x):
        def round(feedback, x):
            means, feedback = one_bit_mean(x, feedback, axis="data", num_workers=workers, scheme=scheme)
            errors = [[owed(*each) for each in zip(*pair, strict=True)] for pair in pairs(feedback)]
            return feedback, (means, *errors)

        pairs = lambda f: ((f.worker, f.worker_scale), (f.server, f.server_scale))
        return jax.lax.scan(round, Feedback.zeros([(1, n) for n in sizes], workers, scheme), x)[1]

    outputs = jax.jit(program).lower(x).compile(FAST)(x)
    (y, worker, server), every_round = outputs, range(len(x[0]))
    for n, *values in zip(sizes, y, worker, server, strict=True):
        for r, (reference, _) in zip(every_round, replay_collective(record, n), strict=True):
            own = dict(zip(("y", "we", "se"), values, strict=True))
            assert_near(own["y"][r], record[f"y_{n}"][r], f"y, {n} values, round {r}", TOLERANCE_ALONE)
            for name, scale in (("we", reference.worker_scale), ("se", reference.server_scale)):
                if workers > 1:
                    what = f"{name}, {n} values, round {r}"
                    assert_near(own[name][r], record[f"{name}_{n}"][r], what, TOLERANCE_OF_ERRORS, largest=scale)
