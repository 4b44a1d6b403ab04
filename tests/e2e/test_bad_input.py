"""What a user gets wrong, and what the machine does: one clear message, an exit code, nothing written, nothing lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_runs import (
    ENVIRONMENT,
    HALF,
    PATIENCE,
    STEPS,
    checkpoints,
    curve,
    interrupted,
    outcome,
    rows,
    rubbish,
    write_config,
)

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.cli.main import main

EIGHT = {"cpu_devices": 0}  # in pytest's own process the devices are there already


def refused(capsys, *arguments: str | Path) -> str:
    """What `dsjax train` says on stderr when it exits with 2."""
    assert main(["train", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dsjax: error: ") and error.count("dsjax: error: ") == 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["train.stpes=3"], "--set: train.stpes: unknown key; closest: steps; allowed: steps, tokens, "),
        (["train.steps=many"], "--set: train.steps: want a whole number; got 'many'"),
        (["train.steps=3", "train.tokens=100"], "give steps or tokens, one of them above 0; got steps 3, tokens 100"),
        (
            ["optimizer={kind: adam}"],
            "optimizer.kind: unknown kind; given 'adam' (text); closest: adamw; allowed: adamw, lamb, sgd",
        ),
        (["observe.profile=5"], "profile must be START:STOP with START < STOP; got '5'"),
        (["mesh.data=3"], "mesh data 3 x fsdp 4 x expert 1 x tensor 1 needs 12 devices, but there are 8; set one axis"),
        (["mesh.fsdp=3", "mesh.data=-1"], "the 8 devices are not divisible by 3"),
        (
            ["train.batch_size=20"],
            "train.batch_size = 20 cannot be cut into data 2 x accumulation 1 x (fsdp * expert) 4 = 8 equal parts; "
            "use a multiple of 8, such as 16 or 24",
        ),
        (["evaluate.batch_size=4"], "evaluate.batch_size = 4 must be divisible by data * fsdp * expert = 8"),
        (
            ["model.num_heads=4", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8"],
            "model.num_heads = 4",
        ),
        (["model.vocab_size=200"], "the tokenizer has 257 tokens, but model.vocab_size is 200; set it to at least 257"),
        (
            ["model={kind: gpt2, max_positions: 8, num_layers: 2, model_dim: 16, num_heads: 8, vocab_size: 264}"],
            "data.sequence_length = 16 is more than the model's positions, model.max_positions = 8",
        ),
    ],
    ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "",
)
def test_a_config_that_cannot_be(tmp_path, texts, capsys, sets, message):
    config = write_config(tmp_path / "run.yaml", texts, mesh=EIGHT)
    arguments = [part for one in sets for part in ("--set", one)]
    assert message in refused(capsys, config, "--run-dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_all_mistakes_of_a_config_at_once(tmp_path, texts, capsys):
    config = write_config(
        tmp_path / "run.yaml", texts, mesh={**EIGHT, "tenser": 2}, train={"batch_size": "big"}, sede=3
    )  # fmt: skip
    error = refused(capsys, config, "--run-dir", tmp_path / "run", "--set", "checkpoint.every=soon")
    for number, part in enumerate(
        [
            "sede: unknown key",
            "mesh.tenser: unknown key",
            "train.batch_size: want a whole",
            "checkpoint.every: want a whole",
        ]
    ):
        assert part in error.splitlines()[number]
    assert not (tmp_path / "run").exists()


def test_arguments_that_do_not_go_together(tmp_path, config, capsys):
    assert "not allowed with argument --resume" in refused(capsys, config, "--resume", "--resume-if-any")
    assert "no such config file: nowhere.yaml" in refused(capsys, "nowhere.yaml")
    (tmp_path / "file").write_text("mine")
    assert "Not a directory" in refused(capsys, config, "--run-dir", tmp_path / "file", "--set", "mesh.cpu_devices=0")
    assert (tmp_path / "file").read_text() == "mine"


def lose(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def spoil(folder: Path) -> None:
    (folder / "07.txt").write_bytes(b"good so far \xff\xfe and then not")


@pytest.mark.parametrize("change", [lose, empty, spoil])
def test_data_that_cannot_be_read(tmp_path, texts, capsys, change):
    mine = tmp_path / "texts"
    shutil.copytree(texts, mine)
    change(mine)
    config = write_config(tmp_path / "run.yaml", mine, mesh=EIGHT)
    error = refused(capsys, config, "--run-dir", tmp_path / "run")
    message = {
        lose: f"there is no file or folder '{mine}'",
        empty: f"no file that matches *.txt and has content in the folder '{mine}'",
        spoil: f"{mine}/07.txt",
    }[change]
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"DSJAX_COORDINATOR": "127.0.0.1:1", "DSJAX_NUM_PROCESSES": "two"}, [], "these must be whole numbers"),
        ({}, ["--distributed"], "JAX finds no cluster (SLURM, OpenMPI, Kubernetes) here"),
    ],
)
def test_processes_that_are_not_there(tmp_path, zygote, config, variables, arguments, message):
    life = zygote.train(config, "--run-dir", tmp_path / "run", *arguments, environment=variables)
    assert life.wait() == 2
    assert life.said.startswith("dsjax: error: ") and message in life.said and len(life.said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite(tmp_path, zygote, texts):
    """Skipped, counted, named; stopped after the bound, across a resume too; the bound may be raised."""
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "bad.yaml", texts,
        optimizer={"kind": "sgd", "learning_rate": 1e30}, train={"max_nonfinite_steps": 4, "steps": 8},
    )  # fmt: skip
    seen = []
    for resume in ([], ["--resume"]):
        life = zygote.train(config, "--run-dir", run, *resume)
        assert life.wait() == 1, life.said
        (message,) = [line for line in life.said.splitlines() if line.startswith("dsjax: error: ")]
        assert message.startswith(
            "dsjax: error: 4 steps in a row had a gradient that is not finite, the last at step 5, first in embed.table"
        )
        assert "Traceback" not in life.said
        seen.append(curve(run))
    assert "step 4: gradient not finite, first in embed.table; the step changes nothing" in life.said
    assert seen[0] == seen[1]  # two of the four were before the resume
    assert [row["skipped"] for row in seen[0]] == [0, 1, 2, 3, 4]
    assert ["first_bad_tensor" in row for row in seen[0]] == [False, True, True, True, True]
    assert seen[0][-1]["loss"] == "NaN"
    life = zygote.train(config, "--run-dir", run, "--resume", "--set", "train.max_nonfinite_steps=100")
    assert life.wait() == 0, life.said
    found = outcome(run)
    assert (found["skipped_steps"], found["training_loss"], found["best_validation_loss"]) == (7, None, None)
    assert (run / "loss.png").stat().st_size > 1000


def can_mount() -> bool:
    command = ["unshare", "--mount", "true"]
    return os.geteuid() == 0 and shutil.which("unshare") is not None and subprocess.run(command).returncode == 0


SMALL_DISK = """
disk=$1 out=$2; shift 2
mount -t tmpfs -o size=1000k none "$disk" || exit 99
"$@"; code=$?
cp -a "$disk/run" "$out"; exit $code
"""


@pytest.mark.slow  # test_files_that_cannot_grow stands for it
@pytest.mark.skipif(not can_mount(), reason="needs root and unshare to mount a file system of its own")
def test_a_disk_that_is_full(tmp_path, zygote, config, reference):
    """A real small disk, seen by one process only: it fills up, the run goes on, what was saved before stays whole."""
    (tmp_path / "disk").mkdir()
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dsjax", "train", config, "--run-dir", tmp_path / "disk" / "run"]
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", SMALL_DISK, "bash", tmp_path / "disk", run, *command],
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "No space left on device" in done.stderr, said
    saved = checkpoints(run)
    assert saved and saved[-1] < STEPS, said
    assert curve(run) == curve(reference)[: len(rows(run))]
    if len(rows(run)) == STEPS:  # else not even a row fitted while a checkpoint was being written
        assert "training goes on, earlier checkpoints are intact" in done.stdout, said
        assert f"the last whole checkpoint is that of step {saved[-1]}; make room, then: dsjax train " in done.stderr
    goes_on(zygote, config, run, reference)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (20_000, f"the last whole checkpoint is that of step {HALF}; make room, then: dsjax train "),
        pytest.param(
            3_000,
            "File too large; the checkpoints are intact: make room, then go on with --resume",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["checkpoints", "metrics"],
)
def test_files_that_cannot_grow(tmp_path, zygote, config, reference, size, message):
    """The kernel refuses to write a file beyond a size, for a quota's sake (EFBIG, where a full disk has ENOSPC)."""
    run = interrupted(reference, tmp_path / "run")
    life = zygote.train(config, "--run-dir", run, "--resume", file_size=size)
    assert life.wait() == 1
    assert "dsjax: error: " in life.said and message in life.said, life.said
    assert checkpoints(run) == [HALF]
    goes_on(zygote, config, run, reference)


def goes_on(zygote, config: Path, run: Path, reference: Path) -> None:
    """With room again the run ends as if there had always been."""
    store = CheckpointStore(run / "checkpoints", CheckpointConfig())
    assert [store.verify(step) for step in checkpoints(run)] == [[]] * len(checkpoints(run))
    life = zygote.train(config, "--run-dir", run, "--resume")
    assert life.wait() == 0, life.said
    assert curve(run) == curve(reference) and outcome(run) == outcome(reference)
    assert checkpoints(run) == checkpoints(reference) and rubbish(run) == []
