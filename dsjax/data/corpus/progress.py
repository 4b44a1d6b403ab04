"""Long jobs: in threads, and how far they have come: a bar on a terminal, a line now and then elsewhere, on stderr."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ByteProgress:
    """Counts megabytes of a job, or millions of a `unit`; use it as a context manager. Does nothing when not `enabled`.

    Example:
        >>> with ByteProgress("reading", total=10, enabled=False) as progress:
        ...     progress.advance(10)
    """

    def __init__(self, label: str, *, total: int, enabled: bool, unit: str = "MB") -> None:
        self._label, self._unit = label, unit
        self._total = max(1, total)
        self._enabled = enabled
        self._done = 0
        self._begin = self._printed = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)

    def __enter__(self) -> "ByteProgress":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=self._total, state="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and kind is None:
            self._print()

    def advance(self, num_bytes: int) -> None:
        """Count `num_bytes` more."""
        self._done += num_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, state=self._state())
        elif self._enabled and time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._print()

    def _state(self) -> str:
        rate = self._done / max(1e-9, time.monotonic() - self._begin)
        return f"{self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} {self._unit}, {rate / 1e6:,.1f} {self._unit}/s"

    def _print(self) -> None:
        self._printed = time.monotonic()
        print(f"{self._label}: {self._state()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def elapsed(label: str, *, enabled: bool) -> Iterator[None]:
    """Say on stderr every ten seconds for how long something of unknown length goes on; nothing if it is done before.

    Example:
        >>> with elapsed("sorting", enabled=True):
        ...     sorted([2, 1])
        [1, 2]
    """
    ended, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LINES):
            print(f"{label}: {time.monotonic() - begin:.0f} s so far", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, name="elapsed", daemon=True)
    if enabled:
        teller.start()
    try:
        yield
    finally:
        ended.set()
        if enabled:
            teller.join()


def in_threads(work: Callable[[int], int], numbers: Iterable[int], *, workers: int, bar: ByteProgress) -> None:
    """Do pieces of work in threads; the bar goes on by what each gives back.

    An error, or Ctrl-C, ends it: what is in work is finished, what was not begun is left.

    Args:
        work: number of a piece -> how much was done.
        numbers: of the pieces.
        workers: threads, 1 at least.
        bar: shows how far it is.

    Example:
        >>> done = []
        >>> with ByteProgress("squares", total=14, enabled=False) as bar:
        ...     in_threads(lambda n: done.append(n) or n * n, [1, 2, 3], workers=2, bar=bar)
        >>> sorted(done)
        [1, 2, 3]
    """
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="data") as pool:
        pending: set[Future[int]] = {pool.submit(work, number) for number in numbers}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                bar.advance(sum(future.result() for future in finished))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
