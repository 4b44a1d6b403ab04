"""Documents of each kind of source, in an order that depends on the data alone.

A source is listed once (`open_source`), identified (`dsjax.data.corpus.identity`), and cut into parts (`Source.parts`)
that can be read independently of one another (`read_part`); the parts in order give the documents in order.

Files and folders whose name begins with a dot are left out of searched folders; what is passed over is told. In text
files the byte-order mark is dropped and line ends become "\\n"; text in JSON and Parquet is taken as it is. Documents
without text are left out. Compressed files and UTF-16 are known by their first bytes (see `dsjax.data.text.sniff`).
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from dsjax.data.config import JsonlSource, ParquetSource, SourceConfig, StdlibSource, TextSource
from dsjax.data.text.advice import ONE_A_LINE
from dsjax.data.text.passed_over import ending_of, in_words, passed_over
from dsjax.data.text.sniff import is_plain

# Folders of the standard library that hold tests, other people's packages or compiled files.
_NOT_LIBRARY = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "lib-dynload")
)
# Sources up to this size are read whole to identify them, of larger ones the hash of each file is kept.
_WHOLE_CONTENT_BYTES = 64 << 20
_SAMPLED_BLOCKS = 256
_BLOCK_BYTES = 1 << 16
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2", ".jsonl.zst")
# Endings of what is not plain text, although it can be read as such.
_OF_OTHER_KINDS = {
    **dict.fromkeys((*JSONL_ENDINGS, ".ndjson"), "one field of its lines is read by a source of kind jsonl"),
    ".json": "one field is read by a source of kind jsonl, with one object a line",
    ".csv": "one column is read by a source of kind jsonl, with one object a line, or of kind parquet",
    ".tsv": "one column is read by a source of kind jsonl, with one object a line, or of kind parquet",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of documents of one source: whole files, or a range of one file.

    `start` and `stop` are bytes of a jsonl file, or row groups of a Parquet file, and unused for whole files.
    """

    config: SourceConfig
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
        >>> source = open_source(StdlibSource())
        >>> len(source.files) > 100 and source.root in source.files[0].parents
        True
    """

    config: SourceConfig
    root: Path
    """What the files' names are relative to."""
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Bytes of each file on disk."""
    passed_over: Mapping[str, int] = MappingProxyType({})
    """How many files of the searched folder are not read, by their endings."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(self.sizes)

    def remarks(self) -> list[str]:
        """What its user may not expect: files that are passed over, and lines of data that are read as plain text."""
        lines = []
        if self.passed_over:
            count = f"{len(self.files):,} file" + ("s" if len(self.files) > 1 else "")
            what = f"glob {self.config.glob!r}" if isinstance(self.config, TextSource) else f"kind {self.config.kind}"
            lines.append(f"{self.root}: {count} read ({what}), passed over: {in_words(self.passed_over)}")
        if isinstance(self.config, TextSource):
            endings = {ending_of(file.name) for file in self.files} & set(_OF_OTHER_KINDS)
            lines += [
                f"{self.config.path}: {ending} is read as plain text, marks and all; {_OF_OTHER_KINDS[ending]}"
                for ending in sorted(endings)
            ]
        return lines

    @property
    def is_small(self) -> bool:
        """Whether `fingerprint` is of the whole content."""
        return self.num_bytes <= _WHOLE_CONTENT_BYTES

    def name_of(self, file: Path) -> str:
        """A file's name, relative to the root."""
        return file.relative_to(self.root).as_posix()

    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and content; over 64 MiB, over names, sizes, times and 256 sampled blocks.

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

    def parts(self, target_bytes: int) -> list[Part]:
        """Cut into parts of about `target_bytes` on disk, whole documents each."""
        if isinstance(self.config, JsonlSource):
            return [part for file, size in self._pairs() for part in self._jsonl_parts(file, size, target_bytes)]
        if isinstance(self.config, ParquetSource):
            return [part for file, size in self._pairs() for part in self._parquet_parts(file, size, target_bytes)]
        groups: list[tuple[list[Path], int]] = []
        for file, size in self._pairs():
            if not groups or groups[-1][1] + size > target_bytes:
                groups.append(([], 0))
            groups[-1] = ([*groups[-1][0], file], groups[-1][1] + size)
        return [Part(self.config, self.root, tuple(files), size) for files, size in groups]

    def _pairs(self) -> Iterator[tuple[Path, int]]:
        return zip(self.files, self.sizes, strict=True)

    def _jsonl_parts(self, path: Path, size: int, target_bytes: int) -> Iterator[Part]:
        if path.suffix != ".jsonl" or size <= target_bytes or not is_plain(path):
            yield Part(self.config, self.root, (path,), size, 0, size, 1)
            return
        start, line = 0, 1
        with path.open("rb") as file:
            while start < size:
                file.seek(min(start + target_bytes, size))
                file.readline()
                stop = file.tell()
                yield Part(self.config, self.root, (path,), stop - start, start, stop, line)
                file.seek(start)
                while (left := stop - file.tell()) > 0 and (block := file.read(min(left, 1 << 20))):
                    line += block.count(b"\n")
                start = stop

    def _parquet_parts(self, path: Path, size: int, target_bytes: int) -> Iterator[Part]:
        from dsjax.data.text.parquet import row_groups

        groups = row_groups(path)
        total = max(1, sum(group_bytes for _, group_bytes in groups))
        start = row = first = held = 0
        for index, (num_rows, group_bytes) in enumerate(groups):
            held, row = held + group_bytes, row + num_rows
            if held >= target_bytes or index == len(groups) - 1:
                yield Part(self.config, self.root, (path,), size * held // total, start, index + 1, first)
                start, first, held = index + 1, row, 0


def open_source(config: SourceConfig) -> Source:
    """List a source's files.

    Raises:
        ValueError: the path does not exist, or there is no file of that kind in it.
    """
    if isinstance(config, StdlibSource):
        root = Path(sysconfig.get_path("stdlib"))
        files = _search(root, "*.py", lambda parts: not _NOT_LIBRARY.intersection(parts))
        return _source(config, root, files, f"the standard library at {root} has no .py files")
    root = Path(config.path).expanduser()
    if not root.exists():
        raise ValueError(f"source of kind {config.kind}: there is no file or folder {str(root)!r}")
    if root.is_file():
        return _source(config, root.parent, [root], f"source of kind {config.kind}: {str(root)!r} is empty")
    if isinstance(config, TextSource):
        pattern, files = config.glob, _search(root, config.glob)
    elif isinstance(config, JsonlSource):
        pattern, files = " or ".join(JSONL_ENDINGS), [f for f in _search(root, "*") if f.name.endswith(JSONL_ENDINGS)]
    else:
        assert isinstance(config, ParquetSource), f"a source of kind {config.kind} has no text"
        pattern, files = "*.parquet", _search(root, "*.parquet")
    problem = (
        f"source of kind {config.kind}: no file that matches {pattern} and has content in the folder {str(root)!r}"
    )
    left_out = passed_over(root, [file for file in files if file.stat().st_size])
    if left_out:
        problem += f"; it holds {in_words(left_out)}"
    if isinstance(config, JsonlSource) and left_out[".json"]:
        problem += f". A .json file is read where it is named itself; {ONE_A_LINE}"
    return dataclasses.replace(_source(config, root, files, problem), passed_over=left_out)


def _search(root: Path, pattern: str, accept: Callable[[tuple[str, ...]], bool] = lambda parts: True) -> list[Path]:
    found = []
    for path in root.rglob(pattern):
        parts = path.relative_to(root).parts
        if accept(parts[:-1]) and not any(part.startswith(".") for part in parts) and path.is_file():
            found.append((parts, path))
    return [path for _, path in sorted(found)]


def _source(config: SourceConfig, root: Path, files: list[Path], problem: str) -> Source:
    pairs = [(file, size) for file in files if (size := file.stat().st_size)]
    if not pairs:
        raise ValueError(problem)
    return Source(config, root, tuple(file for file, _ in pairs), tuple(size for _, size in pairs))
