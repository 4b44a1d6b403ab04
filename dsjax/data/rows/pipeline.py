"""Batches for training and validation: rows (`dsjax.data.rows.mixture`) read ahead by threads.

Any batch can be computed without the ones before it, so the state of the iterator is the step. B rows, T tokens.

Sequence-length warm-up (arXiv 2108.06084) gives each step a shape of its own: of every row the first `length` tokens
(truncate), or all of it in pieces of `length` tokens that become rows of a larger batch (reshape).
"""

import functools
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np
from jaxtyping import Int64

from dsjax.data.config import DataConfig
from dsjax.data.corpus.build import Corpus
from dsjax.data.curriculum.draw import Curriculum
from dsjax.data.rows.format import Batch
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.shape import BatchShape


class FixedBatches:
    """The same rows in the same order each time it is iterated: for validation.

    A sample of all sources, by their numbers of rows; the last batch is filled up with rows whose loss_mask is False.

    Example:
        >>> from dsjax.data.corpus.store import TokenStore
        >>> from dsjax.data.rows.packed import PackedFormat
        >>> store = TokenStore(tokens=np.arange(100), offsets=np.array([0, 100]), hash="x")
        >>> rows = Rows([store], PackedFormat(sequence_length=4, pack="stream", isolate_documents=False))
        >>> batches = FixedBatches(rows, batch_size=3, num_rows=4)
        >>> len(batches), [batch["loss_mask"].any(axis=1).tolist() for batch in batches]
        (2, [[True, True, True], [True, False, False]])
    """

    def __init__(
        self,
        rows: Rows | None,
        *,
        batch_size: int,
        num_rows: int = 0,
        positions: Int64[np.ndarray, " b"] | None = None,
    ) -> None:
        """Read from `rows`; there are no batches when it is None.

        Args:
            rows: where the rows come from.
            batch_size: rows of a batch.
            num_rows: rows in all; 0, or more than there are, takes all.
            positions: which rows of each batch to read; None reads all.
        """
        total = rows.num_rows if rows is not None else 0
        self._rows = rows
        self._batch_size = batch_size
        self._positions = np.arange(batch_size) if positions is None else np.asarray(positions, np.int64)
        self._num_rows = min(num_rows, total) if num_rows else total

    @property
    def num_rows(self) -> int:
        """Rows in all, those that fill up the last batch not among them."""
        return self._num_rows

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._num_rows, self._batch_size):
            yield self._batch(start + self._positions)

    def _batch(self, places: np.ndarray) -> Batch:
        assert self._rows is not None, "there are no rows without a source"
        real = np.flatnonzero(places < self._num_rows)
        some = self._rows.fixed(places[real])
        batch = {key: np.zeros((len(places), *value.shape[1:]), value.dtype) for key, value in some.items()}
        for key, value in some.items():
            batch[key][real] = value
        return batch


def validation_rows(
    corpus: Corpus,
    config: DataConfig,
    *,
    batch_size: int,
    num_rows: int = 0,
    positions: Int64[np.ndarray, " b"] | None = None,
) -> FixedBatches:
    """The fixed validation rows of a corpus, packed like the training rows; no batches without validation documents."""
    rows = Rows.of(corpus, config, split="validation") if corpus.validation else None
    return FixedBatches(rows, batch_size=batch_size, num_rows=num_rows, positions=positions)


def _blank(value: np.ndarray, length: int) -> np.ndarray:
    """Put zeros in the columns behind `length`."""
    if value.shape[1] > length:
        value = value.copy()
        value[:, length:] = 0
    return value


def _truncated(batch: Batch, shape: BatchShape) -> Batch:
    """Keep the first columns of arrays that have columns."""
    return {k: _blank(v[:, : shape.width], shape.length) if v.ndim > 1 else v for k, v in batch.items()}


def _pieces(batch: Batch, which: np.ndarray, begin: np.ndarray, shape: BatchShape) -> Batch:
    """Cut pieces: of row `which` of a batch the tokens from `begin` on, for each of them."""
    columns = begin[:, None] + np.minimum(np.arange(shape.width), shape.length - 1)
    return {key: _blank(value[which[:, None], columns], shape.length) for key, value in batch.items()}


