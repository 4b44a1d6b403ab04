"""Folders that one process builds while others wait for it."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(partial: Path, *, progress: bool) -> Iterator[bool]:
    """Hold the lock in the folder `partial`; False when the process that had it took the folder away, its work done.

    The kernel frees the lock of a process that dies, however it dies.

    Args:
        partial: where something is built; it is made if it is not there.
        progress: say on stderr that another process is waited for.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp(), "x.partial"), progress=False) as held:
        ...     held
        True
    """
    partial.mkdir(parents=True, exist_ok=True)
    try:
        lock = (partial / "lock").open("a")
    except FileNotFoundError:
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"waiting for the process that builds {partial}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        path = partial / "lock"
        yield path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino


@contextlib.contextmanager
def full_disk_as_message(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a ValueError that names the folder.

    Example:
        >>> with full_disk_as_message(Path("x")):
        ...     raise OSError(errno.ENOSPC, "no space left")
        Traceback (most recent call last):
        ...
        ValueError: the disk of x is full; what was done is kept: make room, run again
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"the disk of {folder} is full; what was done is kept: make room, run again") from error
