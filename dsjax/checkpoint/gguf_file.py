"""GGUF files, versions 2 and 3 (little endian): a header with metadata, then tensors, many of them quantised.

    "GGUF"  u32 version  u64 tensors  u64 pairs
    pairs:    string key, u32 type, value                   (string: u64 length, UTF-8; array: u32 type, u64 count, ...)
    tensors:  string name, u32 dims, u64 sizes, fastest first, u32 type, u64 offset
    padding to a multiple of general.alignment (32), and from there the tensors' bytes at their offsets

The file is not trusted: every count, length and offset is checked against the file's size before anything is allocated.
"""

import dataclasses
import difflib
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.gguf_types import TYPES, TensorType, dequantise

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 100_000_000  # of safetensors, too; 256,000 tokens with their merges take 10 MB
_MAX_DIMS = 4
_MAX_KEY_BYTES = 65_535
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor lies, and how."""

    shape: tuple[int, ...]
    """Shape in numpy's order: the file's sizes reversed."""
    kind: TensorType
    """Storage of its numbers."""
    offset: int
    """Bytes from the start of the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.kind.block * self.kind.size


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """An open file: its header is read and checked; a tensor is read when it is asked for."""

    path: Path
    """The file."""
    metadata: Mapping[str, Any]
    """Key -> int, float, bool, str, or a list of these."""
    tensors: Mapping[str, TensorPlace]
    """Name -> place."""

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self._place(name).shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised, as a new float32 array.

        Raises:
            ValueError: no tensor of that name (says which is the closest), a type that cannot be read, or the file was
                cut since its header was read.
        """
        place = self._place(name)
        size = place.num_bytes
        if self.path.stat().st_size < place.offset + size:
            raise ValueError(f"{self.path}: truncated since it was opened: {name} ends at byte {place.offset + size}")
        if size == 0:
            return np.zeros(place.shape, np.float32)
        raw = np.memmap(self.path, dtype=np.uint8, mode="r", offset=place.offset, shape=(size,))
        try:
            return dequantise(place.kind, np.asarray(raw)).reshape(place.shape)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from error

    def _place(self, name: str) -> TensorPlace:
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; the closest is {close[0]}" if close else ""
            raise ValueError(f"{self.path}: no tensor named {name}{hint}")
        return self.tensors[name]


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a file that begins as GGUF files do."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(4) == MAGIC


def open_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of a GGUF file.

    Args:
        path: the file.

    Raises:
        ValueError: not such a file, or a truncated or damaged one: one message that says where and how.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.gguf"
        >>> pair = struct.pack("<Q4sII", 4, b"year", 4, 2025)                       # u32 year = 2025
        >>> tensor = struct.pack("<Q1sIQQIQ", 1, b"w", 2, 3, 2, 0, 0)               # w, 3 by 2, F32, offset 0
        >>> header = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + pair + tensor
        >>> _ = path.write_bytes(header + bytes(-len(header) % 32) + np.arange(6, dtype="<f4").tobytes())
        >>> file = open_gguf(path)
        >>> dict(file.metadata), file.shape("w"), file.read("w").tolist()
        ({'year': 2025}, (2, 3), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a GGUF file")
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 24:
            raise ValueError(f"{path}: truncated: {size} bytes, but the fixed part of a GGUF header alone takes 24")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(path, data, size))


def _read_header(cursor: "_Cursor") -> GGUFFile:
    file = cursor.file
    if cursor.take(4, "the magic") != MAGIC:
        raise ValueError(f"{file}: not a GGUF file: it does not begin with GGUF")
    version = cursor.number("<I", "the version")
    if version not in (2, 3):
        swapped = " (a big-endian file; convert it to little endian)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"{file}: GGUF version {version}{swapped}; versions 2 and 3 are read")
    num_tensors = cursor.count("<Q", 25, "tensors")  # a name's length, a number of dims, a type, an offset: 24, a byte
    num_pairs = cursor.count("<Q", 13, "metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        start = cursor.position
        key = cursor.string("a metadata key", _MAX_KEY_BYTES)
        if key in metadata:
            raise ValueError(f"{file}: damaged: the metadata key {key!r} comes a second time at byte {start}")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"{file}: damaged: general.alignment is {alignment!r}; expected a power of two up to 2^20")
    tensors: dict[str, TensorPlace] = {}
    for _ in range(num_tensors):
        start = cursor.position
        name, place = _read_place(cursor)
        if name in tensors:
            raise ValueError(f"{file}: damaged: the tensor {name!r} comes a second time at byte {start}")
        if place.offset % alignment:
            raise ValueError(
                f"{file}: damaged: {name} has the offset {place.offset}, no multiple of the alignment {alignment}"
            )
        tensors[name] = place
    begin = cursor.position + -cursor.position % alignment
    tensors = {name: dataclasses.replace(place, offset=begin + place.offset) for name, place in tensors.items()}
    _check_layout(file, tensors, cursor.size)
    return GGUFFile(file, metadata, tensors)


def _read_place(cursor: "_Cursor") -> tuple[str, TensorPlace]:
    """A tensor's name, and its place with the offset that the file gives."""
    file = cursor.file
    name = cursor.string("a tensor's name", _MAX_KEY_BYTES)
    num_dims = cursor.number("<I", f"the dimensions of {name}")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"{file}: damaged: {name} has {num_dims} dimensions; at most {_MAX_DIMS} are allowed")
    sizes = [cursor.number("<Q", f"the shape of {name}") for _ in range(num_dims)]
    number = cursor.number("<I", f"the type of {name}")
    offset = cursor.number("<Q", f"the offset of {name}")
    if number not in TYPES:
        known = ", ".join(kind.name for kind in TYPES.values())
        raise ValueError(f"{file}: {name} has the unknown type {number}; known are {known}")
    kind = TYPES[number]
    if math.prod(size for size in sizes if size) * 4 >= 2**63:
        raise ValueError(f"{file}: damaged: {name}: shape {sizes[::-1]} is larger than any memory")
    if (sizes[0] if sizes else 1) % kind.block:
        raise ValueError(
            f"{file}: damaged: {name} is {kind.name}, in blocks of {kind.block}, but has rows of "
            f"{sizes[0] if sizes else 1}"
        )
    return name, TensorPlace(tuple(reversed(sizes)), kind, offset)


