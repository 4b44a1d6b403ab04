"""Curriculum learning (arXiv 2212.03597): the row that each draw takes, as a pure function of the draw.

Rows have a difficulty by each of some metrics; a schedule says how difficult a row may be at each step. Training draws
rows one after another: draw k = step * batch_size + position.

    step -> N_m, the rows that are easy enough by metric m       by percentile d: the easiest floor(N d / 100) of all N
                                                                 rows sorted by (difficulty, row); by value: those <= d
         -> clusters                                             cluster c: the rows that became visible when any N_m
                                                                 grew the c-th time; visible: within N_m by every m
    k -> cluster                                                 hash(k) mod all visible rows: by the clusters' sizes
    -> j, the number of earlier draws from that cluster          totals of blocks of draws, then the rank in the block
    -> epoch e = j // size, place = j % size
    -> row = permutation(seed, cluster, e)[place] of the cluster

Each visible row is so as likely as any other one, and none comes twice before all of its cluster have come. DeepSpeed
(data_sampling/data_sampler.py) draws from the same distribution with a random stream that has to be kept and sent
around; here there is no state, so that any step can be computed on any host. Two choices differ from it: its percentile
is a multiple of N // max rows, here it is the exact share; and what is visible only ever grows, also when a schedule of
the user's own goes back. A growth that adds no row makes no cluster, as there.

B rows of a batch, N rows in all.
"""

import threading
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from dsjax.data.config import CurriculumConfig, CustomSchedule, DataConfig, DifficultyConfig, FixedDiscrete
from dsjax.data.curriculum.difficulty import difficulty
from dsjax.data.rows.formats import row_format
from dsjax.data.rows.permute import fold, fold_each, mix, permute_each

_CLUSTER, _WITHIN = 21, 22
_BLOCK = 1 << 14
_KEPT_BLOCKS = 8
_FIRST_STEPS, _MOST_STEPS = 1 << 12, 1 << 20  # that are looked at together
_ALWAYS = np.iinfo(np.int64).max


