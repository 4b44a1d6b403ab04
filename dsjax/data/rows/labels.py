"""Texts with labels: how they are encoded, how classes are numbered, and how they become rows.

Labels are whole numbers, which are taken as they are, or strings, which are numbered in sorted order over all sources.

B rows, T tokens.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Int32, Int64

from dsjax.data.config import DataConfig
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.format import ArraySpec, Batch, specs_of
from dsjax.data.rows.single_rows import encode_rows
from dsjax.data.text.document import Document
from dsjax.data.tokenizers.tokenizer import Tokenizer

CLASS, NUM_SECOND, CUT = 0, 1, 2
"""Columns of a store's `classes`: number of the class, tokens of the second text, whether the text was longer."""


def encode_labelled(
    documents: Sequence[Document], tokenizer: Tokenizer, dtype: np.dtype, *, length: int
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The row of each document, and what else is kept of all of them: labels as JSON, `rows` int32 [N, 2].

    `rows` holds the number of tokens of the second text and whether the text was cut.
    """
    rows = encode_rows(tokenizer, [d.text for d in documents], [d.pair for d in documents], length=length)
    labels = [document.label for document in documents]
    return [np.array(row.ids, dtype) for row in rows], {
        "labels": np.frombuffer(json.dumps(labels).encode(), np.uint8),
        "rows": np.array([(row.num_second, row.cut) for row in rows], np.int32).reshape(-1, 2),
    }


def label_names(parts: Sequence[Path]) -> list[str]:
    """The names of the classes in the files that parts were written to; of whole numbers these themselves.

    Raises:
        ValueError: some labels are numbers and some are strings.
    """
    found: set[int | str] = set()
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            found.update(json.loads(part["labels"].tobytes()))
    numbers = {label for label in found if isinstance(label, int)}
    if not numbers:
        return sorted(str(label) for label in found)
    if len(numbers) < len(found):
        other = min(str(label) for label in found - numbers)
        raise ValueError(
            f"labels must be all whole numbers or all strings; there are {min(numbers)} and {other!r}: write them alike"
        )
    return [str(number) for number in range(max(numbers) + 1)]


def number_labels(part: Any, names: Sequence[str]) -> Int32[np.ndarray, "N 3"]:
    """The `classes` of a part's documents."""
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers[str(label)] for label in json.loads(part["labels"].tobytes())]
    return np.column_stack([np.array(labels, np.int32).reshape(-1, 1), part["rows"]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledFormat:
    """Rows of a classifier: a text a row with its label, padded on the right; nothing is packed.

    A batch has the keys
        tokens int32 [B, T]        0 where there is no token
        segments int32 [B, T]      1 where there is one, else 0
        token_types int32 [B, T]   1 in the second text; only `with_pairs`
        labels int32 [B]           number of the class
        loss_mask bool [B]         True: a row that exists

    Attributes:
        sequence_length: T.
        with_pairs: whether rows tell the two texts of a pair apart.
    """

    sequence_length: int
    with_pairs: bool = False
    divisible: ClassVar[bool] = False
    """See `RowFormat`."""

    @classmethod
    def of(cls, config: DataConfig, tokenizer: Tokenizer | None) -> Self:
        """The format that a config asks for."""
        return cls(sequence_length=config.sequence_length, with_pairs=config.has_pairs)

    def spec(self, rows: tuple[int, ...]) -> dict[str, ArraySpec]:
        """See `RowFormat`."""
        types: dict[str, type] = dict.fromkeys(("tokens", "segments"), np.int32)
        types |= {"token_types": np.int32} if self.with_pairs else {}
        of_rows = specs_of(rows, (), {"labels": np.int32, "loss_mask": np.bool_})
        return specs_of(rows, (self.sequence_length,), types) | of_rows

    def open(self, store: TokenStore, cache_dir: Path | None) -> "LabelledRows":
        """See `RowFormat`."""
        return LabelledRows(store, self.sequence_length, with_pairs=self.with_pairs)

    def training(self, batch: Batch, draws: Int64[np.ndarray, " B"]) -> Batch:
        """See `RowFormat`."""
        return batch

    def fixed(self, batch: Batch, rows: Int64[np.ndarray, " B"]) -> Batch:
        """See `RowFormat`."""
        return batch


class LabelledRows:
    """The rows of one store of labelled texts; for the keys of a batch see `LabelledFormat`.

    Example:
        >>> classes = np.array([[1, 1, 0], [0, 0, 0]], np.int32)
        >>> store = TokenStore(tokens=np.array([5, 6, 7]), offsets=np.array([0, 2, 3]), hash="x", classes=classes)
        >>> batch = LabelledRows(store, 3, with_pairs=True).read(np.array([0, 1]))
        >>> batch["tokens"].tolist(), batch["token_types"].tolist(), batch["labels"].tolist()
        ([[5, 6, 0], [7, 0, 0]], [[0, 1, 0], [0, 0, 0]], [1, 0])
    """

    def __init__(self, store: TokenStore, length: int, *, with_pairs: bool) -> None:
        """Read from `store`, whose documents have at most `length` tokens."""
        assert store.classes is not None, "a store without labels"
        self._store, self._classes = store, store.classes
        self._length, self._with_pairs = length, with_pairs
        self.num_rows = store.num_documents
        self.fill = store.num_tokens / max(1, store.num_documents * length)

    def lengths(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Count the tokens in some rows; positions behind them are padding."""
        return np.asarray(self._store.offsets[rows + 1] - self._store.offsets[rows], np.int64)

    def read(self, rows: Int64[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Read some rows as a batch."""
        begin = self._store.offsets[rows][:, None]
        sizes = self._store.offsets[rows + 1][:, None] - begin
        place = np.arange(self._length)
        is_token = place < sizes
        batch = {
            "tokens": self._store.tokens[(begin + place) * is_token].astype(np.int32) * is_token,
            "segments": is_token.astype(np.int32),
            "labels": np.asarray(self._classes[rows, CLASS], np.int32),
            "loss_mask": np.ones(len(rows), bool),
        }
        if self._with_pairs:
            second = self._classes[rows, NUM_SECOND][:, None]
            batch["token_types"] = (is_token & (place >= sizes - second)).astype(np.int32)
        return batch
