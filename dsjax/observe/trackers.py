"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for.

A row is flat: names to numbers or strings, the same names everywhere. Those that the progress line and the loss plot
know are `loss`, `validation_loss`, `learning_rate` and `tokens_per_second`; a row need not hold them all.
"""

import importlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from dsjax.observe.config import ObserveConfig
from dsjax.observe.untrusted import parse_json

type Row = Mapping[str, float | int | str]

METRICS_FILE = "metrics.jsonl"
_SECONDS_UNSEEN = 30.0  # that a point may wait for others before TensorBoard sees it
# JSON has no such numbers; as strings every reader of JSON can read the rows, and read_metrics turns them back.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Tracker(Protocol):
    """Takes a row a step. With several processes only one of them has trackers."""

    def log(self, step: int, row: Row) -> None:
        """Records the metrics of a step."""
        ...

    def flush(self) -> None:
        """Writes the rows logged so far, so that a kill of this process, or of the machine, does not lose them."""
        ...

    def close(self) -> None:
        """Writes what is still held back; the tracker takes no rows afterwards."""
        ...


class JsonlTracker:
    """One JSON object a line, `step` first, on disk as soon as it is logged.

    An existing file is continued; a last line that a killed process left incomplete is removed first.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> tracker = JsonlTracker(path)
        >>> tracker.log(1, {"loss": 8.25})
        >>> tracker.close()
        >>> read_metrics(path)
        [{'step': 1, 'loss': 8.25}]
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, row: Row) -> None:
        """Appends a row and hands it to the operating system, so that it outlives this process."""
        plain = {"step": step} | {name: _plain(value) for name, value in row.items()}
        self._file.write(json.dumps(plain, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Hands the rows from the operating system to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardTracker:
    """TensorBoard events; numbers become scalars, strings texts.

    Written at once and not through tensorboardX's queue, which does not report when it is empty.

    Args:
        directory: folder of the events, made if it is not there.
        resume_step: the step a resumed run continues from: later points of the run before it are hidden.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, *, resume_step: int | None = None):
        _tensorboard()
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter

        event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")  # made when it is imported: no types
        self._summary, self._event = summary, event_pb2.Event
        directory.mkdir(parents=True, exist_ok=True)
        # A name has the seconds of the clock: a run may be resumed within the same second.
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}.{time.monotonic_ns()}")
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.write_event(self._event(wall_time=time.time(), step=resume_step + 1, session_log=start))
        self.flush()

    def log(self, step: int, row: Row) -> None:
        """Adds a point to the curve of each metric."""
        for name, value in row.items():
            make = self._summary.text if isinstance(value, str) else self._summary.scalar
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=make(name, value)))
        if time.monotonic() - self._flushed > _SECONDS_UNSEEN:
            self.flush()

    def flush(self) -> None:
        """Writes the events to the disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run; the same run folder resumes the same run.

    Args:
        project: name of the project.
        run_dir: run folder; its name is the run's name, and wandb_id.txt in it holds the run's id.
        settings: the resolved config, shown beside the curves.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, project: str, run_dir: Path, *, settings: Mapping[str, object] | None = None):
        wandb = _wandb()
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            partial = id_file.with_name(f".{id_file.name}.partial")
            partial.write_text(os.urandom(8).hex() + "\n")
            os.replace(partial, id_file)  # whole: a run with an empty id would be another one each time
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text().strip(),
            dir=str(run_dir),
            config=dict(settings or {}),
            resume="allow",
        )

    def log(self, step: int, row: Row) -> None:
        """Hands a row to the process that sends it."""
        # A row with a step is otherwise kept back until there is one of a later step.
        self._run.log(dict(row), step=step, commit=True)

    def flush(self) -> None:
        """Does nothing: what was logged is with the process that sends it, which outlives this one."""

    def close(self) -> None:
        """Waits until everything has been sent."""
        self._run.finish()


def require_packages(config: ObserveConfig) -> None:
    """Refuse trackers whose packages are not here: asked before anything is read or written.

    Raises:
        ValueError: names the setting, the package and how it is installed.
    """
    if config.tensorboard:
        _tensorboard()
    if config.wandb_project:
        _wandb()


def make_trackers(
    config: ObserveConfig,
    run_dir: Path,
    *,
    resume_step: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> list[Tracker]:
    """The trackers that a run asks for; the first one writes `run_dir/metrics.jsonl`.

    Args:
        config: what to write besides metrics.jsonl.
        run_dir: run folder, made if it is not there.
        resume_step: last step of the checkpoint that the run continues from, None for a new run. Rows of later steps
            must have been cut from metrics.jsonl before.
        settings: the resolved config, for the trackers that show it.

    Raises:
        ValueError: a tracker whose package is not installed; nothing has been written then.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoardTracker(run_dir / "tensorboard", resume_step=resume_step))
    if config.wandb_project:
        run_dir.mkdir(parents=True, exist_ok=True)
        trackers.append(WandbTracker(config.wandb_project, run_dir, settings=settings))
    return [JsonlTracker(run_dir / METRICS_FILE), *trackers]


def read_metrics(path: Path) -> list[dict[str, float | int | str]]:
    """Rows of a metrics.jsonl. A last line that was cut off by a kill is left out.

    Raises:
        ValueError: any other line that is not a JSON object; it is named.
        FileNotFoundError: no such file.
    """
    lines = path.read_bytes().split(b"\n")
    # A whole file ends with a newline, so what stands after the last one is a torn row or nothing.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = parse_json(line, f"{path}, line {number}", lenient=True)
        except ValueError as error:
            raise ValueError(f"{error}; mend or remove the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a row of metrics: {line[:80]!r}")
        rows.append(
            {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
        )
    return rows


def _cut_torn_line(path: Path) -> None:
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def _plain(value: float | int | str) -> float | int | str:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _tensorboard() -> ModuleType:
    return _package("tensorboardX", key="observe.tensorboard", extra="tensorboard")


def _wandb() -> ModuleType:
    return _package("wandb", key="observe.wandb_project", extra="wandb")


def _package(name: str, *, key: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{key} needs the package {name}, which is not installed: pip install 'dsjax[{extra}]'"
        ) from error
