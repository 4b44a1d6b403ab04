"""The numpy oracle, speaking DeepSpeed 0.19.6's dialect in float32, replays every recorded run: so it is right.

Flags, counters and schedules exactly; parameters, moments and coefficients to 1e-5 of the tensor's largest value at
that step, errors to 5e-6 of the scale of what was compressed (they may themselves be nothing but rounding); the results
of the collective alone to 1e-4, since its rounds span four decades and a scale carries the error of the largest. A sign
that flipped would show as a jump of twice the scale, far above either.
"""

import numpy as np
import optimizer_recordings as recordings
import pytest
from one_bit_oracle import PEER, AllReduce, OneBitAdam, OneBitLamb, ZeroOneAdam
from optimizer_recordings import ERRORS, TOLERANCE_ALONE, TOLERANCE_OF_ERRORS, assert_near
from oracle_replay import replay, replay_collective, scale_of_compressed


def state_of(optimizer, workers: int) -> dict[str, list]:
    """What the oracle has of each recorded name: tensors [W, ...], or numbers, per tensor."""
    everywhere = lambda xs: [np.broadcast_to(x, (workers, *x.shape)) for x in xs]
    if isinstance(optimizer, OneBitLamb):
        return {
            "param": everywhere(optimizer.params),
            "m": everywhere(optimizer.m),
            "v": everywhere(optimizer.v),
            "exp_avg_sq_fresh": everywhere(optimizer.w),
            "lamb_coeff_freeze": optimizer.C,
            "last_factor": optimizer.factors,
            "scaling_coeff": optimizer.scaling,
            "worker_error_flat": optimizer.average.worker_error,
            "server_error_flat": optimizer.average.server_error,
            "exp_avg_flat": everywhere([np.concatenate([*map(np.ravel, optimizer.m), optimizer.tail])])[0],
        }
    state = {
        "worker_error": [buffer.worker_error for buffer in optimizer.average.buffers],
        "server_error": [buffer.server_error for buffer in optimizer.average.buffers],
        "v": everywhere(optimizer.v),
    }
    if isinstance(optimizer, OneBitAdam):
        return state | {"param": everywhere(optimizer.params), "m": everywhere(optimizer.m)}
    return state | {"param": optimizer.params, "m": optimizer.m, "momentum_accumulator": optimizer.u}


def counters_of(optimizer) -> dict[str, float]:
    """Numbers of 0/1 Adam that all its tensors share."""
    if not isinstance(optimizer, ZeroOneAdam):
        return {}
    names = ("var_interval", "var_counter", "local_step_interval", "local_step_counter")
    return {name: vars(optimizer.schedule)[name] for name in names}


@pytest.mark.parametrize("path", recordings.runs(), ids=lambda path: path.stem)
def test_the_oracle_replays_a_recorded_run(path):
    check_run(recordings.Run(path))


def check_run(run: recordings.Run) -> None:
    compared = 0
    for t, (optimizer, kind) in enumerate(replay(run)):
        assert (kind in ("noop", "full")) == run.flag[t], f"step {t} was {kind}"
        own_t = optimizer.schedule.t if isinstance(optimizer, ZeroOneAdam) else optimizer.t
        assert own_t == run.step[t]
        if isinstance(optimizer, ZeroOneAdam):
            assert optimizer.schedule.frozen == run.frozen_after[t]
        else:
            assert (own_t >= optimizer.freeze_step) == run.frozen_after[t]
        if isinstance(optimizer, OneBitLamb) and optimizer.coefficients:
            assert_near(optimizer.coefficients, run.coefficients[t], f"coefficients at {t}")
        state, counters = state_of(optimizer, run.workers), counters_of(optimizer)
        for name, k, recorded in run.recorded(t):
            if name in counters:
                assert counters[name] == recorded, f"{name} at {t}"
            elif name == "lrs":
                assert_near(optimizer.lrs[0], recorded, f"lrs at {t}")
            elif name in state:
                own = state[name] if k is None else state[name][k]
                if name in ERRORS:
                    scale = scale_of_compressed(optimizer, name, k)
                    assert_near(own, recorded, f"{name} {k} at {t}", TOLERANCE_OF_ERRORS, largest=scale)
                else:
                    assert_near(own, recorded, f"{name} {k} at {t}")
            else:
                continue
            compared += 1
    assert compared >= 3 * run.steps


