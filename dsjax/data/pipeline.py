"""Batches for training and validation: rows (`dsjax.data.rows`) read ahead by threads.

Any batch can be computed without the ones before it, so the state of the iterator is the step. B rows, T tokens.
"""

import sys
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int64

from dsjax.data.build import Corpus
from dsjax.data.config import DataConfig
from dsjax.data.rows import Batch, Rows


class FixedBatches:
    """The same rows in the same order each time it is iterated: for validation.

    A sample of all sources, by their numbers of rows; the last batch is filled up with rows whose loss_mask is False.

    Example:
        >>> from dsjax.data.store import TokenStore
        >>> store = TokenStore(tokens=np.arange(100), offsets=np.array([0, 100]), hash="x")
        >>> rows = Rows([store], sequence_length=4, pack="stream", isolate_documents=False)
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


class Batches:
    """Training batches from any step on, assembled ahead by threads; an iterator of (step, batch). Close it when done.

    Example:
        >>> from dsjax.data.store import TokenStore
        >>> store = TokenStore(tokens=np.arange(100), offsets=np.array([0, 100]), hash="x")
        >>> rows = Rows([store], sequence_length=4, pack="stream", isolate_documents=False)
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
        positions: Int64[np.ndarray, " b"] | None = None,
        threads: int = 2,
        prefetch: int = 4,
        start_step: int = 0,
    ) -> None:
        """Read from `rows`.

        Args:
            rows: where the rows come from.
            batch_size: rows of the global batch.
            positions: which rows of the global batch this process reads, in this order; None reads all.
            threads: threads that assemble batches.
            prefetch: batches kept ready.
            start_step: the first step.
        """
        places = np.arange(batch_size) if positions is None else np.asarray(positions, np.int64)
        assert len(places) == 0 or (places.min() >= 0 and places.max() < batch_size), "position outside the batch"

        def assemble(step: int) -> tuple[int, Batch]:
            return step, rows.rows(step * batch_size + places)

        steps = grain.MapDataset.range(sys.maxsize // batch_size).map(assemble)
        options = grain.ReadOptions(num_threads=min(threads, prefetch), prefetch_buffer_size=prefetch)
        self._iterator = iter(steps.to_iter_dataset(options))
        self._iterator.set_state({"next_index": start_step})

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
