"""Hugging Face model folders: config.json and model.safetensors, whole or in shards with an index. No pickle is read.

    folder = open_folder("bloom-560m")
    folder.config["hidden_size"], folder.shape("h.0.mlp.dense_h_to_4h.weight")
    folder.read("h.0.mlp.dense_h_to_4h.weight", (slice(0, 64), slice(None)))      # only these rows leave the disk

tensor_map.py, whose names are here too, says how a model's own names and layouts correspond to the folder's.
"""

import dataclasses
import difflib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from dsjax.checkpoint.manifest import read_json, write_atomically
from dsjax.checkpoint.safetensors_file import (
    MAX_HEADER_BYTES,
    TensorInfo,
    dtype_name,
    read_header,
    read_tensor,
    write_file,
)
from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform, read_tree, write_tree

__all__ = [
    "IDENTITY",
    "TRANSPOSE",
    "Entry",
    "TensorFolder",
    "Transform",
    "open_folder",
    "read_tree",
    "write_folder",
    "write_tree",
]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PART = re.compile(r".*-\d+-of-(\d+)\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class TensorFolder:
    """An open folder: what is in it is known and checked, nothing is read until asked for."""

    path: Path
    """The folder."""
    config: Mapping[str, Any]
    """config.json."""
    tensors: Mapping[str, TensorInfo]
    """Name -> place."""

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, from the header."""
        return self._info(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Element type of one tensor, from the header; bfloat16 is ml_dtypes.bfloat16."""
        return self._info(name).dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """One tensor, or the part of it that `index` selects, in a new array of the stored dtype.

        Raises:
            ValueError: no tensor of that name (says which is the closest), or its bytes are damaged.
        """
        return read_tensor(self._info(name), index)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; the closest is {close[0]}" if close else ""
            raise ValueError(f"{self.path}: no tensor named {name}{hint}")
        return self.tensors[name]


def open_folder(path: str | Path) -> TensorFolder:
    """Opens a Hugging Face model folder.

    Args:
        path: a folder with config.json and safetensors files.

    Raises:
        ValueError: not such a folder, or a damaged one: one message that says which file and what to do.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model"
        >>> write_folder(path, {"wte.weight": np.ones((4, 2), np.float32)}, config={"model_type": "gpt2"})
        >>> folder = open_folder(path)
        >>> folder.config["model_type"], folder.names(), folder.shape("wte.weight")
        ('gpt2', ['wte.weight'], (4, 2))
    """
    path = Path(path)
    if not path.is_dir():
        what = "a file, but no GGUF file" if path.is_file() else "no such folder"
        raise ValueError(f"{path}: {what}; expected a folder with config.json and {_SINGLE}, or a GGUF file")
    if (path / _SINGLE).is_file():
        tensors = read_header(path / _SINGLE)
        _check_whole(path, tensors)
    elif (path / _INDEX).is_file():
        tensors = _read_shards(path)
    else:
        raise ValueError(_nothing_to_read(path))
    return TensorFolder(path, _read_bounded(path / "config.json"), tensors)


def write_folder(
    path: str | Path,
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    *,
    config: Mapping[str, Any],
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a Hugging Face model folder: all of it, or nothing.

    Args:
        path: a folder that does not exist or is empty; its parents are made.
        tensors: name -> array; from an iterator they are taken one at a time, and at most one shard is held.
        config: becomes config.json.
        max_shard_bytes: a shard is closed before it would grow larger; a larger tensor has a shard of its own.
        metadata: strings for the header; {"format": "pt"} unless given, which other readers expect.

    Raises:
        ValueError: the folder is not empty, a name comes twice, or a dtype cannot be stored.
        OSError: the disk is full or not writable; what was written is removed.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not an empty folder; nothing is overwritten: give another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.mkdir()
    try:
        pairs = tensors if not isinstance(tensors, Mapping) else cast(Mapping[str, np.ndarray], tensors).items()
        _write_shards(temporary, pairs, max_shard_bytes, {"format": "pt"} if metadata is None else metadata)
        write_atomically(temporary / "config.json", json.dumps(dict(config), indent=2).encode() + b"\n")
        os.rename(temporary, path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _read_shards(path: Path) -> dict[str, TensorInfo]:
    """The tensors that the index names, from the shards that it names."""
    weight_map = _read_bounded(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path / _INDEX}: expected a weight_map of tensor name -> file name")
    files = sorted(set(weight_map.values()))
    # Only the name is judged: a hub cache rightly links its files to another folder.
    if outside := [file for file in files if not _is_plain(file)]:
        raise ValueError(f"{path / _INDEX}: refused: not plain file names in this folder: {', '.join(outside)}")
    if absent := [file for file in files if not (path / file).is_file()]:
        raise ValueError(f"{path}: {len(absent)} of {len(files)} shards are missing: {', '.join(absent)}")
    counts = {int(parts[1]) for file in files if (parts := _PART.fullmatch(file))}
    if counts and counts != {len(files)}:
        raise ValueError(
            f"{path / _INDEX}: names {len(files)} files, but by their names there are {max(counts)} parts; fetch the "
            "whole model again"
        )
    shards = {file: read_header(path / file) for file in files}
    if lost := [f"{name} (in {file})" for name, file in weight_map.items() if name not in shards[file]]:
        raise ValueError(f"{path}: tensors that the index names are not in their shards: {', '.join(lost)}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _check_whole(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a part of a split model under the name of a whole one; an index beside it says what the whole has.

    Raises:
        ValueError: names what it lacks.
    """
    if not (path / _INDEX).is_file():
        return
    weight_map = _read_bounded(path / _INDEX).get("weight_map")
    lacking = sorted(set(weight_map) - tensors.keys()) if isinstance(weight_map, dict) else []
    if lacking:
        raise ValueError(
            f"{path / _SINGLE}: a part of a split model: {_INDEX} names {len(lacking)} tensors that it lacks "
            f"({', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}); remove it and put all parts that the "
            "index names there, or remove the index if it is of another model"
        )


def _write_shards(
    folder: Path, pairs: Iterable[tuple[str, np.ndarray]], max_shard_bytes: float, metadata: Mapping[str, str]
) -> None:
    """Fills shards one after the other; their names hold their number, so that they get them at the end."""
    weight_map: dict[str, int] = {}
    total = number = 0
    for number, shard in enumerate(_shards(pairs, max_shard_bytes), start=1):
        if twice := sorted(weight_map.keys() & shard.keys()):
            raise ValueError(f"tensors given twice: {', '.join(twice)}")
        weight_map |= dict.fromkeys(shard, number)
        total += sum(array.nbytes for array in shard.values())
        write_file(folder / f"{number}", shard, metadata=metadata)
    if number == 1:
        os.rename(folder / "1", folder / _SINGLE)
        return
    names = {i: f"model-{i:05d}-of-{number:05d}.safetensors" for i in range(1, number + 1)}
    for i, name in names.items():
        os.rename(folder / f"{i}", folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[i] for name, i in weight_map.items()}}
    write_atomically(folder / _INDEX, json.dumps(index, indent=2).encode() + b"\n")


def _shards(pairs: Iterable[tuple[str, np.ndarray]], max_shard_bytes: float) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    filled = 0
    for name, array in pairs:
        dtype_name(name, array)  # refused now, not when the shard is full
        if shard and filled + array.nbytes > max_shard_bytes:
            yield shard
            shard.clear()  # it is on disk; a new dict would leave this one with the caller while it fills
            filled = 0
        if name in shard:
            raise ValueError(f"tensors given twice: {name}")
        shard[name] = array
        filled += array.nbytes
    yield shard


def _is_plain(file: str) -> bool:
    """Whether this can be the name of a file in the folder itself, on any system."""
    return file == Path(file).name and file not in ("", "..") and "\\" not in file and len(file) < 200


def _read_bounded(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: missing; a model folder needs it")
    if (size := path.stat().st_size) > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes of JSON; at most {MAX_HEADER_BYTES} are allowed")
    return read_json(path)


def _nothing_to_read(path: Path) -> str:
    pickles = sorted({file.name for pattern in _PICKLES for file in path.glob(pattern)})
    parts = sorted(file.name for file in path.glob("*.safetensors") if _PART.fullmatch(file.name))
    if parts:
        there = _PART.fullmatch(parts[0])
        assert there is not None, "what was looked for"
        return (
            f"{path}: {len(parts)} of {int(there[1])} parts of a split model ({', '.join(parts[:3])}"
            f"{', ...' if len(parts) > 3 else ''}) without {_INDEX}, which says what is in them; fetch it and all parts"
        )
    if not pickles:
        return f"{path}: no weights: expected {_SINGLE}, or {_INDEX} and the shards that it names"
    return (
        f"{path}: only pickled weights ({', '.join(pickles[:3])}{', ...' if len(pickles) > 3 else ''}). A pickle can "
        f"run any code and is not read. Convert it where transformers is installed: "
        f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_FOLDER, safe_serialization=True)"
    )
