"""A trace of a few steps, for `tensorboard` or https://ui.perfetto.dev."""

from pathlib import Path


class TraceWindow:
    """Traces the steps START to STOP-1.

    Call `step` before each step and `close` at the end. The trace ends when the work dispatched before STOP has run,
    which needs something to wait for: pass the last step's outputs.

    Args:
        spec: 'START:STOP', or '' for no trace.
        directory: folder of the traces.

    Raises:
        ValueError: a spec of another form.

    Example:
        >>> window = TraceWindow("", Path("unused"))
        >>> window.step(1)
        >>> window.close()
    """

    def __init__(self, spec: str, directory: Path):
        start, colon, stop = spec.partition(":")
        if spec and not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
            raise ValueError(f"profile must be START:STOP with START < STOP; got {spec!r}")
        self.directory = directory
        self.active = False
        self._start, self._stop = (int(start), int(stop)) if spec else (0, 0)

    def step(self, step: int, *, pending: object = None) -> None:
        """Starts or ends the trace if it is time; `pending` is a pytree of arrays of the step before, or None.

        A run resumed inside the window traces the rest of it.
        """
        if not self.active and self._start <= step < self._stop:
            import jax

            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self.directory))
            self.active = True
        elif self.active and step >= self._stop:
            self.close(pending=pending)

    def close(self, *, pending: object = None) -> None:
        """Ends the trace if it is still going."""
        if self.active:
            import jax

            jax.block_until_ready(pending)
            jax.profiler.stop_trace()
            self.active = False
