"""Rows of tokens: which row is drawn when, as a pure function of the draw, and what it holds.

Training draws rows one after another: draw k = step * batch_size + position. Which row that is depends on k alone:

    k -> source s and j, the number of earlier draws from s       a shuffled pattern of fixed counts per block of draws
    j -> epoch e = j // rows of s, place j % rows of s
    -> row = permutation(seed, s, e)[place]                       a keyed bijection, nothing is stored
    -> pieces (document, start, length) -> tokens                 the reader of the row format (formats.py)
    -> the batch of training (tokens are hidden, by k)            the row format

B rows, T tokens.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64

from dsjax.data.config import DataConfig
from dsjax.data.corpus.build import Corpus
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.format import Batch, RowFormat
from dsjax.data.rows.formats import row_format
from dsjax.data.rows.permute import fold, mix, permute

_MAX_BLOCK = 1 << 16
_MIN_BLOCK = 1 << 8
_ORDER, _MIXTURE, _VALIDATION = 1, 2, 3


class Rows:
    """The rows of one split: its stores, how they are mixed, and in which order they are drawn.

    Example:
        >>> from dsjax.data.rows.packed import PackedFormat
        >>> store = TokenStore(tokens=np.array([5, 6, 7, 0, 8, 9, 0]), offsets=np.array([0, 4, 7]), hash="x")
        >>> rows = Rows([store], PackedFormat(sequence_length=4, pack="stream"))
        >>> batch = rows.read(np.array([0, 0]), np.array([0, 1]))
        >>> batch["tokens"].tolist(), batch["targets"].tolist()
        ([[5, 6, 7, 8], [9, 0, 0, 0]], [[6, 7, 0, 9], [0, 0, 0, 0]])
        >>> batch["segments"].tolist(), batch["loss_mask"].sum(axis=1).tolist()
        ([[1, 1, 1, 2], [1, 0, 0, 0]], [4, 1])
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        format: RowFormat,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        cache_dir: Path | None = None,
    ) -> None:
        """Open `stores`, keeping what is computed of them in `cache_dir` if one is given.

        Args:
            stores: of each source.
            format: of the rows.
            weights: of each source; equal if none are given.
            seed: of the order.
            cache_dir: where indices are kept.

        Raises:
            ValueError: no store, a store without a pair of tokens, weights that do not fit.
        """
        self.format, self.sequence_length = format, format.sequence_length
        self._seed = seed
        self._readers = [format.open(store, cache_dir) for store in stores]
        self._sizes = np.array([reader.num_rows for reader in self._readers], np.int64)
        if not self._readers or not self._sizes.all():
            raise ValueError("every source needs at least one document of two tokens; none is left after tokenising")
        self._counts = _block_counts([1.0] * len(self._readers) if weights is None else list(weights))
        if len(self._counts) != len(self._readers):
            raise ValueError(f"{len(self._readers)} sources need as many weights; got {len(self._counts)}")
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    @classmethod
    def of(cls, corpus: Corpus, config: DataConfig, *, split: Literal["train", "validation"]) -> "Rows":
        """The rows of one split of a corpus as the config packs, mixes and shuffles them."""
        return cls(
            corpus.train if split == "train" else corpus.validation,
            row_format(config, corpus.tokenizer),
            weights=corpus.train_weights if split == "train" else None,
            seed=config.shuffle_seed,
            cache_dir=corpus.cache_dir,
        )

    @property
    def num_rows(self) -> int:
        """Rows of all sources; an epoch when there is one source."""
        return int(self._sizes.sum())

    @property
    def fill(self) -> float:
        """Share of positions that hold a token, over all rows of all sources."""
        filled = sum(reader.fill * reader.num_rows for reader in self._readers)
        return filled / self.num_rows

    def rows(self, draws: Int64[np.ndarray, " B"]) -> Batch:
        """The rows of draws k = step * batch_size + position, in any order."""
        return self.format.training(self.read(*self.locate(draws)), draws)

    def numbers(self, draws: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """The row of each draw, numbered over all sources: those of the first source, then those of the second, ..."""
        sources, rows = self.locate(draws)
        return (np.cumsum(self._sizes) - self._sizes)[sources] + rows

    def drawn(self, draws: Int64[np.ndarray, " B"], numbers: Int64[np.ndarray, " B"]) -> Batch:
        """The rows `numbers` (over all sources), as they are when something else than `locate` chose them for draws."""
        return self.format.training(self.read(*self._place(numbers)), draws)

    def plain(self, numbers: Int64[np.ndarray, " B"]) -> tuple[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Tokens of the rows `numbers` (over all sources) before any is hidden, and where there are tokens."""
        sources, rows = self._place(numbers)
        lengths = np.empty(len(numbers), np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            lengths[chosen] = self._readers[source].lengths(rows[chosen])
        return self.read(sources, rows)["tokens"], np.arange(self.sequence_length) < lengths[:, None]

    def _place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and row in it, of rows numbered over all sources."""
        ends = np.cumsum(self._sizes)
        sources = np.searchsorted(ends, numbers, side="right")
        return sources, numbers - (ends - self._sizes)[sources]

    def fixed(self, places: Int64[np.ndarray, " B"]) -> Batch:
        """Rows 0 <= place < num_rows of all sources together, in an order that depends on nothing but their number."""
        at = permute(places, self.num_rows, key=fold(_VALIDATION))
        return self.format.fixed(self.read(*self._place(at)), at)

    def locate(self, draws: Int64[np.ndarray, " B"]) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """The source of each draw and its row in that source."""
        draws = np.asarray(draws, np.int64)
        assert len(draws) == 0 or draws.min() >= 0, "draws are counted from 0"
        sources, nth = self._mixture(draws)
        epochs, places = np.divmod(nth, self._sizes[sources])
        rows = np.empty_like(draws)
        # A batch holds few different (source, epoch), one per source except where an epoch ends.
        for source, epoch in {*zip(sources.tolist(), epochs.tolist(), strict=True)}:
            chosen = np.flatnonzero((sources == source) & (epochs == epoch))
            key = fold(_ORDER, self._seed, source, epoch)
            rows[chosen] = permute(places[chosen], int(self._sizes[source]), key=key)
        return sources, rows

    def _mixture(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each draw and the number of earlier draws from it."""
        if len(self._counts) == 1:
            return np.zeros_like(draws), draws
        blocks, places = np.divmod(draws, sum(self._counts))
        sources, nth = np.empty_like(draws), np.empty_like(draws)
        for block in np.unique(blocks).tolist():
            chosen = np.flatnonzero(blocks == block)
            pattern, earlier = self._block(block)
            sources[chosen] = pattern[places[chosen]]
            nth[chosen] = earlier[places[chosen]] + block * np.array(self._counts)[sources[chosen]]
        return sources, nth

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The shuffled pattern of sources in a block, and for each place the earlier ones of its source."""
        pattern = np.repeat(np.arange(len(self._counts)), self._counts)
        pattern = pattern[np.argsort(mix(np.arange(len(pattern)), fold(_MIXTURE, self._seed, block)), kind="stable")]
        earlier = np.empty_like(pattern)
        for source, count in enumerate(self._counts):
            earlier[pattern == source] = np.arange(count)
        return pattern, earlier

    def read(self, sources: Int64[np.ndarray, " B"], rows: Int64[np.ndarray, " B"]) -> Batch:
        """The given rows of the given sources as a batch, of no rows too."""
        batch: Batch = {}
        for source in np.unique(sources).tolist() or [0]:
            chosen = np.flatnonzero(sources == source)
            part = self._readers[source].read(rows[chosen])
            if len(chosen) == len(rows):
                return part
            for key, value in part.items():
                batch.setdefault(key, np.zeros((len(rows), *value.shape[1:]), value.dtype))[chosen] = value
        return batch


def _block_counts(weights: list[float]) -> list[int]:
    """Draws of each source in a block: exact for weights with a common denominator up to 65,536, else the nearest."""
    shares = [Fraction(str(weight)) for weight in weights]
    total = sum(shares)
    if total <= 0 or min(shares) <= 0:
        raise ValueError(f"weights must be above 0; got {weights}")
    shares = [share / total for share in shares]
    block = math.lcm(*(share.denominator for share in shares))
    block = block * -(-_MIN_BLOCK // block) if block <= _MAX_BLOCK else _MAX_BLOCK
    counts = [max(1, int(share * block)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: counts[source] - shares[source] * block)
    for source in by_remainder[: max(0, block - sum(counts))]:
        counts[source] += 1
    return counts
