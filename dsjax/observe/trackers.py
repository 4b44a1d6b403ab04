"""Where the figures of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for.

A row is flat: names to numbers or strings, the same names everywhere. Those that the progress line and the loss plot
know are `loss`, `validation_loss`, `learning_rate` and `tokens_per_second`; a row need not hold them all.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dsjax.observe.config import ObserveConfig

type Row = Mapping[str, float | int | str]

METRICS_FILE = "metrics.jsonl"
# JSON has no such numbers; as strings every reader of JSON can read the rows, and read_metrics turns them back.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Tracker(Protocol):
    """Takes a row a step. With several processes only one of them has trackers."""

    def log(self, step: int, row: Row) -> None:
        """Records the figures of a step."""
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

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardTracker:
    """TensorBoard events; numbers become scalars, strings texts.

    Args:
        directory: folder of the events, made if it is not there.
        resume_step: the step a resumed run continues from: later points of the run before it are hidden.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, *, resume_step: int | None = None):
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError as error:
            raise _missing("observe.tensorboard", "tensorboardX", "tensorboard") from error
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def log(self, step: int, row: Row) -> None:
        """Adds a point to the curve of each figure."""
        for name, value in row.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

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
        try:
            import wandb  # pyright: ignore[reportMissingImports] : an extra
        except ModuleNotFoundError as error:
            raise _missing("observe.wandb_project", "wandb", "wandb") from error
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(os.urandom(8).hex() + "\n")
        self._run = wandb.init(
            project=project,
            name=run_dir.name,
            id=id_file.read_text().strip(),
            dir=str(run_dir),
            config=dict(settings or {}),
            resume="allow",
        )

    def log(self, step: int, row: Row) -> None:
        """Sends a row."""
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        """Waits until everything has been sent."""
        self._run.finish()


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
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # A whole file ends with a newline, so what stands after the last one is a torn row or nothing.
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a row of figures: {line[:80]!r}")
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


def _missing(key: str, package: str, extra: str) -> ValueError:
    return ValueError(f"{key} needs the package {package}, which is not installed: pip install 'dsjax[{extra}]'")
