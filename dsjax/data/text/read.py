"""Reading a part of a source: bytes to documents, and clear errors for what cannot be read."""

import io
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dsjax.data.config import JsonlSource, ParquetSource, SourceConfig, StdlibSource, TextSource
from dsjax.data.text.document import Document, Keys, Undecodable, decode
from dsjax.data.text.json_lines import read_jsonl
from dsjax.data.text.passed_over import Tally
from dsjax.data.text.sniff import NotText, not_text, open_bytes, read_bounded
from dsjax.data.text.sources import Part, open_source
from dsjax.observe.untrusted import encoding_of

_PART_BYTES = 1 << 26  # on disk, of what is read one part at a time
_MARK = b"\xef\xbb\xbf"


def on_stderr(line: str) -> None:
    """Say what a user may not expect."""
    print(f"dsjax: {line}", file=sys.stderr, flush=True)


def read_documents(
    sources: Iterable[SourceConfig],
    *,
    undecodable: Undecodable = "error",
    report: Callable[[str], None] = on_stderr,
) -> Iterator[Document]:
    """All documents of some sources, in order, one after the other.

    Args:
        sources: where they are.
        undecodable: what to do with bytes that are not UTF-8.
        report: told what is passed over or left out.

    Raises:
        ValueError: a path that does not exist, holds no text or cannot be read.
    """
    for config in sources:
        source, tally = open_source(config), Tally()
        for line in source.remarks():
            report(line)
        for part in source.parts(_PART_BYTES):
            yield from read_part(part, undecodable=undecodable, tally=tally)
        for line in tally.remarks(config, source.root):
            report(line)


def read_part(part: Part, *, undecodable: Undecodable = "error", tally: Tally | None = None) -> Iterator[Document]:
    """The documents of a part that have text, in order.

    Args:
        part: which.
        undecodable: what to do with bytes that are not UTF-8.
        tally: counts what is left out.

    Raises:
        ValueError: bytes that are not UTF-8 (unless `undecodable` says otherwise), a file that is no text, a line that
            is not JSON or lacks the field or the label, a damaged compressed file, a Parquet file without the column;
            each named by file and place.

    Example:
        >>> import tempfile
        >>> from dsjax.data.config import JsonlSource
        >>> from dsjax.data.text.sources import open_source
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"text": "one"}\\n\\n{"text": "two"}\\n')
        ...     file.flush()
        ...     parts = open_source(JsonlSource(path=file.name)).parts(1 << 20)
        ...     [document.text for part in parts for document in read_part(part)]
        ['one', 'two']
    """
    tally = Tally() if tally is None else tally
    if isinstance(part.config, JsonlSource):
        documents = read_jsonl(part, Keys(part.config.field, part.config), undecodable, tally)
    elif isinstance(part.config, ParquetSource):
        documents = _read_parquet(part, Keys(part.config.column, part.config), undecodable, tally)
    else:
        documents = _read_files(part, undecodable, tally)
    for document in documents:
        if document.text:
            yield document
        elif not (isinstance(part.config, TextSource) and part.config.separator):
            tally.empty += 1


def _read_files(part: Part, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
    separator = part.config.separator if isinstance(part.config, TextSource) else ""
    for path in part.files:
        text = _python_text if isinstance(part.config, StdlibSource) else _text
        found = text(path, undecodable)
        if found is None:
            tally.undecodable += 1
            continue
        found = found.replace("\r\n", "\n").replace("\r", "\n")
        name = path.relative_to(part.root).as_posix()
        if not separator:
            yield Document(name, found)
            continue
        pieces = found.split(separator)
        tally.separators += len(pieces) - 1
        for number, piece in enumerate(pieces):
            yield Document(f"{name}#{number}", piece)


def _text(path: Path, undecodable: Undecodable) -> str | None:
    """The text of a file; None if it is to be left out."""
    try:
        with open_bytes(path) as opened:
            data, encoding = read_bounded(opened, path), opened.encoding
        mark = encoding_of(data)[1]
        if not mark and (why := not_text(data)):
            raise NotText(f"{path}: {why}")
    except NotText:
        if undecodable == "skip":
            return None
        raise
    return decode(data[mark:], encoding, str(path), undecodable)


def _python_text(path: Path, undecodable: Undecodable) -> str | None:
    """Python source may name another encoding in its first two lines (PEP 263)."""
    data = path.read_bytes()
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError:
        encoding = "utf-8"
    return decode(data.removeprefix(_MARK), encoding, str(path), undecodable)


def _read_parquet(part: Part, keys: Keys, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
    from dsjax.data.text.parquet import rows

    (path,) = part.files
    name, columns = path.relative_to(part.root).as_posix(), tuple(keys.settings.values())
    for number, values in enumerate(rows(path, columns, start=part.start, stop=part.stop), part.first):
        where = f"{path}: row {number}, column "
        document = keys.document(f"{name}:{number}", values, where, undecodable)
        if document is None:
            tally.undecodable += 1
        else:
            yield document
