"""Sums over whole tensors of which each device holds a part, inside a fully manual shard_map.

There a norm by itself is a norm of the device's own part. What is per tensor (a scale, a norm, a maximum) goes through
here: one collective for all tensors together, over the mesh axes that split tensors, never over the workers' axis.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

Rows = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Shards:
    """The split of tensors over the axes of a mesh.

    Attributes:
        axes: mesh axes over which a tensor may be split; empty when every device holds whole tensors.
        parts: for each tensor, into how many different parts it is split.
        copies: for each tensor, how many devices of `axes` hold the same part.
    """

    axes: tuple[str, ...]
    parts: tuple[int, ...]
    copies: tuple[int, ...]

    @classmethod
    def of(cls, specs: Sequence[PartitionSpec], axis_sizes: Mapping[str, int]) -> "Shards":
        """From the tensors' specs.

        Args:
            specs: one for each tensor.
            axis_sizes: of the axes that may split tensors.

        Example:
            >>> Shards.of([PartitionSpec(None, ("tensor", "fsdp")), PartitionSpec()], {"fsdp": 2, "tensor": 4})
            Shards(axes=('fsdp', 'tensor'), parts=(8, 1), copies=(1, 8))
        """
        axes = tuple(axis for axis, size in axis_sizes.items() if size > 1)
        parts = tuple(math.prod(axis_sizes[axis] for axis in axes_of(spec) if axis in axis_sizes) for spec in specs)
        whole = math.prod(axis_sizes.values())
        return cls(axes, parts, tuple(whole // part for part in parts))

    @classmethod
    def whole(cls, num_tensors: int) -> "Shards":
        """Of tensors that every device holds whole."""
        return cls((), (1,) * num_tensors, (1,) * num_tensors)

    def sums(self, rows: Rows) -> Rows:
        """Sums of this device's parts -> sums of whole tensors.

        Args:
            rows: for each tensor the sums over its part, [S] float32: one for each layer of a stack. The list may hold
                several quantities one after the other: tensor i of `parts` is the one at i modulo their number.
        """
        if not self.axes:
            return rows
        shared = [row / self.copies[i % len(self.copies)] for i, row in enumerate(rows)]
        return self._together(shared, lambda joined: jax.lax.psum(joined, self.axes))

    def maxima(self, rows: Rows) -> Rows:
        """Largest values of this device's parts, [S] for each tensor -> those of whole tensors."""
        return self._together(rows, lambda joined: jax.lax.pmax(joined, self.axes)) if self.axes else rows

    def _together(self, rows: Rows, reduce: Callable[[jax.Array], jax.Array]) -> Rows:
        if not rows:
            return rows
        joined = reduce(jnp.concatenate(rows))
        ends = itertools.accumulate((row.shape[0] for row in rows), initial=0)
        return [joined[start:end] for start, end in itertools.pairwise(ends)]


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec names.

    Example:
        >>> axes_of(PartitionSpec(None, ("tensor", "fsdp"), "data"))
        ('tensor', 'fsdp', 'data')
    """
    names: list[str] = []
    for entry in spec:
        names += [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
    return tuple(names)
