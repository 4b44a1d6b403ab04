"""Rows from the host onto the mesh: each process reads only the rows that its own devices hold."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.mesh.layout import BATCH_AXES, Layout
from dsjax.setup.schedule import StepSchedule
from dsjax.setup.step import BATCH_SPEC

EVALUATION_SPEC = PartitionSpec(("data", *BATCH_AXES))


class Placement:
    """Placement of the rows of a global batch on the mesh.

    Args:
        sharding: of an array whose first dimensions number the rows.
        grid: sizes of these dimensions; their product is the number of rows.

    Attributes:
        positions: the rows that this process holds, in order, as numbers in the global batch.
    """

    def __init__(self, sharding: NamedSharding, grid: tuple[int, ...]) -> None:
        self.sharding, self.grid = sharding, grid
        self._numbers = np.arange(int(np.prod(grid))).reshape(grid)
        indices = sharding.addressable_devices_indices_map(grid).values()
        self.positions = np.unique(np.concatenate([self._numbers[index].ravel() for index in indices]))

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Arrays [n, ...] of this process' rows, in the order of `positions`, as global arrays [*grid, ...]."""
        return {name: self._place(value) for name, value in rows.items()}

    def _place(self, value: np.ndarray) -> jax.Array:
        assert len(value) == len(self.positions)

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            numbers = self._numbers[index[: len(self.grid)]]
            return value[np.searchsorted(self.positions, numbers)][(..., *index[len(self.grid) :])]

        return jax.make_array_from_callback(self.grid + value.shape[1:], self.sharding, piece)


def training_placement(layout: Layout, *, batch_size: int, accumulation: int) -> Placement:
    """Rows as [W, A, b]: workers, accumulated parts, rows.

    Raises:
        ValueError: the batch cannot be cut evenly.
    """
    workers, shards = layout.mesh.shape["data"], layout.size(BATCH_AXES)
    parts = workers * accumulation * shards
    if batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(
            f"train.batch_size = {batch_size} cannot be cut into data {workers} x accumulation {accumulation} x "
            f"(fsdp * expert) {shards} = {parts} equal parts; use a multiple of {parts}, such as {near}"
        )
    return Placement(layout.named(BATCH_SPEC), (workers, accumulation, batch_size // (workers * accumulation)))


def training_placements(layout: Layout, schedule: StepSchedule, *, accumulation: int) -> dict[int, Placement]:
    """Number of rows -> where a batch of so many lies, for all that a run has.

    Raises:
        ValueError: a batch cannot be cut evenly.
    """
    sizes = {bucket.rows for bucket in schedule.buckets}
    return {rows: training_placement(layout, batch_size=rows, accumulation=accumulation) for rows in sorted(sizes)}


def evaluation_placement(layout: Layout, *, batch_size: int) -> Placement:
    """Rows as [B], over all the batch axes at once."""
    parts = layout.size(("data", *BATCH_AXES))
    if batch_size % parts:
        raise ValueError(f"evaluate.batch_size = {batch_size} must be divisible by data * fsdp * expert = {parts}")
    return Placement(layout.named(EVALUATION_SPEC), (batch_size,))
