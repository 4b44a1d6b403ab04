"""The end of a run: what would fail there is refused before the first step, what fails all the same costs itself alone,
and what a command recommends next works."""

import json
import shlex
import shutil
import signal
import struct
import sys
from pathlib import Path

import jax
import pytest
from e2e_runs import HALF, STEPS, checkpoints, curve, interrupted, outcome, rows, write_config

import dsjax.train
from dsjax.cli.main import main
from dsjax.config.load import load_run
from dsjax.evaluate.validation import Validation
from dsjax.plan.plan import plan

HERE = ["--set", "mesh.cpu_devices=0"]  # in pytest's own process the devices are there already
GPT2 = {"kind": "gpt2", "vocab_size": 264, "num_layers": 2, "model_dim": 16, "num_heads": 8, "max_positions": 64}


def refused(capsys, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("dsjax: error: ") and "Traceback" not in err and "step 1/" not in out
    return err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": GPT2, "sample": {"prompt": "a", "max_new_tokens": 100}}, "need 101 positions, but the model has 64"),
        ({"sample": {"prompt": "a", "max_new_tokens": 0}}, "sample: max_new_tokens must be at least 1"),
        ({"evaluate": {"rows": -1}}, "evaluate.rows = -1 must be 0 or more"),
        ({"name": "../elsewhere"}, "name is that of a folder in runs/, and '../elsewhere' holds '/'; leave that out"),
    ],
    ids=["positions", "sample", "validation", "name"],
)
def test_refused_before_the_first_step_by_train_and_plan(tmp_path, texts, capsys, monkeypatch, changes, message):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # `plan` sets it
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "run.yaml", texts, **changes)
    assert message in refused(capsys, "train", config, *HERE)
    assert message in refused(capsys, "plan", config)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_refused_before_the_text_is_read(tmp_path, texts, config, reference, capsys, monkeypatch):
    gone = ["--set", f"data.sources.0.path={tmp_path / 'gone'}", *HERE]
    assert "holds a run already" in refused(capsys, "train", config, "--run-dir", reference, *gone)
    (tmp_path / "file").write_text("mine")
    said = refused(capsys, "train", config, "--run-dir", tmp_path / "file" / "run", *gone)
    assert f"the run cannot be written to {tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is not a folder" in said
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1024))
        said = refused(capsys, "train", config, "--run-dir", tmp_path / "run", *gone)
    assert "at a time, but" in said and "has 1.00 KiB free: make room, keep fewer (checkpoint.keep_last" in said
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    said = refused(capsys, "train", config, "--run-dir", tmp_path / "run", "--set", "observe.tensorboard=true", *gone)
    assert "observe.tensorboard needs the package tensorboardX, which is not installed" in said
    assert not (tmp_path / "run").exists()


def test_the_size_of_a_checkpoint_is_predicted(config, reference):
    described = json.loads((reference / "checkpoints" / f"step_{STEPS:08d}" / "tensors.json").read_text())
    size = 0
    for shape, dtype in described.values():
        count = 1
        for length in shape:
            count *= length
        size += count * (8 if dtype.startswith("key") else 4)
    assert plan(load_run(config)).checkpoint == size


def test_what_fails_at_the_end_costs_itself_alone(tmp_path, zygote, texts, reference):
    """loss.png cannot be written: the summary says so, the exit code too, and --resume tries it again.

    On a console that has no character for the sample, nor for the run's name and folder.
    """
    run = interrupted(reference, tmp_path / "naïve run")
    changed = write_config(tmp_path / "run.yaml", texts, name="naïve", sample={"prompt": "thé", "max_new_tokens": 8})
    (run / "loss.png").mkdir()
    life = zygote.train(changed, "--run-dir", run, "--resume", encoding="ascii")
    assert life.wait() == 1, life.said
    assert "warning: loss.png failed: " in life.said and "Traceback" not in life.said
    assert "sample: th\\xe9" in life.said and "na\\xefve" in life.said
    summary = json.loads((run / "summary.json").read_text())
    assert checkpoints(run) == checkpoints(reference) and summary["sample"]["value"].startswith("thé")
    (failure,) = summary.pop("failed")["value"]
    assert failure.startswith("loss.png failed: ")

    (run / "loss.png").rmdir()
    life = zygote.train(changed, "--run-dir", run, "--resume")
    assert life.wait() == 0, life.said
    assert (run / "loss.png").stat().st_size > 1000 and "sample: thé" in life.said
    found, wanted = outcome(run), outcome(reference)
    assert {**found, "sample": ""} == {**wanted, "sample": ""}
    # What only the process that trained could measure is still there.
    again = json.loads((run / "summary.json").read_text())
    assert again.keys() == summary.keys() and again["tokens_per_second"] == summary["tokens_per_second"]


