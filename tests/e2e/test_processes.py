"""Real processes and real signals: stopping, several processes as one, a worker that dies."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from e2e_runs import (
    HALF,
    STEPS,
    checkpoints,
    close_to,
    curve,
    interrupted,
    launch,
    losses,
    outcome,
    rows,
    said,
    wait_until,
    write_config,
)

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore

LONG = ["--set", "train.steps=5000", "--set", "optimizer.schedule.kind=constant"]


def workers(launcher: int) -> list[int]:
    """Process ids of the processes 0, 1, ... of a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    number = lambda pid: re.search(rb"DSJAX_PROCESS_ID=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
    found = {int(match[1]): int(pid) for pid in children if (match := number(pid))}
    return [pid for _, pid in sorted(found.items())]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, zygote, config, number):
    run = tmp_path / "a run"  # the command must survive the space
    life = zygote.train(config, "--run-dir", run, *LONG, "--set", "checkpoint.every=0")
    life.until(lambda: len(rows(run)) >= 4)
    life.kill(number)
    assert life.wait() == 75, life.said
    stopped = len(rows(run))
    assert 4 <= stopped < 5000 and checkpoints(run) == [stopped]
    assert CheckpointStore(run / "checkpoints", CheckpointConfig()).verify(stopped) == []
    # Zygote.train gives --force, and what had to be forced must be the next time.
    command = f"dsjax train '{run}/config.yaml' --run-dir '{run}' --resume --force"
    assert f"stopped by {number.name} at step {stopped}; to go on: {command}\n" in life.said
    assert not (run / "summary.json").exists()
    # The command, as it is printed, with a little less to do.
    arguments = [run / "config.yaml", "--run-dir", run, "--resume"]
    life = zygote.train(*arguments, "--set", f"train.steps={stopped + 2}")
    assert life.wait() == 0 and f"resumed from step {stopped} of" in life.said, life.said
    assert [row["step"] for row in rows(run)] == [*range(1, stopped + 3)]


def test_a_second_ctrl_c_stops_at_once(tmp_path, zygote, config):
    def interrupt_twice(run: Path) -> tuple[int, str]:
        life = zygote.train(config, "--run-dir", run, *LONG)
        life.until(lambda: len(rows(run)) >= 4)
        life.kill(signal.SIGINT)
        life.until(lambda: "Ctrl-C once more" in life.said, every=0.0005)
        life.kill(signal.SIGINT)
        return life.wait(), life.said

    run = tmp_path / "run"
    code, text = interrupt_twice(run)
    if code == 75:  # it was done with saving before the second signal reached it
        run = tmp_path / "again"
        code, text = interrupt_twice(run)
    assert code == 130, text
    assert text.endswith("dsjax: interrupted\n") and "Traceback" not in text
    store = CheckpointStore(run / "checkpoints", CheckpointConfig())
    assert store.latest_good(lambda _: None) in (None, 3)  # what was whole is whole


def test_one_process_then_two_until_a_signal_to_one_of_them_and_one_again(tmp_path, zygote, config, reference):
    run = interrupted(reference, tmp_path / "run")
    metrics = run / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:HALF]))
    with launch(tmp_path, 2, "--", config, "--run-dir", run, "--resume") as launcher:
        wait_until(lambda: len(rows(run)) > HALF or launcher.poll() is not None)
        os.kill(workers(launcher.pid)[1], signal.SIGTERM)
        assert launcher.wait() == 75, said(tmp_path)
    assert f"resumed from step {HALF} of" in said(tmp_path)
    stopped = len(rows(run))
    assert HALF < stopped < STEPS and checkpoints(run)[-1] == stopped
    assert f"at step {stopped}; to go on: dsjax train {run}/config.yaml --run-dir {run} --resume" in said(tmp_path)
    assert len(list((run / "checkpoints" / f"step_{stopped:08d}").glob("manifest_*_of_00002.txt"))) == 2
    life = zygote.train(run / "config.yaml", "--run-dir", run, "--resume")
    assert life.wait() == 0 and f"resumed from step {stopped}" in life.said, life.said
    close_to(run, reference)
    assert curve(run)[:HALF] == curve(reference)[:HALF]


