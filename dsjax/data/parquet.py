"""Parquet files through pyarrow, which is an extra; nothing else imports it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def _open(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("sources of kind parquet need pyarrow: pip install 'dsjax[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def row_groups(path: Path) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of each row group.

    Raises:
        ValueError: pyarrow is not installed, or not a Parquet file.
    """
    with _open(path) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def rows(path: Path, columns: Sequence[str], *, start: int, stop: int) -> Iterator[dict[str, object]]:
    """Some columns of the rows in row groups start..stop - 1, in order: name -> value.

    Raises:
        ValueError: there is no such column.
    """
    with _open(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise ValueError(f"{path}: no column {column!r}; its columns are {', '.join(map(repr, names))}")
        for batch in file.iter_batches(1024, row_groups=list(range(start, stop)), columns=list(columns)):
            yield from batch.to_pylist()
