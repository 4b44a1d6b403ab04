"""Load by other programs while our processes work; by process, so that the network's work is not theirs."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

KERNEL = 2  # the parent of the kernel's threads, which carry our packets
BEFORE_SECONDS = 2.0


def parse_stat(text: str) -> tuple[int, int]:
    """Parent and clock ticks (its own and those of children that have ended) from /proc/PID/stat.

    Example:
        >>> parse_stat("7 (a (b) c) S 3 7 7 0 -1 0 0 0 0 0 10 20 30 40 20 0")
        (3, 100)
    """
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), sum(int(field) for field in fields[11:15])


def ticks() -> tuple[int, int]:
    """Clock ticks spent until now by this process with all that it started, and by all others."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            table[int(folder.name)] = parse_stat((folder / "stat").read_text())
    ours, others = 0, 0
    for pid, (parent, spent) in table.items():
        above = pid
        while above != os.getpid() and above in table:
            above = table[above][0]
        if above == os.getpid():
            ours += spent
        elif KERNEL not in (pid, parent):
            others += spent
    return ours, others


class Others:
    """Cores that others kept busy, on average over what is watched."""

    def __init__(self) -> None:
        self.ticks, self.seconds = 0, 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count what happens inside."""
        began, before = time.perf_counter(), ticks()[1]
        yield
        self.ticks += max(0, ticks()[1] - before)
        self.seconds += time.perf_counter() - began

    def cores(self) -> float:
        """The average so far."""
        return self.ticks / os.sysconf("SC_CLK_TCK") / self.seconds if self.seconds else 0.0


def busy_before() -> float:
    """Cores that others keep busy now, while nothing of ours runs."""
    others = Others()
    with others.watched():
        time.sleep(BEFORE_SECONDS)
    return others.cores()
