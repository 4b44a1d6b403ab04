"""Small GGUF files, written by the package `gguf`, which is independent of our reader."""

from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, metadata: dict, tensors: dict, *, architecture: str = "llama", alignment: int = 32) -> Path:
    """A file with `metadata` (key -> value, an int as uint32) and `tensors` (name -> array or (raw bytes, type))."""
    writer = gguf.GGUFWriter(path, architecture)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, *value)  # (value, type)
