"""Packed rows of one store: pieces of documents (`dsjax.data.rows.pack`) to tokens, targets and where documents begin.

B rows, T tokens.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Self, TypedDict

import numpy as np
from jaxtyping import Int64

from dsjax.data.config import DataConfig
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.format import ArraySpec, Batch, specs_of
from dsjax.data.rows.pack import Pack, PackIndex
from dsjax.data.tokenizers.tokenizer import Tokenizer


class _PackOptions(TypedDict):
    pack: Pack
    isolate_documents: bool
    all_tokens: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFormat:
    """Rows of a language model: documents, packed, each token with the next one as its target.

    A batch has the keys
        tokens int32 [B, T], targets int32 [B, T]   0 where there is no token
        loss_mask bool [B, T]                       where the target counts
    and, when documents are isolated in packed rows,
        segments int32 [B, T]                       1, 2, ... for the pieces of a row, 0 where there is no token
        positions int32 [B, T]                      0, 1, ... from the beginning of each piece

    Attributes:
        sequence_length: T.
        pack: how documents become rows.
        isolate_documents: see DataConfig.
    """

    sequence_length: int
    pack: Pack = "best_fit"
    isolate_documents: bool = True
    all_tokens: ClassVar[bool] = False
    """Whether every token is an input and its own target."""
    divisible: ClassVar[bool] = True
    """See `RowFormat`."""

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer | None) -> Self:
        """The format that a config asks for."""
        return cls(sequence_length=config.sequence_length, pack=config.pack, isolate_documents=config.isolate_documents)

    @property
    def _isolated(self) -> bool:
        return self.isolate_documents and self.pack != "none"

    def spec(self, rows: tuple[int, ...]) -> dict[str, ArraySpec]:
        """See `RowFormat`."""
        # Who sees what comes after must not see padding.
        where = ("segments", "positions") if self._isolated else ("segments",) if self.all_tokens else ()
        types = dict.fromkeys(("tokens", "targets", *where), np.int32)
        return specs_of(rows, (self.sequence_length,), {**types, "loss_mask": np.bool_})

    def open(self, store: TokenStore, cache_dir: Path | None) -> "PackedRows":
        """See `RowFormat`."""
        options: _PackOptions = {
            "pack": self.pack,
            "isolate_documents": self.isolate_documents,
            "all_tokens": self.all_tokens,
        }
        return PackedRows(
            store,
            PackIndex.build(store.offsets, self.sequence_length, **options)
            if cache_dir is None
            else PackIndex.cached(store, self.sequence_length, **options, cache_dir=cache_dir),
            isolated=self._isolated,
            # In rows that are not isolated end-of-text is an input; only in a stream is there a next token for it.
            mask_ends=not self.isolate_documents and self.pack == "best_fit" and not self.all_tokens,
            all_tokens=self.all_tokens,
        )

    def training(self, batch: Batch, draws: Int64[np.ndarray, " B"]) -> Batch:
        """See `RowFormat`."""
        return batch

    def fixed(self, batch: Batch, rows: Int64[np.ndarray, " B"]) -> Batch:
        """See `RowFormat`."""
        return batch


class PackedRows:
    """The rows of one store; for the keys of a batch see `PackedFormat`.

    Example:
        >>> store = TokenStore(tokens=np.array([5, 6, 0, 7, 0]), offsets=np.array([0, 3, 5]), hash="x")
        >>> index = PackIndex.build(store.offsets, 4)
        >>> batch = PackedRows(store, index, isolated=True).read(np.array([0]))
        >>> sorted(zip(batch["tokens"][0].tolist(), batch["targets"][0].tolist()))
        [(0, 0), (5, 6), (6, 0), (7, 0)]
    """

    def __init__(
        self,
        store: TokenStore,
        index: PackIndex,
        *,
        isolated: bool,
        mask_ends: bool = False,
        all_tokens: bool = False,
    ) -> None:
        """Read from `store` what `index` says.

        Args:
            store: the tokens.
            index: of that store.
            isolated: whether a batch says where documents begin.
            mask_ends: whether the last token of a document has no target.
            all_tokens: every token is an input and its own target, see `PackIndex.build`.
        """
        self._store, self._index = store, index
        self._isolated, self._mask_ends, self._all_tokens = isolated, mask_ends, all_tokens
        self.num_rows, self.fill = index.num_rows, index.fill

    def lengths(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Count the tokens in some rows; positions behind them are padding."""
        index = self._index
        first = index.rows[rows]
        counts = index.rows[rows + 1] - first
        begin = np.cumsum(counts) - counts
        at = np.repeat(first - begin, counts) + np.arange(counts.sum())
        return np.add.reduceat(index.pieces["length"][at].astype(np.int64), begin)

    def read(self, rows: Int64[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Read some rows as a batch."""
        # A row's padding counts as one more piece, so that pieces fill the batch exactly.
        store, index = self._store, self._index
        shape = (len(rows), index.length)
        first = index.rows[rows]
        counts = index.rows[rows + 1] - first
        slots = counts + 1
        begin_of_row = np.cumsum(slots) - slots
        ordinal = np.arange(slots.sum()) - np.repeat(begin_of_row, slots)
        real = ordinal < np.repeat(counts, slots)
        pieces = index.pieces[(np.repeat(first, slots) + ordinal)[real]]
        lengths, origin = np.zeros(len(ordinal), np.int64), np.zeros(len(ordinal), np.int64)
        lengths[real] = pieces["length"]
        lengths[~real] = index.length - np.add.reduceat(lengths, begin_of_row)
        documents = pieces["document"].astype(np.int64)
        origin[real] = store.offsets[documents] + pieces["start"]
        place = np.cumsum(lengths) - lengths
        # From here one entry per position of the batch: few passes over them, and as narrow ones as can be.
        at = np.repeat(origin - place, lengths)
        at += np.arange(len(at))
        is_token = np.repeat(real, lengths)
        whole = not lengths[~real].any()
        tokens = store.tokens.take(at, mode="clip").astype(np.int32)  # padding lies anywhere
        if not whole:
            tokens *= is_token
        targets, loss_mask = self._targets(tokens, is_token, origin[real], place[real], lengths[real], documents)
        batch = {"tokens": tokens, "targets": targets, "loss_mask": loss_mask}
        if self._isolated:
            batch["segments"] = np.repeat(np.where(real, ordinal + 1, 0).astype(np.int32), lengths)
            batch["positions"] = np.arange(len(at), dtype=np.int32)
            batch["positions"] -= np.repeat(place.astype(np.int32), lengths)
            if not whole:
                batch["positions"] *= is_token
        elif self._all_tokens:
            batch["segments"] = is_token.astype(np.int32)  # who sees what comes after must not see padding
        return {key: value.reshape(shape) for key, value in batch.items()}

    def _targets(
        self,
        tokens: np.ndarray,
        is_token: np.ndarray,
        origin: np.ndarray,
        place: np.ndarray,
        lengths: np.ndarray,
        documents: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Targets and loss mask of all positions; where pieces come from, where they lie, how long they are."""
        if self._all_tokens:
            return tokens.copy(), is_token
        targets = np.empty_like(tokens)
        targets[:-1] = tokens[1:]
        # The next token of a piece's last one is in no row of the batch, or in another place of it.
        last, after = place + lengths - 1, origin + lengths
        targets[last] = self._store.tokens.take(after, mode="clip")
        loss_mask = is_token
        if self._mask_ends:
            loss_mask = is_token.copy()
            loss_mask[last[after == self._store.offsets[documents + 1]]] = False
        targets *= loss_mask
        return targets, loss_mask
