"""The gradients of each step, from the program of its size; buckets.py has the sizes, compile_ahead.py the time.

A run of one size calls its jitted program, which compiles in the first step. A run of several has them compiled before
they are needed, from shapes alone, so that steps but the first seldom wait.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsjax.objectives.api import Batch
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.setup.buckets import Bucket
from dsjax.setup.compile_ahead import Ahead
from dsjax.setup.programs import Programs
from dsjax.setup.schedule import StepSchedule
from dsjax.setup.state import TrainState

Key = tuple[bool, Bucket]
"""Whether a program is that of local and sync stages, and its size."""


class Gradients:
    """Gradient programs of a run, step by step. Close it when done.

    Args:
        programs: of the run.
        optimizer: tells the stages.
        schedule: the size of each step.
        stage_at: step -> stage, as far as it is known now.
    """

    def __init__(
        self, programs: Programs, optimizer: StagedTransform, schedule: StepSchedule, stage_at: Callable[[int], str]
    ) -> None:
        self._programs, self._optimizer, self._schedule, self._stage_at = programs, optimizer, schedule, stage_at
        self._shapes: tuple[Any, dict[str, jax.ShapeDtypeStruct]] | None = None
        several = len(schedule.buckets) > 1
        self._ahead = Ahead(self._key_at, self._lower, num_steps=schedule.num_steps) if several else None

    def must_wait(self, step: int) -> bool:
        """Whether a step's program is still to be compiled."""
        return self._ahead is not None and not self._ahead.is_ready(step)

    def __call__(self, step: int, stage: str, state: TrainState, batch: Batch) -> tuple[Tree, dict[str, Any], float]:
        """Gradients and metrics of a step, and the seconds for which its program had to be waited for."""
        bucket = self._schedule.bucket_at(step)
        counts = None
        if bucket.num_kept is not None:
            counts = np.array([self._schedule.length[step], self._schedule.kept[step]], np.int32)
        inputs = self._programs.gradient_inputs(self._optimizer, stage, state, batch, counts=counts)
        if self._ahead is None:
            program, stall = self._programs.gradient_for(self._optimizer, stage, num_kept=bucket.num_kept), 0.0
        else:
            self._shapes = self._shapes or (_shapes_of(state), dict(_shapes_of(batch)))
            program, stall = self._ahead.get(step)
        gradients, metrics = program(inputs)
        return gradients, metrics, stall

    def compile_soon(self, step: int, *, step_seconds: float | None) -> None:
        """Begin to compile what is needed soon; `step_seconds` is how long a step takes, None if nobody knows yet."""
        if self._ahead is not None and step_seconds is not None:
            self._ahead.compile_soon(step, step_seconds=step_seconds)

    def _key_at(self, step: int) -> Key:
        return self._stage_at(step) in self._optimizer.local, self._schedule.bucket_at(step)

    def _lower(self, key: Key) -> jax.stages.Lowered:
        local, bucket = key
        stage = next(stage for stage in self._optimizer.updates if (stage in self._optimizer.local) == local)
        assert self._shapes is not None
        state, batch = self._shapes
        sized: Any = {name: _sized(x, bucket) for name, x in batch.items()}
        counts: Any = None if bucket.num_kept is None else jax.ShapeDtypeStruct((2,), np.int32)
        inputs = self._programs.gradient_inputs(self._optimizer, stage, state, sized, counts=counts)
        return self._programs.gradient_for(self._optimizer, stage, num_kept=bucket.num_kept).lower(inputs)

    def close(self) -> None:
        """Leave what is not compiled yet."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> "Gradients":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _sized(array: jax.ShapeDtypeStruct, bucket: Bucket) -> jax.ShapeDtypeStruct:
    """[W, A, b, T] or [W, A, b] with the rows and columns of a bucket."""
    workers, parts = array.shape[:2]
    columns = (bucket.width,) * (len(array.shape) - 3)
    return jax.ShapeDtypeStruct(
        (workers, parts, bucket.rows // (workers * parts), *columns), array.dtype, sharding=array.sharding
    )
