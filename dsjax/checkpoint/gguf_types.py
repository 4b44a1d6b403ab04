"""Tensor types of GGUF files: their sizes, and their blocks as float32.

A block is 32 weights with one scale d (float16) and sometimes an offset m (float16):

    Q4_0  w = d (q - 8)    d, 16 bytes: weight i in the low half of byte i, weight i + 16 in the high half
    Q4_1  w = d q + m      d, m, 16 bytes
    Q5_0  w = d (q - 16)   d, 4 bytes with bit 4 of the 32 weights, 16 bytes
    Q5_1  w = d q + m      d, m, 4 bytes, 16 bytes
    Q8_0  w = d q          d, 32 signed bytes

Products and sums are rounded to float32 one after the other, so that the result is that of the package `gguf` bit for
bit. Types whose blocks hold 256 weights (K-quants and later ones) are left to that package.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

_CHUNK_BLOCKS = 1 << 14  # what is computed at a time stays in a core's cache; smaller ones cost calls

Blocks = UInt8[np.ndarray, "n bytes"]
Weights = Float32[np.ndarray, "n 32"]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorType:
    """Storage of a tensor's numbers."""

    name: str
    """Such as "Q4_1"."""
    block: int
    """Weights in a block; rows are whole blocks."""
    size: int
    """Bytes of a block."""


def _table(text: str) -> dict[int, TensorType]:
    rows = (line.split() for line in text.strip().splitlines())
    return {int(number): TensorType(name, int(block), int(size)) for number, name, block, size in rows}


TYPES = _table("""
    0 F32 1 4
    1 F16 1 2
    2 Q4_0 32 18
    3 Q4_1 32 20
    6 Q5_0 32 22
    7 Q5_1 32 24
    8 Q8_0 32 34
    9 Q8_1 32 40
    10 Q2_K 256 84
    11 Q3_K 256 110
    12 Q4_K 256 144
    13 Q5_K 256 176
    14 Q6_K 256 210
    15 Q8_K 256 292
    16 IQ2_XXS 256 66
    17 IQ2_XS 256 74
    18 IQ3_XXS 256 98
    19 IQ1_S 256 50
    20 IQ4_NL 32 18
    21 IQ3_S 256 110
    22 IQ2_S 256 82
    23 IQ4_XS 256 136
    24 I8 1 1
    25 I16 1 2
    26 I32 1 4
    27 I64 1 8
    28 F64 1 8
    29 IQ1_M 256 56
    30 BF16 1 2
    34 TQ1_0 256 54
    35 TQ2_0 256 66
    39 MXFP4 32 17
""")
"""Number in the file -> type."""

_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def dequantise(kind: TensorType, raw: UInt8[np.ndarray, " size"]) -> Float32[np.ndarray, " n"]:
    """The weights that bytes stand for, in order, in a new array.

    Args:
        kind: their type.
        raw: whole blocks.

    Raises:
        ValueError: a type that this version does not read, or that needs the package `gguf` where it is missing.

    Example:
        >>> one_block = np.concatenate([np.float16([0.5]).view(np.uint8), np.arange(32, dtype=np.uint8)])
        >>> dequantise(TYPES[8], one_block)[:4].tolist()
        [0.0, 0.5, 1.0, 1.5]
    """
    if kind.name in _PLAIN:
        return raw.view(_PLAIN[kind.name]).astype(np.float32)
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind.name not in _NATIVE:
        return _by_package(kind, raw)
    blocks = raw.reshape(-1, kind.size)
    out = np.empty((len(blocks), kind.block), np.float32)
    # A scale that is infinite or not a number gives weights that are not either, as in any other reader.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), _CHUNK_BLOCKS):
            part = slice(start, start + _CHUNK_BLOCKS)
            _NATIVE[kind.name](blocks[part], out[part])
    return out.reshape(-1)


def _half(blocks: Blocks, at: int) -> Float32[np.ndarray, "n 1"]:
    """The float16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _q4_0(blocks: Blocks, out: Weights) -> None:
    nibbles = blocks[:, 2:]
    scale = _half(blocks, 0)
    np.multiply((nibbles & 15).view(np.int8) - np.int8(8), scale, out=out[:, :16])
    np.multiply((nibbles >> 4).view(np.int8) - np.int8(8), scale, out=out[:, 16:])


def _q4_1(blocks: Blocks, out: Weights) -> None:
    nibbles = blocks[:, 4:]
    scale = _half(blocks, 0)
    np.multiply(nibbles & 15, scale, out=out[:, :16])
    np.multiply(nibbles >> 4, scale, out=out[:, 16:])
    np.add(out, _half(blocks, 2), out=out)


def _fives(blocks: Blocks, at: int) -> UInt8[np.ndarray, "n 32"]:
    """Five-bit numbers: 4 bytes of fifth bits at byte `at`, then 16 bytes of halves."""
    high = np.unpackbits(np.ascontiguousarray(blocks[:, at : at + 4]), axis=1, bitorder="little") << 4
    nibbles = blocks[:, at + 4 :]
    high[:, :16] |= nibbles & 15
    high[:, 16:] |= nibbles >> 4
    return high


def _q5_0(blocks: Blocks, out: Weights) -> None:
    np.multiply(_fives(blocks, 2).view(np.int8) - np.int8(16), _half(blocks, 0), out=out)


def _q5_1(blocks: Blocks, out: Weights) -> None:
    np.multiply(_fives(blocks, 4), _half(blocks, 0), out=out)
    np.add(out, _half(blocks, 2), out=out)


def _q8_0(blocks: Blocks, out: Weights) -> None:
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks, 0), out=out)


_NATIVE: dict[str, Callable[[Blocks, Weights], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
}  # fmt: skip


def _by_package(kind: TensorType, raw: np.ndarray) -> np.ndarray:
    try:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ValueError(
            f"tensors of type {kind.name} are read by the package `gguf`, which is missing: pip install 'dsjax[gguf]'"
        ) from error
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            return dequantize(raw, GGMLQuantizationType[kind.name]).reshape(-1)
    except NotImplementedError as error:
        native = ", ".join([*_PLAIN, "BF16", *_NATIVE])
        raise ValueError(
            f"tensors of type {kind.name} cannot be read, not by the package `gguf` either; {native} and its K- and "
            "IQ-quants can: convert the file to one of these"
        ) from error
