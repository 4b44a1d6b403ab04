"""The progress line of a run: live on a terminal, a plain line at intervals in a log."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

WIDTH = 100
_BAR_WIDTH = 8
# Short names on the line, in this order, which is also the order of importance: the last ones go when it gets too long.
_LABELS = {
    "loss": "loss {:.3f}",
    "validation_loss": "val {:.3f}",
    "length": "length {}",
    "kept": "kept {}",
    "difficulty": "difficulty {}",
    "tokens": "{} tok",
    "saving": "saved {:.0%}",
    "tokens_per_second": "{} tok/s",
    "learning_rate": "lr {:.1e}",
}
_COUNTS = ("tokens", "tokens_per_second")


class Progress:
    """Progress of a run of known length.

    On a terminal one live line; otherwise a plain line at the first step, the last one, whenever there is a new
    validation loss, and in between about ten times a run or every 30 seconds, whichever comes first.

    Args:
        total_steps: step at which the run ends.
        start_step: last step already done, for a resumed run.
        console: where to print; standard output by default.
        clock: seconds, for tests.

    Example:
        >>> with Progress(2, console=Console(force_terminal=False, width=100)) as progress:
        ...     progress.update(1, loss=8.317, learning_rate=3e-4)
        ...     progress.note("saved step 1")
        step 1/2  loss 8.317  lr 3.0e-04
        saved step 1
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.start_step = start_step
        self.console = console or Console()
        self._clock = clock
        self._metrics: dict[str, float] = {}
        self._first: tuple[int, float] | None = None
        self._printed: tuple[int, float] | None = None
        self._live: RichProgress | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            # On a terminal narrower than the line its end is cut; a second row would make it jump.
            text = TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            )
            self._live = RichProgress(BarColumn(bar_width=_BAR_WIDTH), text, console=self.console)
            self._task = self._live.add_task(
                f"step {self.start_step}/{self.total_steps}", total=self.total_steps, completed=self.start_step
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, **metrics: float) -> None:
        """Shows that `step` is done, with its metrics; a metric not given keeps its last value.

        Known: loss, validation_loss (nats per token), learning_rate, tokens_per_second, and of runs whose rows change
        length, kept, difficulty, tokens, saving (a share); any other is shown by its name.
        """
        now = self._clock()
        self._metrics |= metrics
        # The first step compiles, so the rate counts from its end.
        self._first = self._first or (step, now)
        line = format_line(step, self.total_steps, self._metrics, eta_seconds=self._eta(step, now))
        if self._live is not None:
            self._live.update(self._task, completed=step, description=line)
        elif self._due(step, now) or "validation_loss" in metrics:
            self._printed = (step, now)
            self._print(line)

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live one."""
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _eta(self, step: int, now: float) -> float | None:
        assert self._first is not None
        done, seconds = step - self._first[0], now - self._first[1]
        return seconds / done * (self.total_steps - step) if done > 0 else None

    def _due(self, step: int, now: float) -> bool:
        if self._printed is None or step >= self.total_steps:
            return True
        a_tenth = max(1, (self.total_steps - self.start_step) // 10)
        return step - self._printed[0] >= a_tenth or now - self._printed[1] >= 30.0


def format_line(step: int, total_steps: int, metrics: dict[str, float], *, eta_seconds: float | None) -> str:
    """The text beside the bar, short enough to fit 100 columns with it.

    Example:
        >>> format_line(120, 2000, {"loss": 3.2141, "tokens_per_second": 81250.0}, eta_seconds=131)
        'step 120/2000  loss 3.214  81.2k tok/s  ETA 2:11'
    """
    parts = [f"step {step}/{total_steps}"]
    if eta_seconds is not None and step < total_steps:
        parts.append(f"ETA {format_duration(eta_seconds)}")
    limit = WIDTH - _BAR_WIDTH - 2
    ordered = [name for name in _LABELS if name in metrics] + [name for name in metrics if name not in _LABELS]
    shown: list[str] = []
    for name in ordered:
        value = metrics[name]
        text = _LABELS.get(name, name.replace("_", " ").replace("{", "(").replace("}", ")") + " {:.4g}").format(
            format_count(value) if name in _COUNTS else value
        )
        if len("  ".join([*parts, *shown, text])) > limit:
            break
        shown.append(text)
    return "  ".join([parts[0], *shown, *parts[1:]])


def format_count(number: float) -> str:
    """Three digits and a unit.

    Example:
        >>> format_count(81250), format_count(1.24e9), format_count(12)
        ('81.2k', '1.24G', '12')
    """
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * factor:
            return f"{number / factor:.3g}{unit}" if abs(number) < 999.5 * factor else f"{number / factor:.0f}{unit}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """Minutes and seconds; hours and days when there are any.

    Example:
        >>> format_duration(131), format_duration(8000), format_duration(200000)
        ('2:11', '2:13:20', '2d 7:33:20')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
