"""Packing: which pieces of which documents lie in which row.

A document of n tokens, its end-of-text token included, holds n - 1 pairs (input, target): (d[0], d[1]) ...
(d[n-2], d[n-1]). A piece (document, start, length) stands for the inputs d[start : start + length] and the targets
d[start+1 : start+length+1]; the pieces of one document follow each other without gap or overlap, so that every pair of
every document is in exactly one row, also where a document is cut. When documents are isolated the end-of-text token is
only ever a target. When they are not, packed rows also hold it as an input, since it is then what separates documents;
in a stream its target is the next document's first token, in best-fit rows it has none.

    best_fit   documents longer than a row are cut into whole rows and a rest; wholes and rests are put, longest first,
               into the row with the least room that still holds them (best-fit decreasing; arXiv 2404.10830)
    stream     all documents in order, cut every `length` tokens
    none       one piece a row
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.permute import mix

Pack = Literal["best_fit", "stream", "none"]
PIECE = np.dtype([("document", "<u4"), ("start", "<u4"), ("length", "<u4")])
VERSION = 1
_SHUFFLE_KEY = 0x5EED


@dataclasses.dataclass(frozen=True, eq=False)
class PackIndex:
    """The rows of one store.

    Example:
        >>> index = PackIndex.build(np.array([0, 5, 8, 11]), 4)  # documents of 5, 3 and 3 tokens: 4, 2 and 2 pairs
        >>> index.num_rows, index.pieces["length"].tolist()
        (2, [4, 2, 2])
    """

    length: int
    """Tokens in a row."""
    rows: Int64[np.ndarray, " R"]
    """Beginning of each row's pieces in `pieces`; the last entry is the number of pieces."""
    pieces: np.ndarray
    """Structured array of document, start and length (uint32), in the order in which they lie in the rows."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.rows) - 1

    @property
    def fill(self) -> float:
        """Share of positions that hold a token, 1.0 when there is no padding."""
        return float(self.pieces["length"].sum(dtype=np.int64)) / max(1, self.num_rows * self.length)

    @classmethod
    def build(
        cls,
        offsets: Int64[np.ndarray, " D"],
        length: int,
        *,
        pack: Pack = "best_fit",
        isolate_documents: bool = True,
        all_tokens: bool = False,
    ) -> "PackIndex":
        """Pack documents given by their `offsets` (see `TokenStore`) into rows of `length` tokens.

        `all_tokens`: every token is an input, the last of a document too, since none is predicted from those before it.
        """
        sizes = np.diff(offsets)
        if sizes.size and (sizes.max() >= 2**32 or sizes.size >= 2**32):
            raise ValueError("documents of 2^32 tokens, or as many documents, cannot be packed: split them")
        running = not isolate_documents and pack != "none"
        inputs = sizes if running or all_tokens else np.maximum(sizes - 1, 0)
        if pack == "stream":
            if running and not all_tokens and inputs.size:
                inputs = np.append(inputs[:-1], inputs[-1] - 1)  # nothing follows the stream's last token
            rows, pieces = _stream(inputs, length)
        elif pack == "none":
            pieces = _cut(inputs, length)
            rows = np.arange(len(pieces) + 1)
        else:
            rows, pieces = _best_fit(inputs, length)
        return cls(length=length, rows=rows.astype(np.int64), pieces=pieces)

    @classmethod
    def cached(
        cls,
        store: TokenStore,
        length: int,
        *,
        pack: Pack,
        isolate_documents: bool,
        cache_dir: Path,
        all_tokens: bool = False,
    ) -> "PackIndex":
        """Open the index memory-mapped from `cache_dir`/packs; it is built and kept there the first time."""
        inputs = "all" if all_tokens else "isolated" if isolate_documents else "running"
        name = f"{store.hash[:32]}-{length}-{pack}-{inputs}-{VERSION}"
        folder = cache_dir / "packs" / name
        if not folder.is_dir():
            index = cls.build(
                store.offsets, length, pack=pack, isolate_documents=isolate_documents, all_tokens=all_tokens
            )
            index._save(folder)
        try:
            rows = np.asarray(np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False))
            pieces = np.asarray(np.load(folder / "pieces.npy", mmap_mode="r", allow_pickle=False))
            if len(rows) > 0 and rows[-1] == len(pieces) and pieces.dtype == PIECE:
                return cls(length=length, rows=rows, pieces=pieces)
        except (ValueError, OSError, EOFError):
            pass
        raise ValueError(f"{folder} is damaged: remove it, it will be built again")

    def _save(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            np.save(temporary / "rows.npy", self.rows)
            np.save(temporary / "pieces.npy", self.pieces)
            temporary.rename(folder)
        except OSError:
            # Another process may have put the same index there first; then ours is not needed.
            shutil.rmtree(temporary, ignore_errors=True)
            if not folder.is_dir():
                raise


def _pieces(document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    pieces = np.empty(len(document), PIECE)
    pieces["document"], pieces["start"], pieces["length"] = document, start, length
    return pieces


def _cut(inputs: np.ndarray, length: int) -> np.ndarray:
    """Pieces of at most `length`, in document order."""
    counts = -(-inputs // length)
    document = np.repeat(np.arange(len(inputs)), counts)
    first = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first[document]) * length
    return _pieces(document, start, np.minimum(length, inputs[document] - start))


def _stream(inputs: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    kept = np.flatnonzero(inputs)
    ends = np.cumsum(inputs[kept])
    total = int(ends[-1]) if len(kept) else 0
    begins = ends - inputs[kept]
    starts = np.union1d(begins, np.arange(0, total, length))
    which = np.searchsorted(begins, starts, side="right") - 1
    pieces = _pieces(kept[which], starts - begins[which], np.diff(starts, append=total))
    return np.searchsorted(starts, np.arange(0, total + length, length)[: -(-total // length) + 1]), pieces


def _best_fit(inputs: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = _cut(inputs, length)
    sizes = pieces["length"].astype(np.int64)
    # Pieces of equal length in random order, so that neighbours in a folder do not always share a row.
    order = np.lexsort((mix(np.arange(len(pieces)), _SHUFFLE_KEY), -sizes))
    row_of = np.empty(len(pieces), np.int64)
    row_of[order] = _assign_rows(sizes[order], length)
    # Within a row in random order: otherwise the longest would always come first.
    by_row = np.lexsort((mix(np.arange(len(pieces)), _SHUFFLE_KEY + 1), row_of))
    counts = np.bincount(row_of) if len(pieces) else np.zeros(0, np.int64)
    return np.concatenate([[0], np.cumsum(counts)]), pieces[by_row]


def _assign_rows(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing for `lengths` in decreasing order; the row of each.

    Rows are kept in groups of equal room, and pieces of equal length are placed together: the best row for a piece of
    length n is one with the least room r >= n, and after a piece it stays the best while its room is at least n, so
    every row of that group takes r // n pieces before the next group is looked at.
    """
    result = np.empty(len(lengths), np.int64)
    groups: dict[int, list[np.ndarray]] = {}
    present = 0  # bit r is set when some row has room r
    num_rows = 0
    values, begins = np.unique(-lengths, return_index=True)
    ends = np.append(begins, len(lengths))[1:]
    for size, begin, end in zip((-values).tolist(), begins.tolist(), ends.tolist(), strict=True):
        while begin < end:
            fitting = present >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                rows = np.concatenate(groups.pop(room))
                present &= ~(1 << room)
            else:
                room = capacity
                rows = num_rows + np.arange(-(-(end - begin) // (room // size)))
                num_rows += len(rows)
            each = room // size
            placed = min(end - begin, len(rows) * each)
            result[begin : begin + placed] = np.repeat(rows, each)[:placed]
            begin += placed
            full, rest = divmod(placed, each)
            for left, some in (
                (room - each * size, rows[:full]),
                (room - rest * size, rows[full : full + 1]),
                (room, rows[full + 1 :]),
            ):
                if left and len(some):
                    groups.setdefault(left, []).append(some)
                    present |= 1 << left
    return result
