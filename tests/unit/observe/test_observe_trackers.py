"""What is logged is read back, whatever was cut off or not finite; missing extras are named."""

import json
import math
import struct
import sys
import tempfile
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.observe.config import ObserveConfig
from dsjax.observe.trackers import JsonlTracker, TensorBoardTracker, make_trackers, read_metrics

values = st.one_of(st.floats(), st.integers(-(2**53), 2**53), st.sampled_from(["stage 2", "naïve\n", '"quoted"']))
rows = st.lists(st.dictionaries(st.sampled_from(["loss", "learning_rate", "note"]), values), max_size=6)


def same(left: object, right: object) -> bool:
    both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return both_nan or left == right


@settings(deadline=None, max_examples=40)
@given(rows, st.data())
def test_rows_survive_a_cut_at_any_byte_and_a_restart(logged, data) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        tracker = JsonlTracker(path)
        ends = [0]
        for step, row in enumerate(logged, start=1):
            tracker.log(step, row)
            ends.append(path.stat().st_size)  # on disk before the next step
        tracker.close()
        cut = data.draw(st.integers(0, ends[-1]))
        path.write_bytes(path.read_bytes()[:cut])
        whole = max(n for n, end in enumerate(ends) if end <= cut)
        expected = [{"step": step} | row for step, row in enumerate(logged[:whole], start=1)]

        def check(found, wanted) -> None:
            assert [list(row) for row in found] == [list(row) for row in wanted]
            assert all(same(f[name], w[name]) for f, w in zip(found, wanted, strict=True) for name in w)

        check(read_metrics(path), expected)
        tracker = JsonlTracker(path)
        tracker.log(7, {"loss": 1.5})
        tracker.close()
        check(read_metrics(path), [*expected, {"step": 7, "loss": 1.5}])


def test_every_line_is_json_for_any_reader(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "new" / "metrics.jsonl")
    tracker.log(3, {"loss": math.nan, "gradient_norm": math.inf})
    tracker.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "new" / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 3, "loss": "NaN", "gradient_norm": "Infinity"}


@pytest.mark.parametrize("bad", ["{oops", "[1]", "3"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="line 2 is not"):
        read_metrics(path)


def test_metrics_are_always_written_first(tmp_path: Path) -> None:
    (tracker,) = make_trackers(ObserveConfig(), tmp_path)
    tracker.log(1, {"loss": 2.0})
    tracker.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def _scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Events as TensorBoard reads them: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    trackers = make_trackers(ObserveConfig(tensorboard=True), tmp_path)
    for tracker in trackers:
        tracker.log(5, {"loss": 2.5, "stage": "warmup", "skipped": 0})
        tracker.log(6, {"loss": 2.25})
        tracker.close()
    assert _scalars(tmp_path / "tensorboard") == {("loss", 5): 2.5, ("skipped", 5): 0.0, ("loss", 6): 2.25}
    resumed = TensorBoardTracker(tmp_path / "tensorboard", resume_step=5)
    resumed.log(6, {"loss": 2.0})
    resumed.close()


def test_what_was_flushed_is_on_disk(tmp_path: Path) -> None:
    """Of each tracker that writes a file, without its being closed: a killed process closes nothing."""
    pytest.importorskip("tensorboardX")
    trackers = make_trackers(ObserveConfig(tensorboard=True), tmp_path)
    for step in range(1, 40):
        for tracker in trackers:
            tracker.log(step, {"loss": 1.0 / step, "stage": "full"})
    for tracker in trackers:
        tracker.flush()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 40))
    found = _scalars(tmp_path / "tensorboard")
    assert sorted(found) == [("loss", step) for step in range(1, 40)]
    for tracker in trackers:
        tracker.close()


def test_two_lives_in_one_second_have_files_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for step in range(3):
        tracker = TensorBoardTracker(tmp_path, resume_step=step or None)
        tracker.log(step + 1, {"loss": float(step)})
        tracker.close()
    assert _scalars(tmp_path) == {("loss", 1): 0.0, ("loss", 2): 1.0, ("loss", 3): 2.0}


@pytest.mark.parametrize(
    ("package", "config", "extra"),
    [
        ("tensorboardX", ObserveConfig(tensorboard=True), r"dsjax\[tensorboard\]"),
        ("wandb", ObserveConfig(wandb_project="p"), r"dsjax\[wandb\]"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_written(tmp_path, monkeypatch, package, config, extra) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}.*{extra}"):
        make_trackers(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_wandb_resumes_the_run_of_the_folder(tmp_path: Path, monkeypatch) -> None:
    calls: list = []

    class Run:
        def log(self, row, step, commit):
            assert commit  # or it is kept back until a later step
            calls.append(("log", step, row))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        for tracker in make_trackers(ObserveConfig(wandb_project="lab"), tmp_path / "run-1", settings={"seed": 1}):
            tracker.log(4, {"loss": 1.0})
            tracker.close()
    first, second = (call[1] for call in calls if call[0] == "init")
    assert first == second
    assert (first["project"], first["name"], first["config"]) == ("lab", "run-1", {"seed": 1})
    assert calls[1:3] == [("log", 4, {"loss": 1.0}), ("finish",)]
