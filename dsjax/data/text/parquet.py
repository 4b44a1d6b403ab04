"""Parquet files through pyarrow, which is an extra; nothing else imports it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


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
    """Rows and uncompressed bytes of each row group.

    Raises:
        ValueError: pyarrow is not installed, or not a Parquet file.
    """
    with _open(path) as file, _damage_as_message(path, "is damaged"):
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def rows(path: Path, columns: Sequence[str], *, start: int, stop: int) -> Iterator[dict[str, object]]:
    """Some columns of the rows in row groups start..stop - 1, in order: name -> value, text that is not UTF-8 as bytes.

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
    """The batch with bytes in place of text."""
    import pyarrow

    types = pyarrow.types
    columns = [
        column.cast(pyarrow.large_binary())
        if types.is_string(column.type) or types.is_large_string(column.type)
        else column
        for column in batch.columns
    ]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
