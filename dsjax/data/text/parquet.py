"""Parquet files, read by pyarrow, which is an extra; nothing else imports it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from dsjax.data.text.document import Document, Keys, Undecodable
from dsjax.data.text.skipped import Tally
from dsjax.data.text.source import Part, Source, TextSourceKind, list_path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParquetSource(TextSourceKind):
    """Parquet files (needs the extra `parquet`); a document is one row's column."""

    path: str
    """A .parquet file or a folder of them."""
    kind: Literal["parquet"] = "parquet"
    """The kind of source."""
    column: str = "text"
    """The column that holds the text."""
    text_pair: str = ""
    """The column of a second text that belongs to the first, for the task classification; '' for none."""
    label: str = ""
    """The column of the label, a whole number from 0 or a string, for the task classification; '' for none."""
    weight: float = 1.0
    """Share of this source's rows in the mixture, before normalisation."""

    @property
    def keys(self) -> Keys:
        """Columns of a row that make a document."""
        return Keys("column", self.column, pair=self.text_pair, label=self.label)

    def open(self) -> Source:
        """List the file, or the folder's Parquet files."""
        return list_path(self, self.path, glob="*.parquet")

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Cut each file between row groups."""
        files = zip(source.files, source.sizes, strict=True)
        return [part for file, size in files for part in self._cut(source.root, file, size, target_bytes)]

    def _cut(self, root: Path, path: Path, size: int, target_bytes: int) -> Iterator[Part]:
        groups = row_groups(path)
        total = max(1, sum(group_bytes for _, group_bytes in groups))
        start = row = first = held = 0
        for index, (num_rows, group_bytes) in enumerate(groups):
            held, row = held + group_bytes, row + num_rows
            if held >= target_bytes or index == len(groups) - 1:
                yield Part(self, root, (path,), size * held // total, start, index + 1, first)
                start, first, held = index + 1, row, 0

    def read(self, part: Part, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
        """Read a document from each row."""
        (path,) = part.files
        name, keys = path.relative_to(part.root).as_posix(), self.keys
        columns = tuple(keys.settings.values())
        for number, values in enumerate(rows(path, columns, start=part.start, stop=part.stop), part.first):
            document = keys.document(f"{name}:{number}", values, f"{path}: row {number}, column ", undecodable)
            if document is None:
                tally.undecodable += 1
            else:
                yield document


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("sources of kind parquet need pyarrow: pip install 'dsjax[parquet]'") from error
    with _damage_as_message(path, "is not a Parquet file (JSON lines are read by a source of kind jsonl)"):
        return pyarrow.parquet.ParquetFile(path)


@contextlib.contextmanager
def _damage_as_message(path: Path, said: str) -> Iterator[None]:
    """Turn the library's errors about what is in a file into a ValueError that names it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} {said}: {' '.join(str(error).split())}") from error


def row_groups(path: Path) -> list[tuple[int, int]]:
    """Count the rows and uncompressed bytes of each row group.

    Raises:
        ValueError: pyarrow is not installed, or not a Parquet file.
    """
    with _open(path) as file, _damage_as_message(path, "is damaged"):
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def rows(path: Path, columns: Sequence[str], *, start: int, stop: int) -> Iterator[dict[str, object]]:
    """Read some columns of the rows in row groups start..stop - 1, in order.

    Each row is a mapping of names to values; text that is not UTF-8 is bytes.

    Raises:
        ValueError: there is no such column, or the file is damaged.
    """
    with _open(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ValueError(f"{path}: no column {column!r}; its columns are {', '.join(map(repr, names))}")
        batches = file.iter_batches(1024, row_groups=list(range(start, stop)), columns=list(columns))
        while True:
            with _damage_as_message(path, "is damaged"):
                batch = next(batches, None)
            if batch is None:
                return
            try:
                found = batch.to_pylist()
            except UnicodeDecodeError:  # the library takes what is called text at its word
                found = _with_bytes(batch).to_pylist()
            yield from found


def _with_bytes(batch: Any) -> Any:
    """Replace text in a batch by bytes."""
    import pyarrow

    types = pyarrow.types
    columns = [
        column.cast(pyarrow.large_binary())
        if types.is_string(column.type) or types.is_large_string(column.type)
        else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
