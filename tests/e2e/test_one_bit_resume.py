"""Runs with compressed communication: stopped in any stage and resumed, also with fewer workers."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from e2e_runs import curve, interrupted, once, outcome, rows, train, write_config

from dsjax.checkpoint.store import CheckpointStore
from dsjax.cli.main import main
from dsjax.config.load import load_run
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.naming import to_named
from dsjax.runs.saving import restore
from dsjax.setup.assembly import assemble

MODEL = {
    "kind": "llama", "vocab_size": 264, "num_layers": 1, "model_dim": 16, "num_heads": 4, "tied_embedding": True,
    "segments": [1],
}  # fmt: skip
COMMON = {
    "mesh": {"data": 4, "fsdp": 1, "zero_stage": 3, "cpu_devices": 4},
    "model": MODEL,
    "evaluate": {"every": 0, "rows": 16},
    "checkpoint": {"every": 5, "keep_every": 5},
    "sample": {"prompt": ""},
}
ZERO_ONE = {
    "kind": "zero_one_adam", "learning_rate": 1e-2, "schedule": {"kind": "cosine"},
    "var_freeze_step": 6, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 4,
}  # fmt: skip
LEARNING = ["full", "full", "compressed", "full", "compressed", "compressed"]
STAGES = [*LEARNING, "first_sync", "sync", "local", "local", "local", "sync"]
ADAM = {"kind": "onebit_adam", "learning_rate": 1e-2, "schedule": {"kind": "cosine"}, "freeze_step": 3}
LAMB = {
    "kind": "onebit_lamb", "learning_rate": 1e-2, "schedule": {"kind": "cosine"},
    "freeze_step": 9, "freeze_tolerance": 9.0, "freeze_every": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def zero_one(shared, texts) -> Path:
    """A folder with a config and its run through all stages of 0/1 Adam. Not to be changed."""

    def make(folder: Path) -> None:
        folder.mkdir()
        config = write_config(folder / "config.yaml", texts, **COMMON, optimizer=ZERO_ONE, train={"steps": len(STAGES)})
        train(config, "--run-dir", folder / "run", "--force")

    return once(shared, "zero_one", make)


def test_stages_and_what_is_told_of_them(zero_one):
    found = rows(zero_one / "run")
    first = [STAGES.index(stage) + 1 for stage in dict.fromkeys(STAGES)]
    assert [row["step"] for row in found if "compiled" in row] == first
    assert [row["step"] for row in found if "worker_skips" in row] == [7, 8, 12]
    assert json.loads((zero_one / "run" / "summary.json").read_text())["steps"]["value"] == len(STAGES)


@pytest.mark.parametrize(
    "step", [pytest.param(5, id="compressed", marks=pytest.mark.slow), pytest.param(10, id="between syncs")]
)
def test_zero_one_adam_goes_on_as_if_nothing_had_been(tmp_path, zygote, zero_one, step):
    run = interrupted(zero_one / "run", tmp_path / "run", step=step)
    life = zygote.train(zero_one / "config.yaml", "--run-dir", run, "--resume")
    assert life.wait() == 0 and f"resumed from step {step} of" in life.said, life.said
    assert curve(run) == curve(zero_one / "run") and outcome(run) == outcome(zero_one / "run")


def restored(config: Path, run: Path, step: int, workers: int, told: list[str]) -> dict[str, np.ndarray]:
    """The tensors of a run's state on so many workers, from a checkpoint."""
    layout = Layout(make_mesh(MeshConfig(data=workers), devices=jax.devices()[:workers]))
    setup = assemble(load_run(config), layout=layout)
    segments, store = setup.model.segments, CheckpointStore(run / "checkpoints", setup.config.checkpoint)
    found = to_named(restore(store, step, setup.shapes, segments, told.append), segments)
    return {name: np.asarray(x) for name, x in found.items() if name != "key"}


FEWER = [part for one in ("mesh.data=2", "mesh.fsdp=2") for part in ("--set", one)]
WARNING = "the checkpoint is of 4 workers, this run has 2: errors of the one-bit mean begin at zero again"


@pytest.mark.slow
def test_onebit_adam_goes_on_with_fewer_workers(tmp_path, zygote, texts):
    """In its compressed stage: everything as it was, but for the errors."""
    whole, fewer, told = tmp_path / "whole", tmp_path / "fewer", []
    config = write_config(tmp_path / "config.yaml", texts, **COMMON, optimizer=ADAM, train={"steps": 8})
    life = zygote.train(config, "--run-dir", whole)
    assert life.wait() == 0, life.said
    four, two = (restored(config, whole, 5, workers, told) for workers in (4, 2))
    assert told == [WARNING] and four.keys() == two.keys()
    for name, x in two.items():
        if ".feedback." in name:
            assert not x.any() and four[name].any()
        else:
            assert np.array_equal(x, four[name]), name

    life = zygote.train(config, "--run-dir", interrupted(whole, fewer, step=5), "--resume", *FEWER)
    assert life.wait() == 0 and life.said.count(WARNING) == 1, life.said
    assert curve(fewer)[:5] == curve(whole)[:5]
    found, wanted = ([row["loss"] for row in rows(run)] for run in (fewer, whole))
    assert abs(found[5] - wanted[5]) < 1e-5 * wanted[5]  # the same parameters and rows
    assert found[4:] == sorted(found[4:], reverse=True)  # and on from there


