"""The documents of sources, and of parts of them."""

import sys
from collections.abc import Callable, Iterable, Iterator

from dsjax.data.text.document import Document, Undecodable
from dsjax.data.text.skipped import Tally
from dsjax.data.text.source import Part, TextSourceKind

_PART_BYTES = 1 << 26  # on disk, of what is read one part at a time


def on_stderr(line: str) -> None:
    """Print a line that a user may not expect."""
    print(f"dsjax: {line}", file=sys.stderr, flush=True)


def read_documents(
    sources: Iterable[TextSourceKind],
    *,
    undecodable: Undecodable = "error",
    report: Callable[[str], None] = on_stderr,
) -> Iterator[Document]:
    """Read all documents of some sources, in order.

    Args:
        sources: where they are.
        undecodable: treatment of bytes that are not UTF-8.
        report: told what is skipped or left out.

    Raises:
        ValueError: a path that does not exist, holds no text or cannot be read.
    """
    for config in sources:
        source, tally = config.open(), Tally()
        for line in source.remarks():
            report(line)
        for part in source.parts(_PART_BYTES):
            yield from read_part(part, undecodable=undecodable, tally=tally)
        for line in config.tally_remarks(tally, source.root):
            report(line)


def read_part(part: Part, *, undecodable: Undecodable = "error", tally: Tally | None = None) -> Iterator[Document]:
    """Read the documents of a part that have text, in order.

    Args:
        part: which.
        undecodable: treatment of bytes that are not UTF-8.
        tally: counts what is left out.

    Raises:
        ValueError: bytes that are not UTF-8 (unless `undecodable` says otherwise), a file that is no text, a line that
            is not JSON or lacks the field or the label, a damaged compressed file, a Parquet file without the column;
            each named by file and place.

    Example:
        >>> import tempfile
        >>> from dsjax.data.config import JsonlSource
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"text": "one"}\\n\\n{"text": "two"}\\n')
        ...     file.flush()
        ...     parts = JsonlSource(path=file.name).open().parts(1 << 20)
        ...     [document.text for part in parts for document in read_part(part)]
        ['one', 'two']
    """
    tally = Tally() if tally is None else tally
    for document in part.config.read(part, undecodable, tally):
        if document.text:
            yield document
        else:
            tally.empty += 1
