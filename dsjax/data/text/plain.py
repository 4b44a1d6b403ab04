"""Text files: a document is a file, or a piece between separators.

The byte-order mark is dropped and line ends become "\\n". Compressed files and UTF-16 are known by their first bytes
(see `dsjax.data.text.sniff`).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from dsjax.data.text.document import Document, Undecodable, decode
from dsjax.data.text.jsonl import JSONL_ENDINGS
from dsjax.data.text.skipped import Tally, ending_of
from dsjax.data.text.sniff import NotText, not_text, open_bytes, read_bounded
from dsjax.data.text.source import Part, Source, TextSourceKind, list_path
from dsjax.observe.untrusted import encoding_of

# Endings of what is not plain text, although it can be read as such.
_OF_OTHER_KINDS = {
    **dict.fromkeys((*JSONL_ENDINGS, ".ndjson"), "one field of its lines is read by a source of kind jsonl"),
    ".json": "one field is read by a source of kind jsonl, with one object a line",
    ".csv": "one column is read by a source of kind jsonl, with one object a line, or of kind parquet",
    ".tsv": "one column is read by a source of kind jsonl, with one object a line, or of kind parquet",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextSource(TextSourceKind):
    """Text files in UTF-8, or what their byte-order mark says, compressed or not; a document is a file."""

    path: str
    """A file, or a folder that is searched recursively."""
    kind: Literal["text"] = "text"
    """The kind of source."""
    glob: str = "*.txt"
    """Pattern of the names of a folder's files."""
    separator: str = ""
    """Cuts each file into documents and is dropped, such as "\\n\\n"; '' makes each file one document."""
    weight: float = 1.0
    """Share of this source's rows in the mixture, before normalisation."""

    def __post_init__(self) -> None:
        if not self.glob or self.glob.startswith("/"):
            raise ValueError(f"glob must be a pattern for names in the folder, such as *.txt; got {self.glob!r}")

    def open(self) -> Source:
        """List the file, or the folder's files that match `glob`."""
        return list_path(self, self.path, glob=self.glob)

    def read(self, part: Part, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
        """Read each file as a document, or as those between its separators."""
        for path in part.files:
            text = _text(path, undecodable)
            if text is None:
                tally.undecodable += 1
                continue
            text, name = with_line_feeds(text), path.relative_to(part.root).as_posix()
            if not self.separator:
                yield Document(name, text)
                continue
            pieces = text.split(self.separator)
            tally.separators += len(pieces) - 1
            yield from (Document(f"{name}#{number}", piece) for number, piece in enumerate(pieces) if piece)

    def remarks(self, source: Source) -> list[str]:
        """Write a line about skipped files, and for each ending of data that are read as plain text."""
        endings = {ending_of(file.name) for file in source.files} & set(_OF_OTHER_KINDS)
        return source.skipped_remarks(f"glob {self.glob!r}") + [
            f"{self.path}: {ending} is read as plain text, marks and all; {_OF_OTHER_KINDS[ending]}"
            for ending in sorted(endings)
        ]

    def tally_remarks(self, tally: Tally, root: Path) -> list[str]:
        """Write a line for each count that a user may not expect, and for a separator that does not occur."""
        lines = tally.remarks(root)
        if self.separator and not tally.separators:
            hint = ""
            if "\\" in self.separator:
                hint = '; a line end is "\\n" in double quotes: in single quotes, or none, \\n is two characters'
            elif "\r" in self.separator:
                hint = '; every line end becomes "\\n" before'
            lines.append(
                f"{self.path}: the separator {self.separator!r} does not occur: each file is one document{hint}"
            )
        return lines


def with_line_feeds(text: str) -> str:
    """Write each line end as "\\n".

    Example:
        >>> with_line_feeds("a\\r\\nb\\rc")
        'a\\nb\\nc'
    """
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text(path: Path, undecodable: Undecodable) -> str | None:
    """Read the text of a file; None if it is to be left out."""
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