@pytest.mark.slow
def test_tensor_across_processes_and_a_killed_worker(tmp_path, texts, reference):
    config = write_config(tmp_path / "tensor.yaml", texts, mesh={"data": 1, "fsdp": 1, "tensor": 8, "zero_stage": 0})
    run = tmp_path / "run"
    with launch(tmp_path, 2, "--", config, "--run-dir", run) as launcher:
        wait_until(lambda: len(rows(run)) >= 7 or launcher.poll() is not None)
        os.kill(workers(launcher.pid)[1], signal.SIGKILL)
        killed = time.monotonic()
        wait_until(lambda: (run / "metrics.jsonl.bak").exists() or launcher.poll() is not None)
        assert time.monotonic() - killed < 60
        assert launcher.wait() == 0, said(tmp_path)
    assert "process 1" in said(tmp_path) and "was killed by SIGKILL; ending the others" in said(tmp_path)
    assert "restart 1 of 3" in said(tmp_path)
    assert re.search("resumed from step [36] of", said(tmp_path)), said(tmp_path)  # 6 may still have been on its way
    close_to(run, reference)
    # What was done again came out the same to the last bit.
    before = [json.loads(line)["loss"] for line in (run / "metrics.jsonl.bak").read_text().split("\n")[:-1]]
    assert len(before) >= 7 and before == losses(run)[: len(before)]
    assert "no sample is drawn with several processes" in said(tmp_path)
    assert outcome(run)["sample"] == ""


def test_restarts_have_a_bound(tmp_path, texts):
    """A run whose every start fails: the gradient is not finite from the second step on."""
    config = write_config(
        tmp_path / "bad.yaml", texts,
        optimizer={"kind": "sgd", "learning_rate": 1e30}, train={"max_nonfinite_steps": 3}, checkpoint={"every": 0},
    )  # fmt: skip
    with launch(tmp_path, 1, "--max-restarts", "1", "--", config, "--run-dir", tmp_path / "run") as launcher:
        assert launcher.wait() == 1, said(tmp_path)
    assert said(tmp_path).count("dsjax: error: 3 steps in a row had a gradient that is not finite") == 2
    assert "gave up after 1 restarts" in said(tmp_path)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_soon(tmp_path, texts):
    """While the other waits for it in a step, and JAX at exit would wait for the other."""
    (tmp_path / "ours.py").write_text(
        "import os, pathlib\n"
        "def growth(step):\n"
        "    metrics = pathlib.Path('run/metrics.jsonl')\n"
        "    under_way = metrics.exists() and metrics.read_text().count('\\n') > 2\n"
        "    return {}['no such key'] if under_way and os.environ['DSJAX_PROCESS_ID'] == '1' else 50\n"
    )
    schedule = {"kind": "custom", "function": "ours.growth"}
    config = write_config(
        tmp_path / "error.yaml", texts,
        curriculum={"difficulty": [{"metric": "length", "schedule": schedule}]},
    )  # fmt: skip
    began = time.monotonic()
    with launch(tmp_path, 2, "--max-restarts", "0", "--", config, "--run-dir", tmp_path / "run") as launcher:
        assert launcher.wait() == 1, said(tmp_path)
    assert time.monotonic() - began < 60
    assert "KeyError: 'no such key'" in said(tmp_path) and 2 < len(rows(tmp_path / "run")) < STEPS


def test_a_mistake_ends_all_processes_soon(tmp_path, texts):
    """Found by the first process, while the others wait for it."""
    config = write_config(tmp_path / "wrong.yaml", texts, model={"vocab_size": 200})
    began = time.monotonic()
    with launch(tmp_path, 2, "--", config, "--run-dir", tmp_path / "run") as launcher:
        assert launcher.wait() == 2, said(tmp_path)
    assert time.monotonic() - began < 60
    assert "dsjax: error: the tokenizer has 257 tokens, but model.vocab_size is 200" in said(tmp_path)
    assert "restart" not in said(tmp_path)