def test_the_last_evaluation_and_the_sample_run_out_of_memory(tmp_path, texts, capsys, monkeypatch):
    config = load_run(write_config(tmp_path / "run.yaml", texts), ["mesh.cpu_devices=0", "train.steps=2"])
    out_of_memory = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.\nmore")

    def fail(*arguments, **options):
        raise out_of_memory

    monkeypatch.setattr(Validation, "__call__", fail)
    monkeypatch.setattr("dsjax.inference.sample.generate_text", fail)
    run = tmp_path / "my run"
    result = dsjax.train.run(config, run_dir=run)
    why = "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."
    evaluation, sample = result.failures
    assert evaluation == f"the last evaluation failed: {why}"
    assert sample.startswith(f"the sample failed: {why}; draw it by: dsjax generate ")
    assert checkpoints(run) == [2] and result.summary == json.loads((run / "summary.json").read_text())
    assert result.summary["steps"]["value"] == 2 and "validation_loss" not in result.summary
    assert result.summary["failed"]["value"] == list(result.failures)
    said = capsys.readouterr().out
    assert f"warning: {evaluation}\n" in said and f"warning: {sample}\n" in said
    # The command that is recommended draws the sample.
    monkeypatch.undo()
    words = shlex.split(sample.partition("draw it by: ")[2])
    assert words[0] == "dsjax" and main(words[1:]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_what_evaluation_cannot_do_shows_before_the_first_step(tmp_path, texts, monkeypatch):
    config = load_run(write_config(tmp_path / "run.yaml", texts), ["mesh.cpu_devices=0", "evaluate.every=0"])

    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Validation, "rehearse", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        dsjax.train.run(config, run_dir=tmp_path / "run")
    assert rows(tmp_path / "run") == []


def events(run: Path) -> dict[int, dict[str, float]]:
    """Step -> figures as TensorBoard shows them: a later file that begins anew at a step hides what lay behind it."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[int, dict[str, float]] = {}
    for file in sorted((run / "tensorboard").iterdir()):
        data = file.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + (length := struct.unpack("<Q", data[:8])[0]):
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {step: row for step, row in found.items() if step < event.step}
            for value in event.summary.value:
                found.setdefault(event.step, {})[value.tag] = value.simple_value
    return found


@pytest.mark.slow
def test_killed_stopped_and_resumed_as_recommended_the_trackers_have_every_step(tmp_path, zygote, texts, reference):
    """In a folder whose name has a blank; with a warm-up that is longer than the run."""
    pytest.importorskip("tensorboardX")
    slow, steps = {"schedule": {"kind": "cosine", "warmup": 120}}, 72  # so many that no signal comes after the last
    settings = {"observe": {"tensorboard": True}, "optimizer": slow, "train": {"steps": steps}}
    config = write_config(tmp_path / "run.yaml", texts, **settings)
    run = tmp_path / "my run"
    life = zygote.train(config, "--run-dir", run)
    life.until(lambda: len(rows(run)) >= HALF + 1)
    life.kill()
    assert life.wait() == -9
    warning = (
        "optimizer.schedule.warmup = 120 steps is longer than the run, 72 steps: the learning rate only gets to 60%"
    )
    assert life.said.count(f"warning: {warning}") == 1
    saved = checkpoints(run)[-1]
    assert saved >= HALF - 3 and set(range(1, saved + 1)) <= events(run).keys()

    life = zygote.train(config, "--run-dir", run, "--resume")
    life.until(lambda: f"/{steps}  loss" in life.said)  # its first steps are taken: rows come several at a time
    life.kill(signal.SIGTERM)
    assert life.wait() == 75, life.said
    (command,) = [line.partition("to go on: ")[2] for line in life.said.splitlines() if "to go on: " in line]
    words = shlex.split(command)
    assert words[:2] == ["dsjax", "train"] and Path(words[2]) == run / "config.yaml"
    life = zygote.train(*words[2:])
    assert life.wait() == 0, life.said

    found = events(run)
    assert sorted(found) == list(range(1, steps + 1))
    for row in curve(run):
        assert found[row["step"]]["loss"] == pytest.approx(row["loss"], rel=1e-6)  # float32
