"""Manifests: the size and SHA-256 of every file of a checkpoint, so that damage is seen before a tensor is used.

Orbax does not notice a flipped bit. After its commit, process p of P hashes every file i with i % P == p and writes

    <sha256> <size> <path>            one line per file, paths relative to the checkpoint's folder
    <sha256 of the lines above> end

as `manifest_<p>_of_<P>.txt`. The names say how many parts there must be: a folder without all of them is incomplete.
JSON files at the top of the folder are written after the commit, by process 0, and belong to its part.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dsjax.observe.untrusted import parse_json

_PART = re.compile(r"manifest_(\d{5,})_of_(\d{5,})\.txt")
_LINE = re.compile(r"([0-9a-f]{64}) (\d{1,19}) (.+)")
_TEMPORARY = ".partial"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a small file so that a crash at any moment leaves the old content or the new one, never a part.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_atomically(path, b"whole"); path.read_bytes()
        b'whole'
    """
    temporary = path.with_name(path.name + _TEMPORARY)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def back_up(path: Path, content: bytes) -> None:
    """Writes what a file held beside it, as `<name>.bak`, or `.bak.1`, `.bak.2`, ... if that exists.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> back_up(path, b"first"); back_up(path, b"second")
        >>> sorted(file.name for file in path.parent.iterdir())
        ['note.txt.bak', 'note.txt.bak.1']
    """
    number = 0
    while (backup := path.with_name(f"{path.name}.bak" + (f".{number}" if number else ""))).exists():
        number += 1
    write_atomically(backup, content)


def rename_durably(old: Path, new: Path) -> None:
    """Renames a folder that is whole on disk; after a power failure it has one name or the other."""
    os.rename(old, new)
    _sync_folder(new.parent)


def write_part(folder: Path, part: int = 0, *, num_parts: int = 1) -> None:
    """Hashes this process's share of the files in `folder` and writes its part of the manifest.

    Every file is flushed to the disk first: once the manifest exists, a power failure cannot take the data away.

    Args:
        folder: the committed checkpoint.
        part: index of the process.
        num_parts: number of processes.

    Raises:
        OSError: a file cannot be read, or the manifest cannot be written.
    """
    assert 0 <= part < num_parts, (part, num_parts)
    lines = []
    for path in _share(_files(folder), part, num_parts):
        digest, size = _hash_file(folder / path, flush=True)
        lines.append(f"{digest} {size} {path}\n")
    for directory, _, _ in os.walk(folder):
        _sync_folder(Path(directory))
    body = "".join(lines).encode()
    tail = f"{hashlib.sha256(body).hexdigest()} end\n".encode()
    write_atomically(folder / f"manifest_{part:05d}_of_{num_parts:05d}.txt", body + tail)


def is_complete(folder: Path) -> bool:
    """Whether every part of the manifest is there; reads no content."""
    return not _missing_parts(folder)


def uncovered(folder: Path) -> list[str]:
    """Files of a complete checkpoint that no part lists, or lists with another size. Cheap: nothing is hashed."""
    listed, problems = _read_parts(folder)
    for path in _files(folder):
        if path not in listed:
            problems.append(f"{path}: in no part of the manifest")
        elif (size := (folder / path).stat().st_size) != listed[path][1]:
            problems.append(f"{path}: expected {listed[path][1]} bytes, found {size}")
    return problems


def verify(folder: Path, part: int = 0, *, num_parts: int = 1) -> list[str]:
    """Compares the files of a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        part: which share of the files to read, so that several processes can divide the work.
        num_parts: number of shares; need not be the number of processes that wrote.

    Returns:
        One line per problem, each naming the file, what was expected and what was found. Empty: this share is whole.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "weights").write_bytes(b"1234")
        >>> verify(folder)
        ['incomplete: it has no manifest (the save was interrupted)']
        >>> write_part(folder); verify(folder)
        []
        >>> _ = (folder / "weights").write_bytes(b"123"); verify(folder)
        ['weights: expected 4 bytes, found 3']
    """
    if missing := _missing_parts(folder):
        return missing
    listed, problems = _read_parts(folder)
    for path in _share(sorted(listed), part, num_parts):
        problems.extend(_compare(folder / path, path, *listed[path]))
    return problems


def read_json(path: Path, *, lenient: bool = False) -> dict:
    """Reads a JSON object, or raises a ValueError that names the file; `lenient` as `parse_json`."""
    try:
        value = parse_json(path.read_bytes(), str(path), lenient=lenient)
    except ValueError as error:
        raise ValueError(f"{error}; mend the file, or get it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _compare(file: Path, path: str, digest: str, size: int) -> Iterator[str]:
    if not file.is_file():
        yield f"{path}: expected {size} bytes, found no such file"
        return
    found = file.stat().st_size
    if found != size:
        yield f"{path}: expected {size} bytes, found {found}"
        return
    try:
        found_digest, _ = _hash_file(file)
    except OSError as error:
        yield f"{path}: expected {size} readable bytes, found {error.strerror}"
        return
    if found_digest != digest:
        yield f"{path}: expected SHA-256 {digest}, found {found_digest}"


def _missing_parts(folder: Path) -> list[str]:
    """Problems with the set of parts, by their names alone."""
    names = [match for name in sorted(os.listdir(folder)) if (match := _PART.fullmatch(name))]
    if not names:
        return ["incomplete: it has no manifest (the save was interrupted)"]
    counts = {int(name[2]) for name in names}
    if len(counts) > 1:
        return [f"{name[0]}: expected parts of one manifest, found parts of {sorted(counts)}" for name in names]
    (count,) = counts
    found = {int(name[1]) for name in names}
    return [
        f"manifest_{part:05d}_of_{count:05d}.txt: expected {count} parts, this is missing (the save was interrupted)"
        for part in range(count)
        if part not in found
    ]


def _read_parts(folder: Path) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """All lines of all parts as {path: (digest, size)}, and what is wrong with the parts themselves."""
    listed: dict[str, tuple[str, int]] = {}
    problems = []
    for name in sorted(os.listdir(folder)):
        if not _PART.fullmatch(name):
            continue
        body, _, tail = (folder / name).read_bytes().removesuffix(b" end\n").rpartition(b"\n")
        body += b"\n" if body else b""
        digest = hashlib.sha256(body).hexdigest()
        if (folder / name).read_bytes() != body + digest.encode() + b" end\n":
            problems.append(f"{name}: damaged: expected its last line to be {digest}, found {tail[:64]!r}")
            continue
        for line in body.decode().split("\n")[:-1]:
            match = _LINE.fullmatch(line)
            assert match is not None, f"a line this module never writes: {line}"
            listed[match[3]] = (match[1], int(match[2]))
    return listed, problems


def _files(folder: Path) -> list[str]:
    """Paths of the regular files below `folder`, without the manifest, sorted."""
    paths = []
    for directory, _, names in os.walk(folder):
        relative = Path(directory).relative_to(folder)
        paths.extend((relative / name).as_posix() for name in names)
    return sorted(path for path in paths if not _PART.fullmatch(path) and not path.endswith(_TEMPORARY))


def _share(paths: list[str], part: int, num_parts: int) -> list[str]:
    """The share of one process. Late files are not counted: whether another process sees them yet is left to chance."""
    late = [path for path in paths if "/" not in path and path.endswith(".json")]
    committed = [path for path in paths if path not in late]
    return committed[part::num_parts] + (late if part == 0 else [])


def _hash_file(path: Path, *, flush: bool = False) -> tuple[str, int]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return digest, file.tell()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
