"""Reading a part of a source: bytes to documents, and clear errors for what cannot be read."""

import dataclasses
import gzip
import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dsjax.data.config import JsonlSource, ParquetSource, StdlibSource, TextSource
from dsjax.data.sources import Part

Undecodable = Literal["error", "replace", "skip"]
_MARK = b"\xef\xbb\xbf"
_HOW = "set data.undecodable (--undecodable) to 'replace' or 'skip' to go on"


@dataclasses.dataclass(frozen=True)
class Document:
    """One document; `name` says where it is, such as `novels/emma.txt` or `pages.jsonl:17`."""

    name: str
    text: str


def read_part(part: Part, *, undecodable: Undecodable = "error") -> Iterator[Document]:
    """The documents of a part that have text, in order.

    Raises:
        ValueError: bytes that are not UTF-8 (unless `undecodable` says otherwise), a line that is not JSON or lacks the
            field, a damaged compressed file, a Parquet file without the column; each named by file and place.

    Example:
        >>> import tempfile
        >>> from dsjax.data.config import JsonlSource
        >>> from dsjax.data.sources import open_source
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"text": "one"}\\n\\n{"text": "two"}\\n')
        ...     file.flush()
        ...     parts = open_source(JsonlSource(path=file.name)).parts(1 << 20)
        ...     [document.text for part in parts for document in read_part(part)]
        ['one', 'two']
    """
    if isinstance(part.config, JsonlSource):
        documents = _read_jsonl(part, part.config.field, undecodable)
    elif isinstance(part.config, ParquetSource):
        documents = _read_parquet(part, part.config.column, undecodable)
    else:
        documents = _read_files(part, undecodable)
    for name, text in documents:
        if text:
            yield Document(name, text)


def _read_files(part: Part, undecodable: Undecodable) -> Iterator[tuple[str, str]]:
    separator = part.config.separator if isinstance(part.config, TextSource) else ""
    for path in part.files:
        data = path.read_bytes()
        encoding = _python_encoding(data) if isinstance(part.config, StdlibSource) else "utf-8"
        text = _decode(data.removeprefix(_MARK), encoding, str(path), undecodable)
        if text is None:
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        name = path.relative_to(part.root).as_posix()
        if not separator:
            yield name, text
            continue
        for number, piece in enumerate(text.split(separator)):
            yield f"{name}#{number}", piece


def _python_encoding(data: bytes) -> str:
    """Python source may name another encoding in its first two lines (PEP 263)."""
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError:
        return "utf-8"


def _decode(data: bytes, encoding: str, where: str, undecodable: Undecodable) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if undecodable == "replace":
            return data.decode(encoding, "replace")
        if undecodable == "skip":
            return None
        byte = f"0x{data[error.start]:02x} at byte {error.start}"
        raise ValueError(f"{where}: {byte} is not {encoding.upper()} ({error.reason}); {_HOW}") from error


def _read_jsonl(part: Part, field: str, undecodable: Undecodable) -> Iterator[tuple[str, str]]:
    (path,) = part.files
    name = path.relative_to(part.root).as_posix()
    for number, data in _numbered_lines(path, part):
        if not data.strip():
            continue
        where = f"{path}:{number}"
        line = _decode(data, "utf-8", where, undecodable)
        if line is None:
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a JSON object with the key {field!r}, got {line[:60]!r}")
        if field not in value:
            keys = ", ".join(map(repr, value)) or "none"
            raise ValueError(f"{where}: no key {field!r}; its keys are {keys}: set the source's field to one of them")
        text = _checked(value[field], f"{where}: {field!r}", undecodable)
        if text is not None:
            yield f"{name}:{number}", text


def _checked(value: object, where: str, undecodable: Undecodable) -> str | None:
    """`value` if it is text that has a UTF-8 form: JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{where} must be a string, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        if undecodable == "replace":
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if undecodable == "skip":
            return None
        raise ValueError(f"{where} has half of a surrogate pair at character {error.start}; {_HOW}") from error
    return value


def _numbered_lines(path: Path, part: Part) -> Iterator[tuple[int, bytes]]:
    compressed = path.suffix in (".gz", ".xz")
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            file.seek(part.start)
            number = part.first
            while (compressed or file.tell() < part.stop) and (line := file.readline()):
                yield number, line.removeprefix(_MARK) if number == 1 else line
                number += 1
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged compressed file ({error})") from error


def _read_parquet(part: Part, column: str, undecodable: Undecodable) -> Iterator[tuple[str, str]]:
    from dsjax.data.parquet import column_values

    (path,) = part.files
    name = path.relative_to(part.root).as_posix()
    for number, value in enumerate(column_values(path, column, start=part.start, stop=part.stop), part.first):
        text = _checked(value, f"{path}: row {number}, column {column!r}", undecodable)
        if text is not None:
            yield f"{name}:{number}", text
