"""A source of text: its settings, its files, and the parts that these are read in.

A kind of source is a dataclass of settings that is a `TextSourceKind`, in a file of its own, named in sources.py. Its
files are listed once (`open`), identified (`dsjax.data.corpus.identity`), and cut into parts (`parts`) that can be read
independently of one another (`read`); the parts in order give the documents in order, which depends on the data alone.

Files and folders whose name begins with a dot are left out of searched folders; files that are skipped are told.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsjax.data.text.document import Document, Keys, Undecodable
from dsjax.data.text.skipped import Tally, count_skipped, in_words

# Sources up to this size are read whole to identify them, of larger ones the hash of each file is kept.
_WHOLE_CONTENT_BYTES = 64 << 20
_SAMPLED_BLOCKS = 256
_BLOCK_BYTES = 1 << 16


class TextSourceKind(abc.ABC):
    """Settings of a source of text, and how its documents are found and read.

    Attributes:
        kind: the tag by which a config chooses it.
        weight: share of its rows in the mixture, before normalisation.
    """

    __slots__ = ()

    kind: Any  # of each its own Literal
    weight: float

    @property
    def keys(self) -> Keys | None:
        """Keys of a row that make a document; None where a document is no row."""
        return None

    @abc.abstractmethod
    def open(self) -> "Source":
        """List the files.

        Raises:
            ValueError: the path does not exist, or there is no file of that kind in it.
        """

    @abc.abstractmethod
    def read(self, part: "Part", undecodable: Undecodable, tally: Tally) -> Iterator[Document]:
        """Read the documents of a part, in order, and count those that are left out.

        Raises:
            ValueError: a file, or a row, that gives no document; names file and place.
        """

    def parts(self, source: "Source", target_bytes: int) -> "list[Part]":
        """Cut the files into parts of about `target_bytes` on disk, whole documents each; by default whole files."""
        groups: list[tuple[list[Path], int]] = []
        for file, size in zip(source.files, source.sizes, strict=True):
            if not groups or groups[-1][1] + size > target_bytes:
                groups.append(([], 0))
            groups[-1] = ([*groups[-1][0], file], groups[-1][1] + size)
        return [Part(self, source.root, tuple(files), size) for files, size in groups]

    def remarks(self, source: "Source") -> list[str]:
        """Write a line for each thing about the files that a user may not expect: those that are skipped."""
        return source.skipped_remarks(f"kind {self.kind}")

    def tally_remarks(self, tally: Tally, root: Path) -> list[str]:
        """Write a line for each thing about the documents that a user may not expect."""
        return tally.remarks(root)


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of documents of one source: whole files, or a range of one file.

    `start` and `stop` are in the unit of the source's kind, such as bytes or row groups, and unused for whole files.
    """

    config: TextSourceKind
    root: Path
    files: tuple[Path, ...]
    num_bytes: int
    """Bytes on disk, for progress."""
    start: int = 0
    stop: int = 0
    first: int = 0
    """Number of the range's first line (from 1) or row (from 0)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A source whose files have been listed.

    Example:
        >>> from dsjax.data.text.stdlib import StdlibSource
        >>> source = StdlibSource().open()
        >>> len(source.files) > 100 and source.root in source.files[0].parents
        True
    """

    config: TextSourceKind
    root: Path
    """The folder that the files' names are relative to."""
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Bytes of each file on disk."""
    skipped: Mapping[str, int] = MappingProxyType({})
    """Files of the searched folder that are not read, counted by their endings."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(self.sizes)

    def parts(self, target_bytes: int) -> list[Part]:
        """Cut into parts of about `target_bytes` on disk, whole documents each."""
        return self.config.parts(self, target_bytes)

    def remarks(self) -> list[str]:
        """Write a line for each thing that a user may not expect."""
        return self.config.remarks(self)

    def skipped_remarks(self, chosen_by: str) -> list[str]:
        """Write a line about the files that are skipped; none if there are none."""
        if not self.skipped:
            return []
        count = f"{len(self.files):,} file" + ("s" if len(self.files) > 1 else "")
        return [f"{self.root}: {count} read ({chosen_by}), skipped: {in_words(self.skipped)}"]

    @property
    def is_small(self) -> bool:
        """Whether `fingerprint` is of the whole content."""
        return self.num_bytes <= _WHOLE_CONTENT_BYTES

    def name_of(self, file: Path) -> str:
        """Return a file's name, relative to the root."""
        return file.relative_to(self.root).as_posix()

    def fingerprint(self) -> str:
        """Compute SHA-256 over names, sizes and content; over 64 MiB, over names, sizes, times and 256 sampled blocks.

        Corpora of large sources are found by this where an earlier version made them; see `dsjax.data.corpus.identity`.
        """
        digest = hashlib.sha256()
        whole = self.is_small
        for file, size in zip(self.files, self.sizes, strict=True):
            digest.update(f"{self.name_of(file)}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(file.read_bytes() if whole else str(file.stat().st_mtime_ns).encode())
        if not whole:
            for block in self._sampled_blocks():
                digest.update(block)
        return digest.hexdigest()

    def _sampled_blocks(self) -> Iterator[bytes]:
        """Blocks at even distances over all files laid end to end, the first and the last among them."""
        last = max(0, self.num_bytes - _BLOCK_BYTES)
        targets = [last * n // (_SAMPLED_BLOCKS - 1) for n in range(_SAMPLED_BLOCKS)]
        begin, index = 0, 0
        for target in targets:
            while target >= begin + self.sizes[index]:
                begin, index = begin + self.sizes[index], index + 1
            with self.files[index].open("rb") as file:
                file.seek(target - begin)
                yield file.read(_BLOCK_BYTES)


def list_files(config: TextSourceKind, root: Path, files: list[Path], *, problem: str) -> Source:
    """List those of a source's files that have content.

    Raises:
        ValueError: none has; says `problem`.
    """
    pairs = [(file, size) for file in files if (size := file.stat().st_size)]
    if not pairs:
        raise ValueError(problem)
    return Source(config, root, tuple(file for file, _ in pairs), tuple(size for _, size in pairs))


def list_path(
    config: TextSourceKind,
    path: str,
    *,
    glob: str = "*",
    endings: tuple[str, ...] = ("",),
    hints: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    """List the file at a path, or the files that are in the folder there.

    Args:
        config: whose files.
        path: of the file or folder.
        glob: pattern of the names of a folder's files.
        endings: their names end with one of these.
        hints: ending of another file -> what to say of it where a folder has none of these files.

    Raises:
        ValueError: the path does not exist, or there is no such file in it.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"source of kind {config.kind}: there is no file or folder {str(root)!r}")
    if root.is_file():
        return list_files(config, root.parent, [root], problem=f"source of kind {config.kind}: {str(root)!r} is empty")
    files = [file for file in search(root, glob) if file.name.endswith(endings)]
    skipped = count_skipped(root, [file for file in files if file.stat().st_size])
    pattern = " or ".join(endings) if any(endings) else glob
    problem = (
        f"source of kind {config.kind}: no file that matches {pattern} and has content in the folder {str(root)!r}"
    )
    if skipped:
        problem += f"; it holds {in_words(skipped)}"
    problem += "".join(f". {hint}" for ending, hint in hints.items() if skipped[ending])
    return dataclasses.replace(list_files(config, root, files, problem=problem), skipped=skipped)


def search(root: Path, glob: str, accept: Callable[[tuple[str, ...]], bool] = lambda parts: True) -> list[Path]:
    """Search a folder for files, in sorted order; `accept` is asked about the names of the folders above each."""
    found = []
    for path in root.rglob(glob):
        parts = path.relative_to(root).parts
        if accept(parts[:-1]) and not any(part.startswith(".") for part in parts) and path.is_file():
            found.append((parts, path))
    return [path for _, path in sorted(found)]
