"""A save in flight: its processes agree that every part is written before it counts as whole."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsjax.checkpoint import manifest

_POLL_S = 0.5


@dataclasses.dataclass(kw_only=True)
class Save:
    """One save and, when its thread has ended, the result: `error` is '' if it is whole."""

    step: int
    """Steps done."""
    path: Path
    """Its final name."""
    unfinished: Path
    """The name under which it is written."""
    thread: threading.Thread | None = None
    """The thread that writes it."""
    error: str = "the thread that writes checkpoints has ended unexpectedly"
    """The error of this process; '' if there is none."""

    def tell_failure(self, process: int) -> None:
        """Leaves an empty file by which the other processes see that this one has failed."""
        self._mark(process).touch()

    def wait_for_commit(self, result: Callable[[float], None]) -> None:
        """Returns when orbax has written all. By itself orbax would wait 20 minutes for a process that has failed.

        Args:
            result: waits so many seconds for orbax; raises TimeoutError without a message if that is not enough.

        Raises:
            OSError: another process failed. Whatever `result` raises is passed on.
        """
        while True:
            try:
                return result(_POLL_S)
            except TimeoutError as error:
                if error.args:  # one of orbax's own
                    raise
            self._raise_if_another_failed()

    def wait_for_parts(self) -> None:
        """Process 0: returns when every process has written its part and together they cover every file.

        Raises:
            OSError: another process failed, or a file is in no part.
        """
        while not manifest.is_complete(self.unfinished):
            self._raise_if_another_failed()
            time.sleep(_POLL_S / 10)
        if problems := manifest.uncovered(self.unfinished):
            raise OSError("the files changed while they were hashed: " + "; ".join(problems))

    def _mark(self, process: int | str) -> Path:
        return self.unfinished.with_name(f"{self.unfinished.name}.failed_{process}")

    def _raise_if_another_failed(self) -> None:
        if any(self.unfinished.parent.glob(self._mark("*").name)):
            raise OSError("another process failed")


def agree(text: str) -> list[str]:
    """Every process's text, in order of process, on every process. Main thread only: it is a device collective.

    Example:
        >>> agree("fine")
        ['fine']
    """
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(encoded.size))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [rows[i, : int(size)].tobytes().decode() for i, size in enumerate(sizes)]
