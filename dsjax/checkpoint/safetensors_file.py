"""One safetensors file: 8 bytes of header length N (little endian), N bytes of JSON, the tensors' bytes.

The file is not trusted: bounds are checked before anything is allocated. It is written with the same layout as the
`safetensors` package, which refuses gaps and overlaps; so does this reader.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dsjax.observe.untrusted import parse_json

MAX_HEADER_BYTES = 100_000_000  # the limit of the `safetensors` package
_MAX_DIMS = 64  # numpy's limit

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies."""

    file: Path
    """The file."""
    dtype: np.dtype
    """Element type."""
    shape: tuple[int, ...]
    """Shape."""
    offset: int
    """Bytes from the start of the file."""


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> place of every tensor in a file, all of them checked to lie inside it.

    Raises:
        ValueError: the file is truncated or damaged: says where and how.
    """
    size = file.stat().st_size
    if size < 8:
        raise ValueError(f"{file}: truncated: {size} bytes, but the header's length alone takes 8")
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: damaged: a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if 8 + length > size:
            raise ValueError(f"{file}: truncated: the header ends at byte {8 + length}, the file at byte {size}")
        header = _parse_header(file, stream.read(length))
    places = {name: _check_entry(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_layout(file, places, 8 + length, size)
    return places


def read_tensor(info: TensorInfo, index: tuple[slice, ...] | None = None) -> np.ndarray:
    """The tensor, or the part of it that `index` selects, as an array of its own; reads only that part.

    Raises:
        ValueError: a boolean tensor holds bytes other than 0 and 1, or the file was cut since its header was read.
    """
    stored = np.dtype(np.uint8) if info.dtype == np.bool_ else info.dtype
    if math.prod(info.shape) == 0:
        array = np.empty(info.shape, stored)
    else:
        array = np.memmap(info.file, dtype=stored, mode="r", offset=info.offset, shape=info.shape)
    part = np.array(array if index is None else array[index], order="C", subok=False)
    if info.dtype != np.bool_:
        return part
    if part.size and part.max() > 1:
        raise ValueError(f"{info.file}: damaged: a boolean tensor at byte {info.offset} holds the byte {part.max()}")
    return part.view(np.bool_)


def write_file(file: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str]) -> None:
    """Writes tensors in the order given and flushes them to the disk.

    Raises:
        ValueError: a dtype that safetensors cannot hold.
        OSError: the disk is full or the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": dtype_name(name, array), "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors start aligned
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
            stream.write(little.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def dtype_name(name: str, array: np.ndarray) -> str:
    """The format's name of an array's dtype.

    Example:
        >>> dtype_name("w", np.zeros(3, np.float32))
        'F32'
    """
    found = _NAMES.get(array.dtype.newbyteorder("<"))
    if found is None:
        raise ValueError(f"{name}: safetensors cannot hold {array.dtype}; allowed: {', '.join(map(str, _NAMES))}")
    return found


def _parse_header(file: Path, text: bytes) -> dict[str, object]:
    header = parse_json(text, f"{file}: damaged: the header", unique=True)
    if not isinstance(header, dict):
        raise ValueError(f"{file}: damaged: the header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _check_entry(file: Path, name: str, entry: object, start: int, size: int) -> TensorInfo:
    """One header entry, with its numbers checked against each other and against the file."""
    match entry:
        case {"dtype": str(dtype_text), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"{file}: damaged: {name}: expected an entry with dtype, shape and data_offsets")
    if dtype_text not in _DTYPES:
        raise ValueError(f"{file}: {name}: dtype {dtype_text} is not supported; supported: {', '.join(_DTYPES)}")
    if len(shape) > _MAX_DIMS or not all(type(dim) is int and 0 <= dim < 2**63 for dim in shape):
        raise ValueError(f"{file}: damaged: {name}: expected a shape of at most {_MAX_DIMS} counts")
    dtype = _DTYPES[dtype_text]
    if math.prod(dim for dim in shape if dim) * dtype.itemsize >= 2**63:
        raise ValueError(f"{file}: damaged: {name}: shape {shape} is larger than any memory")
    if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{file}: damaged: {name}: {dtype_text}{shape} needs {math.prod(shape) * dtype.itemsize} bytes, "
            f"its offsets [{begin}, {end}] give {end - begin}"
        )
    if start + end > size:
        raise ValueError(f"{file}: truncated: {name} ends at byte {start + end}, the file at byte {size}")
    return TensorInfo(file, dtype, tuple(shape), start + begin)


def _check_layout(file: Path, places: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """The tensors lie end to end: no two share a byte, none is left over."""
    expected, previous = start, "the header"
    for name, info in sorted(places.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape) > 0)):
        if info.offset != expected:
            fault = "overlaps" if info.offset < expected else "leaves a gap after"
            raise ValueError(f"{file}: damaged: {name} starts at byte {info.offset} and {fault} {previous}")
        expected, previous = info.offset + math.prod(info.shape) * info.dtype.itemsize, name
    if expected != size:
        raise ValueError(f"{file}: damaged: the tensors end at byte {expected}, the file at byte {size}")
