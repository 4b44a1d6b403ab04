"""A run's folder: its name stays in runs/, its files are UTF-8 wherever they are read, and its last save counts."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.checkpoint.store import CheckpointError
from dsjax.config.load import ConfigError, from_dict, load_run, to_yaml
from dsjax.config.run import RunConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.runs.counters import Counters
from dsjax.runs.folder import new_folder, newest_folder, read_config
from dsjax.runs.saving import RunStatus, Saver
from dsjax.setup.config import TrainConfig

BAD = [
    "",
    "/etc/run",
    "a/b",
    "..",
    ".",
    "../run",
    ".hidden",
    "-run",
    "--resume",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 201,
    "\udcff",
]
GOOD = ["run", "my run", "naïve", "lr=3e-4, b1=0.9", "x" * 200, "a..b", "$HOME", "実験"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_no_folder_in_runs(tmp_path, name):
    with pytest.raises(ValueError, match=r"^name is that of a folder in runs/, and .*;|bytes; give at most 200$"):
        RunConfig(name=name, train=TrainConfig(steps=1))
    for find in (new_folder, newest_folder):
        with pytest.raises(ValueError, match="name is that of a folder in runs/"):
            find(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_name_in_a_file_or_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("name: ../../elsewhere\ntrain: {steps: 1}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: name is that of a folder in runs/, and '../../elsewhere' holds"):
        load_run(tmp_path / "run.yaml")
    assert load_run(tmp_path / "run.yaml", ["name=here"]).name == "here"
    with pytest.raises(ConfigError, match="name is that of a folder in runs/, and '/tmp/x' holds '/'"):
        load_run(tmp_path / "run.yaml", ["name=/tmp/x"])


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are_folders(tmp_path, name):
    assert RunConfig(name=name, train=TrainConfig(steps=1)).name == name
    found = []
    for _ in range(3):
        found.append(new_folder(tmp_path, name))
        found[-1].mkdir()
        assert newest_folder(tmp_path, name) == found[-1]
    assert [path.name for path in found] == [name, f"{name}-2", f"{name}-3"]


@given(st.text(max_size=8))
def test_no_name_leads_out_of_the_folder(name):
    root = Path("/nowhere/runs")
    try:
        found = new_folder(root, name)
    except ValueError:
        return
    assert found.parent == root and Path(*found.parts).resolve() == found and found.name[:1] not in (".", "-")


def old_config(name: str) -> str:
    """The config.yaml of a run folder from before names were checked."""
    run = RunConfig(
        name="anything", model=BloomConfig(num_layers=1, model_dim=8, num_heads=1), train=TrainConfig(steps=1)
    )
    return to_yaml(run).replace("name: anything", f"name: {name}")


@pytest.mark.parametrize("name", ["lab/first", "../first", ".first", "''"])
def test_a_folder_of_a_run_with_another_name_is_still_read(tmp_path, name):
    (tmp_path / "config.yaml").write_text(old_config(name))
    assert read_config(tmp_path).name == "run"
    (tmp_path / "config.yaml").write_text(old_config("'first run'"))
    assert read_config(tmp_path).name == "first run"


def test_a_folder_is_read_alike_in_every_locale(tmp_path):
    """Its files are UTF-8, whatever the terminal is set to."""
    (tmp_path / "config.yaml").write_text(old_config("naïve"), encoding="utf-8")
    code = f"from dsjax.runs.folder import read_config, Path; print(ascii(read_config(Path({str(tmp_path)!r})).name))"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code],
        capture_output=True, text=True, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == r"'na\xefve'", done.stderr


def test_old_settings_that_mean_nothing_are_still_read(tmp_path):
    """Refused when a run is to begin, not when one is read."""
    tree = {
        "model": {"kind": "bloom"},
        "train": {"steps": 1},
        "evaluate": {"rows": -1},
        "sample": {"max_new_tokens": 0},
    }
    (tmp_path / "config.yaml").write_text(to_yaml(from_dict(RunConfig, tree)))
    assert read_config(tmp_path).evaluate.rows == -1


class Store:
    """Saves, and then fails as the real store does: an old checkpoint cannot be removed, or the disk is full."""

    def __init__(self, *, there: list[int], saved: list[int]) -> None:
        self.there, self.saved, self.waits = there, saved, 0

    def steps(self) -> list[int]:
        return self.there

    def save(self, step, tree, *, clocks, metric) -> None:
        self.there = [*self.there, *self.saved]

    def wait(self) -> None:
        self.waits += 1
        if self.waits == 2:
            raise CheckpointError("step_00000009 is saved, but what it replaces cannot be removed: Permission denied")


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("there", "saved", "fails"), [([3], [9], False), ([3], [], True), ([3, 9], [], True)], ids=["saved", "not", "old"]
)
def test_a_last_checkpoint_that_is_whole_counts(monkeypatch, there, saved, fails):
    """That an older one cannot be removed must not cost the summary."""
    monkeypatch.setattr("dsjax.runs.saving.to_named", lambda state, runs: {})
    store, notes = Store(there=there, saved=saved), Notes()
    folder = type("Folder", (), {"resume_command": "dsjax train"})
    saver = Saver(RunStatus(folder, store, Counters(steps=9)), (1,), "hash", notes)
    if fails:
        with pytest.raises(CheckpointError, match="make room, then: dsjax train"):
            saver.save(None, validation_loss=None, must=True)
    else:
        saver.save(None, validation_loss=None, must=True)
        (line,) = notes.lines
        assert "is saved, but what it replaces cannot be removed" in line
