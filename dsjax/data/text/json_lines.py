"""JSON lines: one object a line, in a file that may be compressed or in UTF-16; every error names the file and line."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsjax.data.text import advice
from dsjax.data.text.document import Document, Keys, Undecodable, decode
from dsjax.data.text.passed_over import Tally
from dsjax.data.text.sniff import MAX_DECOMPRESSED, NotText, Opened, check_size, not_text, open_bytes
from dsjax.data.text.sources import Part
from dsjax.observe.untrusted import parse_json

_MARK = b"\xef\xbb\xbf"


def read_jsonl(part: Part, keys: Keys, undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
    """The documents of a part of one file.

    Raises:
        ValueError: a line that is no JSON object or lacks a key, bytes that are not UTF-8; names file and line.
    """
    (path,) = part.files
    name = path.relative_to(part.root).as_posix()
    try:
        for number, data in _numbered_lines(path, part, undecodable):
            if not data.strip():
                continue
            where = f"{path}:{number}"
            line = decode(data, "utf-8", where, undecodable)
            document = None
            if line is not None:
                document = keys.document(
                    f"{name}:{number}", _object(line, path, where, keys), f"{where}: ", undecodable
                )
            if document is None:
                tally.undecodable += 1
            else:
                yield document
    except NotText:
        if undecodable != "skip":
            raise
        tally.undecodable += 1


def _object(line: str, path: Path, where: str, keys: Keys) -> Mapping[str, object]:
    """The JSON object of a line, which has all keys."""
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
    """What to do with a file that is not JSON lines."""
    with open_bytes(path) as opened:
        head = opened.stream.read(4096)
    return not_text(head) or advice.for_rows(path, head.decode(opened.encoding, "replace"))


def _numbered_lines(path: Path, part: Part, undecodable: Undecodable) -> Iterator[tuple[int, bytes]]:
    """The lines of a part, in UTF-8, with their line ends."""
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
