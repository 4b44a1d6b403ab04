"""Gradient programs of several sizes, each compiled in the background before the first step that needs it.

A run whose rows grow longer needs a handful of programs, which are known from its schedule. While one trains, a thread
compiles the next: it begins when the steps left before its first use would take LEAD times as long as the last
compilation took, and at least LEAST_LEAD seconds. Which programs there are, and in which order they are compiled,
follows from the step alone, so that all processes compile the same ones in the same order; only when each begins
depends on its clock.

A step whose program is not ready waits. That wait is the stall, and has a metric of its own.
"""

import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

LEAD = 3.0
LEAST_LEAD = 60.0


class Ahead:
    """Compiled programs by key.

    Args:
        key_at: step -> the key of the program that it needs.
        lower: key -> the traced program.
        num_steps: of the run.

    Example:
        >>> import jax
        >>> program = jax.jit(lambda x: x + 1)
        >>> lower = lambda size: program.lower(jax.ShapeDtypeStruct((size,), "float32"))
        >>> with Ahead(lambda step: 2 if step < 3 else 4, lower, num_steps=6) as ahead:
        ...     compiled, stall = ahead.get(0)
        ...     ahead.compile_soon(0, step_seconds=0.1)
        ...     ahead.get(3)[0](jax.numpy.zeros(4)).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, key_at: Callable[[int], Hashable], lower: Callable[[Any], Any], *, num_steps: int) -> None:
        self._key_at, self._lower, self._num_steps = key_at, lower, num_steps
        self._programs: dict[Hashable, Future[Any]] = {}
        self._checked = 0
        self._last_seconds = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")

    def is_ready(self, step: int) -> bool:
        """Whether a step's program is there, so that nothing is waited for."""
        future = self._programs.get(self._key_at(step))
        return future is not None and future.done()

    def get(self, step: int) -> tuple[Any, float]:
        """A step's program, and the seconds that had to be waited for it; 0 if it was there."""
        future = self._begin(self._key_at(step))
        if future.done():
            return future.result(), 0.0
        began = time.perf_counter()
        return future.result(), time.perf_counter() - began

    def compile_soon(self, step: int, *, step_seconds: float) -> None:
        """Begin to compile what the steps after this one will need soon.

        Args:
            step: the step under way.
            step_seconds: how long a step takes now.
        """
        if any(not future.done() for future in self._programs.values()):
            return
        lead = max(LEAST_LEAD, LEAD * self._last_seconds)
        horizon = min(self._num_steps, step + 2 + int(lead / max(step_seconds, 1e-6)))
        for later in range(max(self._checked, step + 1), horizon):
            self._checked = later + 1
            if (key := self._key_at(later)) not in self._programs:
                self._begin(key)
                return

    def _begin(self, key: Hashable) -> Future[Any]:
        if key not in self._programs:
            self._programs[key] = self._pool.submit(self._compile, key)
        return self._programs[key]

    def _compile(self, key: Hashable) -> Any:
        began = time.perf_counter()
        program = self._lower(key).compile()
        self._last_seconds = time.perf_counter() - began
        return program

    def close(self) -> None:
        """Leave what is not begun; wait for what is."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