class Curriculum:
    """Choice of the row that each draw takes. Safe to use from several threads.

    Example, in somebody's own grain pipeline: 100 rows of which the last is the easiest, four a step.

        >>> import grain
        >>> from dsjax.data.config import FixedLinear
        >>> values = np.arange(100)[::-1]
        >>> growth = DifficultyConfig(metric="mine", min=10, max=100, schedule=FixedLinear(steps=9, quantum=10))
        >>> curriculum = Curriculum({"mine": values}, [growth], batch_size=4)
        >>> [curriculum.visible(step) for step in range(10)]
        [20, 30, 40, 50, 60, 70, 80, 90, 100, 100]
        >>> batches = grain.MapDataset.range(1000).map(lambda step: curriculum.rows(step * 4 + np.arange(4)))
        >>> all(values[batches[step]].max() < curriculum.visible(step) for step in range(10))
        True
    """

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        difficulty: Sequence[DifficultyConfig],
        *,
        batch_size: int,
        seed: int = 0,
        num_steps: int | None = None,
    ) -> None:
        """Draw from N rows.

        Args:
            values: of each metric, the difficulty of each row, int64 [N].
            difficulty: what may be drawn when; each metric must be among `values`.
            batch_size: draws of a step.
            seed: of the order.
            num_steps: of the run; schedules are not asked about later steps, which are as the last one. What earlier
                steps draw does not depend on it.

        Raises:
            ValueError: no metric, values that are missing, that are no whole numbers or not as many for each metric;
                fewer rows at the first step than a batch has; a schedule of the user's own that fails.
        """
        self._metrics = [_Metric(values, one) for one in difficulty]
        sizes = {len(metric.order) for metric in self._metrics}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"a curriculum needs metrics with one difficulty for each row; got {sorted(sizes)} rows for the "
                f"{len(self._metrics)} metrics"
            )
        self.num_rows = sizes.pop()
        self._batch_size, self._last_step = batch_size, _ALWAYS if num_steps is None else num_steps
        self._cluster_key, self._row_key = fold(_CLUSTER, seed), fold(_WITHIN, seed)
        self._lock = threading.Lock()
        # Steps below `_known` are worked out: clusters begin at `_first_steps` and end at `_ends` of `_rows`.
        self._known = 0
        self._prefixes = np.zeros(len(self._metrics), np.int64)
        self._first_steps = np.zeros(0, np.int64)
        self._ends = np.zeros(0, np.int64)
        self._rows = np.empty(self.num_rows, np.int64)
        self._before = [np.zeros(0, np.int64)]
        self._blocks: dict[int, np.ndarray] = {}
        first = self.visible(0)
        if first < batch_size:
            raise ValueError(
                f"{first} of {self.num_rows} rows may be drawn at the first step "
                f"({', '.join(metric.describe(0) for metric in self._metrics)}), fewer than the {batch_size} of a "
                f"batch: {self._begin_higher(batch_size)}, or take a smaller batch or more data"
            )

    def _begin_higher(self, batch_size: int) -> str:
        if len(self._metrics) == 1 and batch_size <= self.num_rows:
            return self._metrics[0].begin_higher(batch_size)
        return "begin with a higher difficulty"

    def visible(self, step: int) -> int:
        """Rows that may be drawn at a step, counted from 0."""
        with self._lock:
            self._extend(step)
            clusters = int(np.searchsorted(self._first_steps, step, side="right"))
            return int(self._ends[clusters - 1]) if clusters else 0

    def rows(self, draws: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """The row 0..N-1 of each draw, in any order."""
        draws = np.asarray(draws, np.int64)
        assert len(draws) == 0 or draws.min() >= 0, "draws are counted from 0"
        blocks, places = np.divmod(draws, _BLOCK)
        result = np.empty_like(draws)
        for block in np.unique(blocks).tolist():
            chosen = blocks == block
            result[chosen] = self._block(block)[places[chosen]]
        return result

    def _block(self, block: int) -> np.ndarray:
        """The rows of the draws from block * _BLOCK on."""
        # Threads that read ahead want the same block at the same time: one works it out.
        with self._lock:
            if block not in self._blocks:
                found = self._make_block(block)
                while len(self._blocks) >= _KEPT_BLOCKS:
                    del self._blocks[next(iter(self._blocks))]
                self._blocks[block] = found
            return self._blocks[block]

    def _make_block(self, block: int) -> np.ndarray:
        clusters = self._clusters(block)
        nth = self._draws_before(block)[clusters] + _earlier(clusters)
        begins = np.concatenate([[0], self._ends[:-1]])
        sizes = (self._ends - begins)[clusters]
        epochs, places = np.divmod(nth, sizes)
        places = permute_each(places, sizes, keys=fold_each(self._row_key, clusters, epochs))
        return self._rows[begins[clusters] + places]

    def _clusters(self, block: int) -> np.ndarray:
        """The cluster of each draw of a block."""
        draws = block * _BLOCK + np.arange(_BLOCK)
        steps = draws // self._batch_size
        self._extend(int(steps[-1]))
        visible = self._ends[np.searchsorted(self._first_steps, steps, side="right") - 1]
        if visible[-1] == self._ends[0]:
            return np.zeros(_BLOCK, np.int64)
        chosen = (mix(draws, self._cluster_key) % visible.astype(np.uint64)).astype(np.int64)
        return np.searchsorted(self._ends, chosen, side="right")

    def _draws_before(self, block: int) -> np.ndarray:
        """Draws from each cluster before a block; totals of all blocks up to the furthest one asked for are kept."""
        while len(self._before) <= block:
            counts = np.bincount(self._clusters(len(self._before) - 1))
            counts[: len(self._before[-1])] += self._before[-1]
            self._before.append(counts)
        before = np.zeros(len(self._ends), np.int64)
        before[: len(self._before[block])] = self._before[block]
        return before

    def _extend(self, step: int) -> None:
        """Work out the clusters of all steps up to `step`."""
        while self._known <= step:
            begin = self._known
            end = begin + min(max(begin, _FIRST_STEPS), _MOST_STEPS)
            steps = np.minimum(np.arange(begin, end) + 1, self._last_step)
            grown = np.stack([metric.prefixes(steps) for metric in self._metrics], axis=1)
            grown = np.maximum.accumulate(np.concatenate([self._prefixes[None], grown]), axis=0)
            changes = np.flatnonzero((np.diff(grown, axis=0) > 0).any(axis=1))
            for place in changes.tolist():
                self._add_cluster(begin + place, grown[place], grown[place + 1])
            self._prefixes = grown[-1]
            full = end >= self._last_step or all(
                n == metric.most for n, metric in zip(self._prefixes, self._metrics, strict=True)
            )
            self._known = _ALWAYS if full else end

    def _add_cluster(self, step: int, before: np.ndarray, after: np.ndarray) -> None:
        # A row is new if by all metrics it is within `after`, and by one it was not within `before`.
        new = np.zeros(0, np.int64)
        for metric, begin, end in zip(self._metrics, before.tolist(), after.tolist(), strict=True):
            some = metric.order[begin:end]
            for other, most in zip(self._metrics, after.tolist(), strict=True):
                some = some if other is metric else some[other.rank[some] < most]
            new = np.union1d(new, some)
        if len(new):
            end = int(self._ends[-1]) if len(self._ends) else 0
            self._rows[end : end + len(new)] = new
            self._first_steps = np.append(self._first_steps, step)
            self._ends = np.append(self._ends, end + len(new))


class _Metric:
    """One metric's rows, easiest first, and how many of them a step may draw."""

    def __init__(self, values: Mapping[str, np.ndarray], config: DifficultyConfig) -> None:
        if config.metric not in values:
            raise ValueError(f"no difficulties for the metric {config.metric!r}; there are {sorted(values)}")
        found = np.asarray(values[config.metric])
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"difficulties by {config.metric} must be whole numbers, one a row; got {found.dtype} {found.shape}"
            )
        self._config = config
        self.order = np.argsort(found, kind="stable")
        self._sorted = found[self.order]
        self.rank = np.empty(len(found), np.int64)
        self.rank[self.order] = np.arange(len(found))
        self.most = int(self._prefix(np.array([config.max]))[0])

    def prefixes(self, steps: np.ndarray) -> np.ndarray:
        """Count the rows that are easy enough at steps that are counted from 1."""
        config = self._config
        return self._prefix(difficulty(config.schedule, steps, least=config.min, most=config.max))

    def _prefix(self, difficulties: np.ndarray) -> np.ndarray:
        if self._config.by == "value":
            return np.searchsorted(self._sorted, difficulties, side="right")
        return len(self.order) * difficulties // 100

    def describe(self, step: int) -> str:
        config = self._config
        reached = int(difficulty(config.schedule, np.array([step + 1]), least=config.min, most=config.max)[0])
        return f"{config.metric} up to {reached}" + (" percent" if config.by == "percentile" else "")

    def begin_higher(self, rows: int) -> str:
        """Advise how the first step may draw so many rows."""
        schedule, most = self._config.schedule, self._config.max
        least = int(self._sorted[rows - 1]) if self._config.by == "value" else -(-100 * rows // len(self.order))
        if isinstance(schedule, FixedDiscrete):
            return f"make the first of difficulties {least} or more"
        if isinstance(schedule, CustomSchedule):
            return f"let {schedule.function}(1) be {least} or more"
        least += -least % schedule.quantum
        if self._config.by == "percentile" and least > 100:
            return "take a smaller quantum and a larger min"
        return f"raise min to {least}" + (f" and max to {least} or more" if least > most else "")


def _earlier(labels: np.ndarray) -> np.ndarray:
    """For each entry, the earlier ones that are equal."""
    order = np.argsort(labels.astype(np.uint16) if labels.max() < 1 << 16 else labels, kind="stable")
    ordered = labels[order]
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    result = np.empty_like(labels)
    result[order] = np.arange(len(labels)) - np.repeat(begins, np.diff(begins, append=len(labels)))
    return result


def check_curriculum(config: CurriculumConfig, data: DataConfig) -> None:
    """Refuse a curriculum that does not fit the data.

    Raises:
        ValueError: sources of unequal weights whose rows would be drawn by difficulty; labelled texts, which cannot be
            cut into pieces.

    Example:
        >>> check_curriculum(CurriculumConfig(cut_to_longest=True), DataConfig())
    """
    weights = [source.weight for source in data.sources]
    if config.difficulty and len(set(weights)) > 1:
        raise ValueError(
            f"data.sources have the weights {weights}, but curriculum.difficulty draws rows by their difficulty, all "
            "visible ones alike: give all sources one weight, or leave difficulty out"
        )
    if config.length is not None and config.length.mode == "reshape" and not row_format(data).divisible:
        raise ValueError(
            "curriculum.length.mode = reshape cuts rows into pieces, but a labelled text is one row: use mode: truncate"
        )
