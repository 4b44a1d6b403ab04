"""Damaged copies of files: flipped bytes, cuts, lying numbers, pieces moved, deep nesting, and bytes of no meaning."""

import random
import struct
from collections.abc import Callable

LARGEST = 100_000
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A damaged copy of `data`: one to three changes, each of a kind drawn anew."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_KINDS)(data, rng)[:LARGEST]
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _lie(data: bytes, rng: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes somewhere becomes one at which readers stumble, or grows a little."""
    form, width = rng.choice((("<B", 1), ("<H", 2), ("<I", 4), ("<Q", 8), ("<Q", 8)))
    if len(data) < width:
        return data
    at = rng.randrange(len(data) - width + 1)
    (old,) = struct.unpack_from(form, data, at)
    new = rng.choice((rng.choice(_NUMBERS), old + rng.choice((-1, 1, 8)), old * 2)) % 256**width
    return data[:at] + struct.pack(form, new) + data[at + width :]


def _digits(data: bytes, rng: random.Random) -> bytes:
    """The same for a number that is written out, as in JSON."""
    places = [i for i, byte in enumerate(data[:20_000]) if 48 <= byte <= 57]
    if not places:
        return _flip(data, rng)
    at = rng.choice(places)
    end = at
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    new = rng.choice((str(rng.choice(_NUMBERS)), "-1", "1e400", "0.5", "null", '"x"', "[]", "{}", "true", "9" * 5000))
    return data[:at] + new.encode() + data[end:]


def _move(data: bytes, rng: random.Random) -> bytes:
    """A piece is taken out, doubled, or put somewhere else."""
    if not data:
        return data
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice((1, 4, 8, 32, 200)))
    piece, rest = data[begin:end], data[:begin] + data[end:]
    at = rng.randrange(len(rest) + 1)
    return rng.choice((rest, data[:end] + data[begin:], rest[:at] + piece + rest[at:]))


def _nest(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((b"[", b'{"a":', b"(")) * rng.choice((10, 1000, 15_000)) + data[at:]


def _noise(data: bytes, rng: random.Random) -> bytes:
    """The beginning is kept, the rest is noise."""
    return data[: rng.choice((0, 4, 8, 24, len(data) // 2))] + rng.randbytes(rng.randrange(400))


_KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip, _flip, _flip, _cut, _lie, _lie, _lie, _digits, _move, _move, _nest, _noise,
)  # fmt: skip