@pytest.mark.parametrize("path", recordings.collectives(), ids=lambda path: path.stem)
def test_the_oracle_replays_the_recorded_collective(path):
    record = recordings.load(path)
    sizes = [int(name.removeprefix("x_")) for name in record if name.startswith("x_")]
    assert sizes
    for n in sizes:
        for r, (average, result) in enumerate(replay_collective(record, n)):
            for i in range(average.num_workers):
                assert_near(result, record[f"y_{n}"][r, i], f"{n} values, round {r}, worker {i}", TOLERANCE_ALONE)
            for recorded, own, scale in (
                ("we", average.worker_error, average.worker_scale),
                ("se", average.server_error, average.server_scale),
            ):
                what = f"{recorded}, {n} values, round {r}"
                assert_near(own, record[f"{recorded}_{n}"][r], what, TOLERANCE_OF_ERRORS, largest=scale)


@pytest.mark.parametrize("path", recordings.collectives(), ids=lambda path: path.stem)
@pytest.mark.parametrize(("name", "value"), [("nan", np.nan), ("inf", np.inf), ("big", 1e30), ("zero", 0)])
def test_the_oracle_replays_what_is_not_finite(path, name, value):
    record = recordings.load(path)
    if f"sp_{name}_y" not in record:
        pytest.skip(f"no sp_{name} in {path.name}")
    y = record[f"sp_{name}_y"]
    x = np.full(y.shape, 0 if name == "zero" else 1, np.float32)
    # Where the value lay is seen only in the error that Inf left: NaN there, -Inf elsewhere.
    place = np.argmax(np.isnan(record["sp_inf_we"][0]))
    x[0, place] = value
    average = AllReduce(y.shape[1], y.shape[0], PEER)
    with np.errstate(invalid="ignore", over="ignore"):
        result = average(x)
    np.testing.assert_allclose(np.broadcast_to(result, y.shape), y, rtol=1e-6)
    size = average.worker_error.shape
    np.testing.assert_allclose(average.worker_error, record[f"sp_{name}_we"].reshape(size), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(average.server_error, record[f"sp_{name}_se"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["worker", "server"])
@pytest.mark.parametrize(
    "path", [path for path in recordings.runs() if recordings.Run(path).workers > 1], ids=lambda path: path.stem
)
def test_an_error_that_is_off_is_seen(path, which, monkeypatch):
    """One value of one compression off by 1e-5 of what was compressed: the replay fails there."""
    call, calls = AllReduce.__call__, []

    def off_once(self, *arguments):
        result = call(self, *arguments)
        calls.append(self)
        if len(calls) == 5:
            error, scale = (
                (self.worker_error, self.worker_scale) if which == "worker" else (self.server_error, self.server_scale)
            )
            error[0, 0] += 1e-5 * scale
        return result

    monkeypatch.setattr(AllReduce, "__call__", off_once)
    with pytest.raises(AssertionError, match=f"{which}_error.* off by"):
        check_run(recordings.Run(path))


def test_an_error_that_is_only_rounding_may_be_another_rounding():
    """In the first round of 64 values the servers owe 0.0007 of what they compressed: an ulp is 1e-4 of that."""
    record = recordings.load(recordings.FOLDER / "op_w2.npz")
    recorded, scale = record["se_64"][0], np.abs(record["y_64"][0]).max()
    assert np.abs(recorded).max() < 1e-3 * scale
    next_to_it = recorded + np.spacing(scale)
    assert_near(next_to_it, recorded, "one ulp", TOLERANCE_OF_ERRORS, largest=scale)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(recorded + np.float32(1e-5 * scale), recorded, "real", TOLERANCE_OF_ERRORS, largest=scale)
