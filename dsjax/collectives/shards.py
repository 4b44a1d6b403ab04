"""Sums over whole tensors of which each device holds a part, inside a fully manual shard_map.

There a norm by itself is a norm of the device's own part. What is per tensor (a scale, a norm, a maximum) goes through
here: one collective for all tensors together, over the mesh axes that split tensors, never over the workers' axis.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

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
        between: for each array, the axes between whose devices whole tensors are shared out (experts), which no sum of
            one tensor crosses.
    """

    axes: tuple[str, ...]
    parts: tuple[int, ...]
    copies: tuple[int, ...]
    between: tuple[tuple[str, ...], ...]

    @classmethod
    def of(
        cls, specs: Sequence[PartitionSpec], axis_sizes: Mapping[str, int], leading: Sequence[int] | None = None
    ) -> "Shards":
        """From the arrays' specs.

        Args:
            specs: one for each array.
            axis_sizes: of the axes that may split tensors.
            leading: how many of an array's first dimensions count tensors; None: of none any.

        Example:
            >>> Shards.of([PartitionSpec(None, ("tensor", "fsdp")), PartitionSpec()], {"fsdp": 2, "tensor": 4})
            Shards(axes=('fsdp', 'tensor'), parts=(8, 1), copies=(1, 8), between=((), ()))
            >>> Shards.of([PartitionSpec("expert", "fsdp")], {"fsdp": 2, "expert": 4, "tensor": 2}, [1])
            Shards(axes=('fsdp', 'expert', 'tensor'), parts=(2,), copies=(2,), between=(('expert',),))
        """
        leading = [0] * len(specs) if leading is None else leading
        axes = tuple(axis for axis, size in axis_sizes.items() if size > 1)
        size = lambda names: math.prod(axis_sizes[axis] for axis in names if axis in axis_sizes)
        between = tuple(
            tuple(axis for axis in axes_of(spec[:first]) if axis in axes)
            for spec, first in zip(specs, leading, strict=True)
        )
        parts = tuple(size(axes_of(spec[first:])) for spec, first in zip(specs, leading, strict=True))
        whole = math.prod(axis_sizes.values())
        copies = tuple(whole // size(own) // part for own, part in zip(between, parts, strict=True))
        return cls(axes, parts, copies, between)

    @classmethod
    def whole(cls, num_tensors: int) -> "Shards":
        """Of tensors that every device holds whole."""
        return cls((), (1,) * num_tensors, (1,) * num_tensors, ((),) * num_tensors)

    def only(self, i: int) -> "Shards":
        """Of one of the arrays."""
        return Shards(self.axes, (self.parts[i],), (self.copies[i],), (self.between[i],))

    def sums(self, rows: Rows) -> Rows:
        """Sums of this device's parts -> sums of whole tensors.

        Args:
            rows: for each tensor the sums over its part, [S] float32: one for each layer of a stack. The list may hold
                several quantities one after the other: tensor i of `parts` is the one at i modulo their number.
        """
        if not self.axes:
            return rows
        shared = [row / self.copies[i % len(self.copies)] for i, row in enumerate(rows)]
        return self._together(shared, jax.lax.psum)

    def maxima(self, rows: Rows) -> Rows:
        """Largest values of this device's parts, [S] for each tensor -> those of whole tensors."""
        return self._together(rows, jax.lax.pmax) if self.axes else rows

    def _together(self, rows: Rows, reduce: Callable[[jax.Array, tuple[str, ...]], jax.Array]) -> Rows:
        """One collective for all rows that are reduced over the same axes."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in range(len(rows)):
            between = self.between[i % len(self.between)]
            groups.setdefault(tuple(axis for axis in self.axes if axis not in between), []).append(i)
        reduced = list(rows)
        for axes, members in groups.items():
            if not axes:
                continue
            joined = reduce(jnp.concatenate([rows[i] for i in members]), axes)
            ends = itertools.accumulate((rows[i].shape[0] for i in members), initial=0)
            for i, (start, end) in zip(members, itertools.pairwise(ends), strict=True):
                reduced[i] = joined[start:end]
        return reduced


def axes_of(spec: Iterable[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """The mesh axes that a spec names.

    Example:
        >>> axes_of(PartitionSpec(None, ("tensor", "fsdp"), "data"))
        ('tensor', 'fsdp', 'data')
    """
    names: list[str] = []
    for entry in spec:
        names += [] if entry is None else [entry] if isinstance(entry, str) else list(entry)
    return tuple(names)