def test_zero_one_adam_goes_on_with_fewer_workers(tmp_path, zygote, zero_one):
    """Between two syncs: from the mean of where the workers were."""
    config, told = zero_one / "config.yaml", []
    four, two = (restored(config, zero_one / "run", 10, workers, told) for workers in (4, 2))
    assert told == [WARNING] and four.keys() == two.keys()
    moved = 0
    for name, x in two.items():
        part, _, tensor = name.removeprefix("opt_state.").partition(".")
        if part == "params":
            shift = four[f"opt_state.displaced.shift.{tensor}"]
            np.testing.assert_allclose(x, four[name] + shift.mean(0, dtype=np.float64), rtol=0, atol=1e-6)
            moved += not np.array_equal(x, four[name])
        elif part == "feedback" or tensor.startswith(("shift.", "rates", "skipped")):
            assert not x.any() and (x.shape[0] == 2)
        elif tensor.startswith("mu."):
            np.testing.assert_allclose(x, np.stack([four[name].mean(0)] * 2), rtol=0, atol=1e-7)
        else:
            assert np.array_equal(x, four[name]), name
    assert moved > 5 and any(four[name].any() for name in four if ".feedback." in name)

    run = interrupted(zero_one / "run", tmp_path / "run", step=10)
    life = zygote.train(config, "--run-dir", run, "--resume", *FEWER, "--set", "train.steps=11")
    assert life.wait() == 0 and life.said.count(WARNING) == 1, life.said
    assert curve(run)[:10] == curve(zero_one / "run")[:10]
    (loss, there), other = [row["loss"] for row in rows(run)[9:]], rows(zero_one / "run")[10]["loss"]
    assert abs(there - other) < 0.1 * abs(there - loss)  # the same rows, elsewhere by a step that was averaged


def test_a_freeze_that_is_decided_during_the_run(tmp_path, zygote, texts):
    """1-bit LAMB: at step 4 the variance is compared with step 2's; step 6 is the last with its full gradient."""
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "config.yaml", texts, **COMMON, optimizer=LAMB, train={"steps": 9}
    )  # fmt: skip
    life = zygote.train(config, "--run-dir", run)
    assert life.wait() == 0, life.said
    assert life.said.count("step 4: the variance has settled; it is frozen after step 6") == 1, life.said
    assert [row["step"] for row in rows(run) if "compiled" in row] == [1, 6, 7]
    again = interrupted(run, tmp_path / "again", step=5)
    life = zygote.train(config, "--run-dir", again, "--resume")
    assert life.wait() == 0 and "resumed from step 5 of" in life.said, life.said
    assert curve(again) == curve(run) and outcome(again) == outcome(run)
    assert "the variance has settled" not in life.said

    told: list[str] = []
    four, two = (restored(config, run, 9, workers, told) for workers in (4, 2))
    assert len(told) == 1 and told[0].startswith("the checkpoint is of 4 workers, this run has 2: ")
    for name, x in two.items():
        if ".feedback." in name:
            assert not x.any() and four[name].any()
        else:
            assert np.array_equal(x, four[name]), name


def test_one_worker_and_a_longer_run(tmp_path, zygote, texts, capsys):
    """A freeze that is a share of the run stays where it was when the run is made longer."""
    run, one = tmp_path / "run", {**COMMON["mesh"], "data": 1, "cpu_devices": 1}
    optimizer = {"kind": "onebit_adam", "schedule": {"kind": "constant"}}
    config = write_config(
        tmp_path / "config.yaml", texts, **COMMON | {"mesh": one}, optimizer=optimizer, train={"steps": 3}
    )
    life = zygote.train(config, "--run-dir", run)
    assert life.wait() == 0, life.said
    assert life.said.count("warning: ") == 1
    assert "warning: mesh.data = 1: there is one worker, and nothing is compressed\n" in life.said
    assert [row["step"] for row in rows(run) if "compiled" in row] == [1, 3]
    longer = ["--resume", "--set", "train.steps=30", "--set", "mesh.cpu_devices=0", "--set", "mesh.data=8"]
    assert main(["train", str(config), "--run-dir", str(run), *longer]) == 2
    error = capsys.readouterr().err
    assert error.count("dsjax: error: ") == 1 and "optimizer.freeze_step: 2 -> 6\n" in error


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train.steps=5"], "optimizer.freeze_step = 9 is not before the end of the run, 5 steps"),
        (
            ["optimizer.granularity=layer"],
            "optimizer.granularity: want one of fused, tensor, group; got 'layer' (text)",
        ),
        (["optimizer={kind: adamw}", "train.steps=14"], "optimizer.kind: 'zero_one_adam' -> 'adamw'\n"),
    ],
    ids=["freeze", "granularity", "another optimizer"],
)
def test_what_cannot_be(tmp_path, zero_one, texts, capsys, sets, message):
    lamb = {**LAMB, "freeze_tolerance": 0.0}
    config = write_config(tmp_path / "config.yaml", texts, **COMMON, optimizer=lamb, train={"steps": 14})
    arguments = ["--run-dir", str(tmp_path / "run")]
    if "adamw" in sets[0]:
        config, arguments = zero_one / "config.yaml", ["--run-dir", str(zero_one / "run"), "--resume"]
    here = ["mesh.cpu_devices=0", "mesh.data=8", *sets]
    assert main(["train", str(config), *arguments, *[part for one in here for part in ("--set", one)]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsjax: error: ") and error.count("dsjax: error: ") == 1 and message in error
    assert not (tmp_path / "run").exists()
