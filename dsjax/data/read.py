"""Reading a part of a source: bytes to documents, and clear errors for what cannot be read."""

import dataclasses
import gzip
import io
import json
import lzma
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from dsjax.data.config import JsonlSource, ParquetSource, SourceConfig, StdlibSource, TextSource
from dsjax.data.sources import Part, open_source

Undecodable = Literal["error", "replace", "skip"]
MAX_LABELS = 1 << 16
"""More classes than this are taken for a mistake, such as a number that is no label."""
_PART_BYTES = 1 << 26  # on disk, of what is read one part at a time
_MARK = b"\xef\xbb\xbf"
_HOW = "set data.undecodable (--undecodable) to 'replace' or 'skip' to go on"


@dataclasses.dataclass(frozen=True)
class Document:
    """One document; `name` says where it is, such as `novels/emma.txt` or `pages.jsonl:17`."""

    name: str
    text: str
    pair: str | None = None
    """The second text, of sources with `text_pair`."""
    label: int | str | None = None
    """Of sources with `label`."""


def read_documents(sources: Iterable[SourceConfig], *, undecodable: Undecodable = "error") -> Iterator[Document]:
    """All documents of some sources, in order, one after the other.

    Args:
        sources: where they are.
        undecodable: what to do with bytes that are not UTF-8.

    Raises:
        ValueError: a path that does not exist, holds no text or cannot be read.
    """
    for source in sources:
        for part in open_source(source).parts(_PART_BYTES):
            yield from read_part(part, undecodable=undecodable)


def read_part(part: Part, *, undecodable: Undecodable = "error") -> Iterator[Document]:
    """The documents of a part that have text, in order.

    Raises:
        ValueError: bytes that are not UTF-8 (unless `undecodable` says otherwise), a line that is not JSON or lacks the
            field or the label, a damaged compressed file, a Parquet file without the column; each named by file and
            place.

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
        documents = _read_jsonl(part, _Keys(part.config.field, part.config), undecodable)
    elif isinstance(part.config, ParquetSource):
        documents = _read_parquet(part, _Keys(part.config.column, part.config), undecodable)
    else:
        documents = (Document(name, text) for name, text in _read_files(part, undecodable))
    return (document for document in documents if document.text)


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


class _Keys:
    """Which keys of a JSON object, or columns of a table, make a document."""

    def __init__(self, text: str, config: JsonlSource | ParquetSource) -> None:
        self.text, self.pair, self.label = text, config.text_pair, config.label
        settings = {"field" if isinstance(config, JsonlSource) else "column": text}
        settings |= {"text_pair": config.text_pair} if config.text_pair else {}
        self.settings = settings | ({"label": config.label} if config.label else {})
        """Setting of the source -> key."""

    def document(
        self, name: str, values: Mapping[str, object], where: str, undecodable: Undecodable
    ) -> Document | None:
        """The document that some values make; None if it is to be left out."""
        text = _checked(values[self.text], f"{where}{self.text!r}", undecodable)
        pair = _checked(values[self.pair], f"{where}{self.pair!r}", undecodable) if self.pair else None
        if text is None or (self.pair and pair is None):
            return None
        return Document(name, text, pair, self._label(values[self.label], where) if self.label else None)

    def _label(self, value: object, where: str) -> int | str:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_LABELS:
            return value
        if isinstance(value, str) and value:
            return value
        raise ValueError(
            f"{where}{self.label!r} must be a label: a whole number from 0 to {MAX_LABELS - 1} or a string; got "
            f"{value!r:.60}"
        )


def _read_jsonl(part: Part, keys: _Keys, undecodable: Undecodable) -> Iterator[Document]:
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
            raise ValueError(f"{where}: expected a JSON object with the key {keys.text!r}, got {line[:60]!r}")
        for setting, key in keys.settings.items():
            if key not in value:
                found = ", ".join(map(repr, value)) or "none"
                raise ValueError(
                    f"{where}: no key {key!r}; its keys are {found}: set the source's {setting} to one of them"
                )
        document = keys.document(f"{name}:{number}", value, f"{where}: ", undecodable)
        if document is not None:
            yield document


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


def _read_parquet(part: Part, keys: _Keys, undecodable: Undecodable) -> Iterator[Document]:
    from dsjax.data.parquet import rows

    (path,) = part.files
    name, columns = path.relative_to(part.root).as_posix(), tuple(keys.settings.values())
    for number, values in enumerate(rows(path, columns, start=part.start, stop=part.stop), part.first):
        where = f"{path}: row {number}, column "
        document = keys.document(f"{name}:{number}", values, where, undecodable)
        if document is not None:
            yield document