def longest_row(
    lengths: Int64[np.ndarray, " N"],
    numbers: Callable[[Int64[np.ndarray, " B"]], Int64[np.ndarray, " B"]],
    *,
    batch_size: int,
) -> Callable[[int], int]:
    """A function of the step: tokens of the longest row of its global batch, the same on every process.

    Args:
        lengths: tokens of each row.
        numbers: the row of each draw: `Rows.numbers`, or `Curriculum.rows`.
        batch_size: draws of a step.

    Example:
        >>> longest_row(np.array([3, 9, 4, 5]), lambda draws: draws % 4, batch_size=2)(1)
        5
    """
    return lambda step: int(lengths[numbers(step * batch_size + np.arange(batch_size))].max())


class Batches:
    """Training batches from any step on, assembled ahead by threads; an iterator of (step, batch). Close it when done.

    Example:
        >>> from dsjax.data.corpus.store import TokenStore
        >>> from dsjax.data.rows.packed import PackedFormat
        >>> store = TokenStore(tokens=np.arange(100), offsets=np.array([0, 100]), hash="x")
        >>> rows = Rows([store], PackedFormat(sequence_length=4, pack="stream", isolate_documents=False))
        >>> with Batches(rows, batch_size=2, start_step=7) as batches:
        ...     step, batch = next(batches)
        >>> step, batch["tokens"].shape, bool((batch["tokens"] == rows.rows(np.array([14, 15]))["tokens"]).all())
        (7, (2, 4), True)
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        threads: int = 2,
        prefetch: int = 4,
        start_step: int = 0,
        order: Curriculum | None = None,
        shape_at: Callable[[int], BatchShape] | None = None,
        positions_of: Callable[[int], Int64[np.ndarray, " b"]] | None = None,
    ) -> None:
        """Read from `rows`.

        Args:
            rows: where the rows come from.
            batch_size: rows of the global batch.
            threads: threads that assemble batches.
            prefetch: batches kept ready.
            start_step: the first step.
            order: which row each draw takes; None leaves it to `rows`.
            shape_at: the shape of each step's batch; None leaves them as they are. In a batch of more rows than
                `batch_size`, up to n times as many, row i is piece i % n of drawn row i // n: `length` tokens from
                (T // n) (i % n) on.
            positions_of: number of rows of the global batch -> which of them this process reads, in this order; None
                reads all.

        Raises:
            ValueError: labelled texts are to be cut into pieces (when the first such batch is read).
        """
        self._rows, self._batch_size, self._order = rows, batch_size, order
        every = BatchShape(batch_size, rows.sequence_length, rows.sequence_length)
        self._shape_at = shape_at if shape_at is not None else lambda _: every
        self._positions_of = functools.cache(np.arange if positions_of is None else positions_of)
        steps = grain.MapDataset.range(sys.maxsize // batch_size).map(self._assemble)
        options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
        self._iterator = iter(steps.to_iter_dataset(options))
        self._iterator.set_state({"next_index": start_step})

    def _assemble(self, step: int) -> tuple[int, Batch]:
        shape, length = self._shape_at(step), self._rows.sequence_length
        assert 0 < shape.length <= shape.width <= length and shape.rows > 0, shape
        positions = self._positions_of(shape.rows)
        assert len(positions) == 0 or (positions.min() >= 0 and positions.max() < shape.rows), "outside the batch"
        pieces = -(-shape.rows // self._batch_size)
        if pieces == 1:
            return step, _truncated(self._read(step, positions), shape)
        if not self._rows.format.divisible:
            raise ValueError("labelled texts cannot be cut into pieces: use curriculum.length.mode = truncate")
        assert shape.length <= length // pieces, f"rows of {length} do not have {pieces} pieces of {shape.length}"
        drawn, piece = np.divmod(positions, pieces)
        drawn, which = np.unique(drawn, return_inverse=True)
        return step, _pieces(self._read(step, drawn), which, piece * (length // pieces), shape)

    def _read(self, step: int, places: np.ndarray) -> Batch:
        draws = step * self._batch_size + places
        return self._rows.rows(draws) if self._order is None else self._rows.drawn(draws, self._order.rows(draws))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[int, Batch]:
        return next(self._iterator)

    def close(self) -> None:
        """End the threads; nothing can be read afterwards."""
        self._iterator.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
