"""Identity of a source's data: SHA-256 of its files, which is kept and computed anew when a file changed.

A file counts as the one that was hashed while its size and its times of change (mtime and ctime, which no program can
set back) are the same. Files that a source does not read count for nothing.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from dsjax.checkpoint.manifest import read_json, write_atomically
from dsjax.data.corpus.progress import ByteProgress
from dsjax.data.corpus.store import MANIFEST, open_corpus_folder
from dsjax.data.text.source import Source

_SETTLED_NANOSECONDS = 2_000_000_000  # younger files may change again within one tick of the file system's clock


def identity(source: Source, cache_dir: Path, *, progress: bool = False) -> str:
    """Compute SHA-256 over the names, sizes and contents of a source's files.

    Args:
        source: whose files.
        cache_dir: where the hashes of single files are kept.
        progress: show a bar or lines on stderr.

    Example:
        >>> import tempfile
        >>> from dsjax.data.config import TextSource
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("one")
        >>> before = identity(TextSource(path=str(folder)).open(), folder / "cache")
        >>> (folder / "a.txt").touch()
        >>> identity(TextSource(path=str(folder)).open(), folder / "cache") == before
        True
    """
    if source.is_small:
        return source.fingerprint()
    kept = cache_dir / "files" / f"{hashlib.sha256(str(source.root.resolve()).encode()).hexdigest()[:32]}.json"
    known = _read(kept)
    entries: dict[str, list[Any]] = {}
    now = time.time_ns()
    digest = hashlib.sha256(b"content 1\0")
    changed = [file for file in source.files if known.get(source.name_of(file), [None])[:3] != _state(file)]
    with ByteProgress(
        "identifying the data", total=sum(map(_size, changed)), enabled=progress and bool(changed)
    ) as bar:
        for file, size in zip(source.files, source.sizes, strict=True):
            name, state = source.name_of(file), _state(file)
            found = known.get(name, [None])
            content = found[3] if found[:3] == state else _hash(file, bar)
            if now - max(state[1:]) > _SETTLED_NANOSECONDS:
                entries[name] = [*state, content]
            digest.update(f"{name}\0{size}\0{content}\0".encode("utf-8", "surrogateescape"))
    if any(known.get(name) != entry for name, entry in entries.items()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps({"files": known | entries}).encode())
    return digest.hexdigest()


def known_key(corpora: Path, key: str, former: str) -> str:
    """Find the key of a corpus: `former` if it was built when large files were identified by their times.

    That corpus is then noted under `key` too, which stays when its files are touched or copied.

    Args:
        corpora: the cache's folder of them, or the folder of one.
        key: from the content.
        former: from the times.
    """
    if (corpora / MANIFEST).is_file():
        return former if open_corpus_folder(corpora).key == former else key
    noted = corpora / f"{key[:32]}.is"
    if (corpora / key[:32] / MANIFEST).is_file():
        return key
    if (corpora / former[:32] / MANIFEST).is_file():
        write_atomically(noted, former.encode())
        return former
    known = noted.read_text() if noted.is_file() else ""
    return known if known and (corpora / known[:32] / MANIFEST).is_file() else key


def _size(file: Path) -> int:
    return file.stat().st_size


def _state(file: Path) -> list[int]:
    """State that changes when a file does: its size, and two times in nanoseconds."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _hash(file: Path, bar: ByteProgress) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            bar.advance(len(block))
    return digest.hexdigest()


def _read(kept: Path) -> dict[str, list[Any]]:
    """Name -> size, times and hash of each file; {} if there are none, or what is kept is damaged."""
    try:
        files = read_json(kept).get("files")
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(files, dict):
        return {}
    return {name: entry for name, entry in files.items() if isinstance(entry, list) and len(entry) == 4}
