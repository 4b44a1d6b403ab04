"""JSON lines: one object a line, in a file that may be compressed or in UTF-16; every error names the file and line."""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from dsjax.data.text import advice
from dsjax.data.text.document import Document, Keys, Undecodable, decode
from dsjax.data.text.skipped import Tally
from dsjax.data.text.sniff import MAX_DECOMPRESSED, NotText, Opened, check_size, is_plain, not_text, open_bytes
from dsjax.data.text.source import Part, Source, TextSourceKind, list_path
from dsjax.observe.untrusted import parse_json

JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2", ".jsonl.zst")
_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JsonlSource(TextSourceKind):
    """One JSON object a line; a document is one line's field."""

    path: str
    """A .jsonl file (also .jsonl.gz, .bz2, .xz, .zst), or a folder of them."""
    kind: Literal["jsonl"] = "jsonl"
    """The kind of source."""
    field: str = "text"
    """The key that holds the text."""
    text_pair: str = ""
    """The key of a second text that belongs to the first, for the task classification; '' for none."""
    label: str = ""
    """The key of the label, a whole number from 0 or a string, for the task classification; '' for none."""
    weight: float = 1.0
    """Share of this source's rows in the mixture, before normalisation."""

    @property
    def keys(self) -> Keys:
        """Keys of an object that make a document."""
        return Keys("field", self.field, pair=self.text_pair, label=self.label)

    def open(self) -> Source:
        """List the file, or the folder's files of JSON lines."""
        hint = f"A .json file is read where it is named itself; {advice.ONE_A_LINE}"
        return list_path(self, self.path, endings=JSONL_ENDINGS, hints={".json": hint})

    def parts(self, source: Source, target_bytes: int) -> list[Part]:
        """Cut each file where a line ends; one that is compressed, or in UTF-16, is a part."""
        files = zip(source.files, source.sizes, strict=True)
        return [part for file, size in files for part in self._cut(source.root, file, size, target_bytes)]

    def _cut(self, root: Path, path: Path, size: int, target_bytes: int) -> Iterator[Part]:
        if path.suffix != ".jsonl" or size <= target_bytes or not is_plain(path):
            yield Part(self, root, (path,), size, 0, size, 1)
            return
        start, line = 0, 1
        with path.open("rb") as file:
            while start < size:
                file.seek(min(start + target_bytes, size))
                file.readline()
                stop = file.tell()
                yield Part(self, root, (path,), stop - start, start, stop, line)
                file.seek(start)
                while (left := stop - file.tell()) > 0 and (block := file.read(min(left, 1 << 20))):
                    line += block.count(b"\n")
                start = stop

    def read(self, part: Part, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
        """Read a document from each line.

        Raises:
            ValueError: a line that is no JSON object or lacks a key, bytes that are not UTF-8; names file and line.
        """
        (path,) = part.files
        name, keys = path.relative_to(part.root).as_posix(), self.keys
        try:
            for number, data in _numbered_lines(path, part, undecodable):
                if not data.strip():
                    continue
                where = f"{path}:{number}"
                line = decode(data, "utf-8", where, undecodable)
                document = None
                if line is not None:
                    values = _object(line, path, where, keys)
                    document = keys.document(f"{name}:{number}", values, f"{where}: ", undecodable)
                if document is None:
                    tally.undecodable += 1
                else:
                    yield document
        except NotText:
            if undecodable != "skip":
                raise
            tally.undecodable += 1


def _object(line: str, path: Path, where: str, keys: Keys) -> Mapping[str, object]:
    """Parse the JSON object of a line, which has all keys."""
    try:
        value = parse_json(line, where, lenient=True)
    except ValueError as error:
        raise ValueError(f"{error}; {_advice(path)}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: expected a JSON object with the key {keys.text!r}, got {line[:60]!r}; {_advice(path)}"
        )
    for setting, key in keys.settings.items():
        if key not in value:
            found = ", ".join(map(repr, list(value)[:20])) or "none"
            raise ValueError(
                f"{where}: no key {key!r}; its keys are {found}: set the source's {setting} to one of them"
                + advice.for_missing_key(path, value)
            )
    return value


def _advice(path: Path) -> str:
    """Advise on a file that is not JSON lines."""
    with open_bytes(path) as opened:
        head = opened.stream.read(4096)
    return not_text(head) or advice.for_rows(path, head.decode(opened.encoding, "replace"))


def _numbered_lines(path: Path, part: Part, undecodable: Undecodable) -> Iterator[tuple[int, bytes]]:
    """Read the lines of a part, in UTF-8, with their line ends."""
    number = part.first
    with open_bytes(path) as opened:
        stream, whole = opened.stream, opened.compression is not None
        if opened.encoding != "utf-8":
            stream, whole = _Transcoded(opened, path, undecodable), True
        if not whole:
            opened.stream.seek(part.start)
        most = MAX_DECOMPRESSED + 1 if opened.compression else -1
        while (whole or opened.stream.tell() < part.stop) and (line := stream.readline(most)):
            if opened.compression:
                check_size(len(line), path)
            yield number, line.removeprefix(_MARK) if number == 1 else line
            number += 1


class _Transcoded:
    """Lines of a stream in UTF-16 or UTF-32, as UTF-8; they end with "\\n" and nothing else."""

    def __init__(self, opened: Opened, path: Path, undecodable: Undecodable) -> None:
        self._path, self._encoding, self._number = path, opened.encoding, 0
        errors = "replace" if undecodable == "replace" else "strict"
        self._text = io.TextIOWrapper(opened.stream, encoding=opened.encoding, errors=errors, newline="\n")

    def readline(self, most: int) -> bytes:
        """The next line, or so much of it; b"" at the end."""
        self._number += 1
        try:
            return self._text.readline(most).encode()
        except UnicodeError as error:
            raise ValueError(
                f"{self._path}: not {self._encoding.upper()} at or after line {self._number}: {error}"
            ) from error
