"""Schedule of a run: the length of each step's rows, the tokens that its middle layers keep, and their sums.

A pure function of the step, worked out for the whole run before it starts. With B rows of at most T tokens, L layers
of which L_n drop tokens, the length d and the kept count k of a step (k = d where nothing is dropped)

    effective tokens    B floor((d (L - L_n) + k L_n) / L)        what the papers call data (Megatron-DeepSpeed)
    layer tokens        B (d (L - L_n) + k L_n)                   exact

A curriculum counts its steps from 1, random-LTD from 0, as upstream.

A step runs in a bucket, a compiled size that holds it (buckets.py).
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Int64

from dsjax.data.config import CurriculumConfig, LengthConfig
from dsjax.data.curriculum.difficulty import difficulty, grown
from dsjax.data.rows.shape import BatchShape
from dsjax.models.config import RandomLTDConfig
from dsjax.observe.flops import layer_tokens as count_layer_tokens
from dsjax.optimizers.kinds.base import ScheduleConfig
from dsjax.optimizers.schedules import Clocks
from dsjax.setup.buckets import FILL, Bucket, cut_into_buckets
from dsjax.setup.config import TrainConfig


@dataclasses.dataclass(frozen=True, eq=False)
class StepSchedule:
    """Every step of a run; arrays are numbered by step from 0.

    Attributes:
        rows: rows of the step.
        length: their real columns, d.
        kept: tokens that dropping layers see, k; d where nothing is dropped.
        bucket: which of `buckets` it runs in.
        buckets: the compiled sizes, in the order in which they are first used.
        tokens, layer_tokens: effective and layer tokens before each step, and after the last: [n + 1].
        left_out: columns of a row that reshaping leaves over.
        waste: the share of the computed layer tokens that fill up buckets.
        longest: see `cut`.
    """

    rows: Int64[np.ndarray, " n"]
    length: Int64[np.ndarray, " n"]
    kept: Int64[np.ndarray, " n"]
    bucket: Int64[np.ndarray, " n"]
    buckets: tuple[Bucket, ...]
    tokens: Int64[np.ndarray, " n_plus_1"]
    layer_tokens: Int64[np.ndarray, " n_plus_1"]
    left_out: Int64[np.ndarray, " n"]
    waste: float
    longest: Callable[[int], int] | None = None

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return len(self.length)

    def clocks(self, step: int) -> Clocks:
        """The clocks after so many steps."""
        return Clocks(step, int(self.tokens[step]), int(self.layer_tokens[step]))

    def warmed(self, schedule: ScheduleConfig) -> Clocks:
        """The clocks where a learning rate's warm-up ends, or at the end of the run."""
        clock = {"steps": np.arange(self.num_steps + 1), "tokens": self.tokens, "layer_tokens": self.layer_tokens}
        reached = int(np.searchsorted(clock[schedule.warmup_by], schedule.warmup))
        return self.clocks(min(reached, self.num_steps))

    @property
    def settled(self) -> int:
        """The step from which on nothing changes any more, 0 if nothing ever does."""
        same = (self.length == self.length[-1]) & (self.kept == self.kept[-1])
        changing = np.flatnonzero(~same)
        return int(changing[-1]) + 1 if len(changing) else 0

    def bucket_at(self, step: int) -> Bucket:
        """The compiled size of a step; of a cut schedule the narrowest that holds the step's longest row."""
        bucket = self.buckets[self.bucket[step]]
        if self.longest is None or bucket.num_kept is not None:
            return bucket
        needed = min(bucket.width, self.longest(step))
        fitting = [b for b in self.buckets if b.rows == bucket.rows and b.num_kept is None and b.width >= needed]
        return min(fitting, key=lambda b: b.width)

    def shape_at(self, step: int) -> BatchShape:
        """The arrays of a step."""
        step = min(step, self.num_steps - 1)  # what is read ahead of the end is never used
        bucket = self.bucket_at(step)
        return BatchShape(bucket.rows, min(int(self.length[step]), bucket.width), bucket.width)

    def cut(self, longest: Callable[[int], int], *, most: int) -> "StepSchedule":
        """The same whose batches lose the columns that hold padding in all rows.

        Args:
            longest: step -> tokens of the longest row of its global batch, the same in all processes.
            most: programs in all; those that the schedule leaves get widths at even distances.
        """
        whole = [bucket for bucket in self.buckets if bucket.num_kept is None]
        if not whole:
            return self
        widest = max(whole, key=lambda b: b.width)
        room = most - len(self.buckets)
        widths = {-(-widest.width * part // (room + 1) // FILL) * FILL for part in range(1, room + 1)}
        more = [Bucket(widest.rows, width) for width in sorted(widths) if 0 < width < widest.width]
        buckets = (*self.buckets, *(bucket for bucket in more if bucket not in self.buckets))
        return dataclasses.replace(self, buckets=buckets, longest=functools.lru_cache(1 << 16)(longest))


def make_schedule(
    train: TrainConfig,
    curriculum: CurriculumConfig | None,
    random_ltd: RandomLTDConfig | None,
    *,
    sequence_length: int,
    num_layers: int,
) -> StepSchedule:
    """The schedule of a run: as many steps as asked for, or until the first that reaches the tokens asked for.

    Args:
        train: steps or tokens, rows, most programs.
        curriculum: only its length counts here.
        random_ltd: which tokens are dropped.
        sequence_length: T, the longest row.
        num_layers: L.

    Raises:
        ValueError: lengths or kept counts that are above T, or settings that fit no layer.

    Example:
        >>> from dsjax.data.config import FixedLinear
        >>> short_first = CurriculumConfig(length=LengthConfig(min=8, schedule=FixedLinear(steps=4)))
        >>> train = TrainConfig(steps=6, batch_size=2)
        >>> schedule = make_schedule(train, short_first, None, sequence_length=32, num_layers=2)
        >>> schedule.length.tolist(), schedule.tokens.tolist()
        ([8, 16, 24, 32, 32, 32], [0, 16, 48, 96, 160, 224, 288])
    """
    lengths = curriculum.length if curriculum else None
    most = _checked(lengths, random_ltd, sequence_length)
    dropping = random_ltd.dropping_layers(num_layers) if random_ltd else 0
    sized = functools.partial(_sizes, train, lengths, random_ltd, sequence_length=sequence_length, most=most)
    counted = functools.partial(_counted, num_layers=num_layers, dropping_layers=dropping)

    count = train.steps or -(-train.tokens // (train.batch_size * sequence_length))
    rows, length, kept, left_out = sized(count)
    tokens, layer_tokens = counted(rows, length, kept)
    while train.tokens and tokens[-1] < train.tokens:
        count *= 2
        rows, length, kept, left_out = sized(count)
        tokens, layer_tokens = counted(rows, length, kept)
    if train.tokens:
        count = int(np.searchsorted(tokens, train.tokens))
    rows, length, kept, left_out = (x[:count] for x in (rows, length, kept, left_out))
    share = dropping / num_layers
    bucket, buckets = cut_into_buckets(rows, length, kept, most=train.max_programs, room=sequence_length, share=share)
    steps_in = np.bincount(bucket, minlength=len(buckets))
    size = num_layers * np.array([b.rows * (b.width * (1 - share) + b.slots * share) for b in buckets])
    waste = 1.0 - float(layer_tokens[count] / (steps_in @ size))
    return StepSchedule(
        rows, length, kept, bucket, buckets, tokens[: count + 1], layer_tokens[: count + 1], left_out, max(0.0, waste)
    )


def _sizes(
    train: TrainConfig,
    lengths: LengthConfig | None,
    random_ltd: RandomLTDConfig | None,
    count: int,
    *,
    sequence_length: int,
    most: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows, lengths, kept counts and columns left over of the first steps."""
    numbers = np.arange(count, dtype=np.int64)
    rows = np.full(count, train.batch_size, np.int64)
    length, left_out = np.full(count, sequence_length, np.int64), np.zeros(count, np.int64)
    if lengths is not None:
        length = difficulty(lengths.schedule, numbers + 1, least=lengths.min, most=most)
        if lengths.mode == "reshape":
            cuts = _cuts(sequence_length, length, train.max_programs)
            length, rows = sequence_length // cuts, rows * cuts
            left_out = sequence_length - length * cuts
    kept = length
    if random_ltd is not None:
        slots = grown(
            numbers,
            random_ltd.steps,
            least=random_ltd.min_kept,
            most=random_ltd.max_kept or sequence_length,
            quantum=random_ltd.quantum,
        )
        kept = np.minimum(length, slots)
    return rows, length, kept, left_out


def _counted(
    rows: np.ndarray, length: np.ndarray, kept: np.ndarray, *, num_layers: int, dropping_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Effective and layer tokens before each step, and after the last."""
    layers = {"num_layers": num_layers, "dropping_layers": dropping_layers}
    each = count_layer_tokens(rows=1, length=length, kept=kept, **layers)
    added = lambda counts: np.concatenate([[0], np.cumsum(counts)])
    return added(rows * (each // num_layers)), added(rows * each)


def _checked(lengths: LengthConfig | None, random_ltd: RandomLTDConfig | None, sequence_length: int) -> int:
    """The longest row of a curriculum."""
    most = sequence_length
    if lengths is not None:
        most = lengths.max or sequence_length
        if max(most, lengths.min) > sequence_length:
            raise ValueError(
                f"curriculum.length goes from {lengths.min} to {most}, but rows have data.sequence_length = "
                f"{sequence_length} tokens; make it smaller, or the rows longer"
            )
    if random_ltd is not None and max(random_ltd.min_kept, random_ltd.max_kept) > sequence_length:
        raise ValueError(
            f"random_ltd keeps from {random_ltd.min_kept} to {random_ltd.max_kept or sequence_length} tokens, but rows "
            f"have data.sequence_length = {sequence_length}; make it smaller, or the rows longer"
        )
    return most


def _cuts(sequence_length: int, length: np.ndarray, most: int) -> np.ndarray:
    """Into how many rows a row is cut so that none is longer than asked for; at most so many different numbers.

    Above that, numbers of cuts are thinned out evenly on a logarithmic scale: rows may then be shorter than asked for.
    """
    cuts = -(-sequence_length // length)
    found = np.unique(cuts)
    if len(found) > most:
        wanted = np.geomspace(found[0], found[-1], most)
        found = found[np.unique(np.abs(found[:, None] - wanted).argmin(axis=0))]
        found = np.union1d(found, found[-1:])
    return found[np.minimum(np.searchsorted(found, cuts), len(found) - 1)]
