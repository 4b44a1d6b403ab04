"""SIGTERM and Ctrl-C: finish the step, save, say how to go on. A second Ctrl-C stops at once."""

import os
import signal
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal and can be resumed (EX_TEMPFAIL)."""


class StopRequest:
    """Notes the first SIGTERM or SIGINT while it is in force.

    Example:
        >>> with StopRequest() as stop:
        ...     stop.received
        ''
    """

    def __init__(self) -> None:
        self.received = ""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            # Not print: the handler may have interrupted one.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more stops at once\n")
        self.received = self.received or signal.Signals(number).name
