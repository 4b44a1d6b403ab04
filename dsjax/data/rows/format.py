"""The interface of a row format: which arrays a batch has, and how rows are read from a store.

A new format is a file like packed.py, named in formats.py. B rows, T tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64

from dsjax.data.corpus.store import TokenStore

Batch = dict[str, np.ndarray]


class ArraySpec(NamedTuple):
    """Shape and type of an array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


def specs_of(rows: tuple[int, ...], columns: tuple[int, ...], types: Mapping[str, type]) -> dict[str, ArraySpec]:
    """The specs of arrays by name that have one shape: that of the rows, then the columns.

    Example:
        >>> specs_of((2, 3), (8,), {"tokens": np.int32})["tokens"].shape
        (2, 3, 8)
    """
    return {name: ArraySpec((*rows, *columns), np.dtype(kind)) for name, kind in types.items()}


class Reader(Protocol):
    """The rows of one store.

    Attributes:
        num_rows: rows of the store.
        fill: share of their positions that hold a token.
    """

    num_rows: int
    fill: float

    def lengths(self, rows: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Tokens in some rows; the rest of each is padding."""
        ...

    def read(self, rows: Int64[np.ndarray, " B"]) -> Batch:
        """Some rows as a batch."""
        ...


class RowFormat(Protocol):
    """One kind of rows.

    Every batch has `tokens` int32 [B, T], and `loss_mask` bool, [B, T] or [B]: the real targets, which a step's loss is
    averaged over.

    Attributes:
        divisible: whether a row may be cut into pieces that are rows (a curriculum of lengths, `reshape`).
    """

    divisible: ClassVar[bool]

    @property
    def sequence_length(self) -> int:
        """T."""
        ...

    def spec(self, rows: tuple[int, ...]) -> dict[str, ArraySpec]:
        """The arrays of a batch by name, whose first dimensions are `rows`: (B,), or (W, A, b) of a step."""
        ...

    def open(self, store: TokenStore, cache_dir: Path | None) -> Reader:
        """The rows of a store; with `cache_dir` what is computed of it is kept there."""
        ...

    def training(self, batch: Batch, draws: Int64[np.ndarray, " B"]) -> Batch:
        """Rows as they are trained on, when they are drawn as number `draws` of the run."""
        ...

    def fixed(self, batch: Batch, rows: Int64[np.ndarray, " B"]) -> Batch:
        """Rows as they are validated on: always alike. `rows` number them over all stores."""
        ...