def _check_layout(file: Path, tensors: Mapping[str, TensorPlace], size: int) -> None:
    """All tensors lie inside the file, and no two share a byte."""
    end, previous = 0, ""
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if place.offset + place.num_bytes > size:
            raise ValueError(
                f"{file}: truncated: {name} lies at offset {place.offset} and takes {place.num_bytes} bytes, up to "
                f"{place.offset + place.num_bytes}, but the file ends at {size}"
            )
        if place.num_bytes and place.offset < end:
            raise ValueError(f"{file}: damaged: {name} at byte {place.offset} overlaps {previous}, which ends at {end}")
        if place.num_bytes:
            end, previous = place.offset + place.num_bytes, name


class _Cursor:
    """A place in the header, which never leaves the file."""

    def __init__(self, file: Path, data: mmap.mmap, size: int) -> None:
        self.file, self.data, self.size, self.position = file, data, size, 0

    def take(self, length: int, what: str) -> bytes:
        """The next bytes."""
        end = self.position + length
        if end > self.size:
            raise ValueError(
                f"{self.file}: truncated: {what} at byte {self.position} takes {length} bytes, the file ends at "
                f"{self.size}"
            )
        if end > MAX_HEADER_BYTES:
            raise ValueError(
                f"{self.file}: damaged: the header goes beyond byte {MAX_HEADER_BYTES} ({what}, {length} bytes)"
            )
        found = self.data[self.position : end]
        self.position = end
        return found

    def number(self, form: str, what: str) -> Any:
        """One number."""
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, form: str, smallest: int, what: str) -> int:
        """The number of things that follow, each of which takes at least `smallest` bytes."""
        start = self.position
        count = self.number(form, f"the number of {what}")
        if count * smallest > min(self.size, MAX_HEADER_BYTES) - self.position:
            raise ValueError(
                f"{self.file}: truncated or damaged: {count} {what} are announced at byte {start}, which need at least "
                f"{count * smallest} bytes; {self.size - self.position} are left"
            )
        return count

    def string(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        """A length and so many bytes of UTF-8."""
        start = self.position
        length = self.number("<Q", f"the length of {what}")
        if length > longest:
            raise ValueError(f"{self.file}: damaged: {what} at byte {start} has {length} bytes; at most {longest}")
        return self._text(self.take(length, what), what, start)

    def value(self, key: str) -> Any:
        """A type and a value of it."""
        start = self.position
        kind = self.number("<I", f"the type of {key}")
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _NUMBERS:
            raise ValueError(f"{self.file}: damaged: {key} at byte {start} has the unknown type {kind}")
        return self.number(_NUMBERS[kind], key)

    def _array(self, key: str) -> list[Any]:
        start = self.position
        kind = self.number("<I", f"the type of the items of {key}")
        if kind == _STRING:
            return self._strings(self.count("<Q", 8, f"items of {key}"), key)
        if kind not in _NUMBERS:
            what = (
                "arrays inside an array are not read" if kind == _ARRAY else f"the items have the unknown type {kind}"
            )
            raise ValueError(f"{self.file}: damaged: {key} at byte {start}: {what}")
        width = struct.calcsize(_NUMBERS[kind])
        length = self.count("<Q", width, f"items of {key}")
        return np.frombuffer(self.take(length * width, key), _NUMBERS[kind]).tolist()

    def _strings(self, length: int, key: str) -> list[str]:
        """As `string` so many times, without its overhead: a vocabulary has 100,000."""
        data, end, position, found = self.data, min(self.size, MAX_HEADER_BYTES), self.position, []
        for _ in range(length):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            if position > end:
                raise ValueError(
                    f"{self.file}: truncated or damaged: item {len(found)} of {key} at byte {start - 8} takes "
                    f"{position - start} bytes; the file ends at {self.size}"
                )
            found.append(self._text(data[start:position], key, start))
        self.position = position
        return found

    def _text(self, data: bytes, what: str, start: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file}: damaged: {what} at byte {start} is not UTF-8") from error
