"""The compiled sizes of a run's steps: lengths and kept counts change often, programs are few.

A step runs in a bucket, a size that holds it. Buckets are the split of all pairs of length and kept count of a run, in
their order, into at most so many groups that fewest layer tokens are computed for nothing. Dense steps never share a
bucket with dropping ones.
"""

import dataclasses

import numpy as np

FILL = 8  # widths and slots are filled up to multiples of this, where the row has room


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A compiled size.

    Attributes:
        rows: of a step.
        width: columns.
        num_kept: slots of the layers that drop tokens; None for the program that drops none.
    """

    rows: int
    width: int
    num_kept: int | None = None

    @property
    def slots(self) -> int:
        """Columns that the dropping layers see."""
        return self.width if self.num_kept is None else self.num_kept


def cut_into_buckets(
    rows: np.ndarray, length: np.ndarray, kept: np.ndarray, *, most: int, room: int, share: float
) -> tuple[np.ndarray, tuple[Bucket, ...]]:
    """The bucket of each step, and the buckets in the order of their first use; `share` of the layers drop tokens."""
    dropping = kept < length
    sizes, step_size, count = np.unique(
        np.stack([dropping, rows, length, kept], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    step_size = step_size.ravel()
    group = _split(sizes, count, most=most, share=share)
    found = []
    for number in range(group.max() + 1):
        some = sizes[group == number]
        width = min(room, -(-int(some[:, 2].max()) // FILL) * FILL)
        slots = min(width, -(-int(some[:, 3].max()) // FILL) * FILL) if some[0, 0] else None
        found.append(Bucket(rows=int(some[0, 1]), width=width, num_kept=slots))
    used = group[step_size]
    first = [int(np.argmax(used == number)) for number in range(len(found))]
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[used], tuple(found[number] for number in order)


def _split(sizes: np.ndarray, count: np.ndarray, *, most: int, share: float) -> np.ndarray:
    """The group of each size (dropping, rows, length, kept), which are sorted: runs of neighbours, least waste.

    waste[g][j] = least layer tokens computed for nothing when the first j sizes make g groups.
    """
    num, cost = len(sizes), _group_costs(sizes, count, share)
    waste = np.full((min(most, num) + 1, num + 1), np.inf)
    waste[0, 0] = 0
    begin = np.zeros(waste.shape, np.int64)
    for groups in range(1, len(waste)):
        total = waste[groups - 1][:num, None] + cost  # [first of the last group, its last]
        begin[groups, 1:] = total.argmin(axis=0)
        waste[groups, 1:] = total.min(axis=0)
    groups = int(np.argmin(waste[:, num]))
    if not np.isfinite(waste[groups, num]):
        kinds = len(np.unique(sizes[:, :2], axis=0))
        raise ValueError(f"train.max_programs = {most} is too few: this schedule needs {kinds} at least")
    result, end = np.empty(num, np.int64), num
    for number in range(groups, 0, -1):
        start = begin[number, end]
        result[start:end] = number - 1
        end = start
    return result


def _group_costs(sizes: np.ndarray, count: np.ndarray, share: float) -> np.ndarray:
    """[first, last] -> layer tokens computed for nothing if sizes first .. last share a bucket; inf if they cannot."""
    num = len(sizes)
    weighed = lambda length, kept: length * (1 - share) + kept * share
    real = count * sizes[:, 1] * weighed(sizes[:, 2], sizes[:, 3])
    cost = np.full((num, num), np.inf)
    for first in range(num):
        some = sizes[first:]
        length = np.maximum.accumulate(some[:, 2])
        kept = np.maximum.accumulate(some[:, 3])
        steps = np.cumsum(count[first:] * some[:, 1])
        waste = steps * weighed(length, kept) - np.cumsum(real[first:])
        same = (some[:, :2] == some[0, :2]).all(axis=1)
        cost[first, first:] = np.where(np.logical_and.accumulate(same), waste, np.inf)
    return cost
