"""The source text of Python's standard library."""

import dataclasses
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dsjax.data.text.document import Document, Undecodable, decode
from dsjax.data.text.plain import with_line_feeds
from dsjax.data.text.skipped import Tally
from dsjax.data.text.source import Part, Source, TextSourceKind, list_files, search

# Folders of the standard library that hold tests, other people's packages or compiled files.
_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "lib-dynload")
)
_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StdlibSource(TextSourceKind):
    """The source text of Python's own standard library, from the running interpreter; a document is a file."""

    kind: Literal["stdlib"] = "stdlib"
    """The kind of source."""
    weight: float = 1.0
    """Share of this source's rows in the mixture, before normalisation."""

    def open(self) -> Source:
        """List the .py files of the library, without its tests."""
        root = Path(sysconfig.get_path("stdlib"))
        files = search(root, "*.py", lambda parts: not _NOT_LIBRARY.intersection(parts))
        return list_files(self, root, files, problem=f"the standard library at {root} has no .py files")

    def read(self, part: Part, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
        """Read a document from each file."""
        for path in part.files:
            text = _python_text(path, undecodable)
            if text is None:
                tally.undecodable += 1
            else:
                yield Document(path.relative_to(part.root).as_posix(), with_line_feeds(text))


def _python_text(path: Path, undecodable: Undecodable) -> str | None:
    """Read Python source, which may name another encoding in its first two lines (PEP 263)."""
    data = path.read_bytes()
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError:
        encoding = "utf-8"
    return decode(data.removeprefix(_MARK), encoding, str(path), undecodable)
