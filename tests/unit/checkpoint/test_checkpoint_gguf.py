"""GGUF files: what the package `gguf` writes and how it dequantises; damage of every kind ends in one ValueError."""

import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from gguf.quants import dequantize
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint.gguf_file import is_gguf, open_gguf
from dsjax.checkpoint.gguf_types import TYPES, dequantise

NATIVE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
BY_PACKAGE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
METADATA = {
    "a.text": "naïve 漢字",
    "a.flag": True,
    "a.small": (-3, Value.INT8),
    "a.wide": (2**63 + 1, Value.UINT64),
    "a.real": (1e-300, Value.FLOAT64),
    "a.half": 0.5,
    "a.words": ["x", "", "é"],
    "a.numbers": [1, -2, 3],
    "a.reals": [0.5, -1.0],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two tensors and metadata, 600 bytes or so."""
    tensors = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "h": np.arange(5, dtype=np.float16)}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", METADATA, tensors)


def test_metadata_and_plain_tensors(small):
    file = open_gguf(small)
    found = dict(file.metadata)
    assert found.pop("general.architecture") == "llama"
    assert found == {key: value[0] if isinstance(value, tuple) else value for key, value in METADATA.items()}
    assert file.names() == ["h", "w"] and file.shape("w") == (3, 4)
    assert file.read("w").tolist() == np.arange(12).reshape(3, 4).tolist() and file.read("w").dtype == np.float32
    assert file.read("h").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no tensor named ww; the closest is w"):
        file.read("ww")


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(alignment, tmp_path):
    tensors = {"a": np.ones(3, np.float32), "b": np.full(5, 2, np.float32)}
    file = open_gguf(write_gguf(tmp_path / "x.gguf", {}, tensors, alignment=alignment))
    assert file.read("a").tolist() == [1] * 3 and file.read("b").tolist() == [2] * 5
    assert all(place.offset % alignment == 0 for place in file.tensors.values())


def test_the_table_of_types_is_that_of_the_package():
    assert {number: (kind.name, kind.block, kind.size) for number, kind in TYPES.items()} == {
        number: (Type(number).name, *gguf.constants.GGML_QUANT_SIZES[Type(number)]) for number in TYPES
    }


@pytest.mark.parametrize("name", [*NATIVE, "BF16", "F16", *BY_PACKAGE])
def test_dequantised_bit_for_bit(name, tmp_path):
    """Random bytes, scales that are infinite or no numbers among them."""
    kind = Type[name]
    block, size = gguf.constants.GGML_QUANT_SIZES[kind]
    rows = 70 if block > 32 else 20_000 // block  # more than one chunk of the native ones below
    raw = np.random.default_rng(0).integers(0, 256, (rows, 2 * size), dtype=np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        plain = {"BF16": lambda: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)}
        plain["F16"] = lambda: raw.view(np.float16).astype(np.float32)
        want = plain[name]() if name in plain else dequantize(raw, kind)
        got = open_gguf(write_gguf(tmp_path / "x.gguf", {}, {"w": (raw, kind)})).read("w")
    assert got.shape == (rows, 2 * block) and got.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[finite], want.view(np.uint32)[finite])


@pytest.mark.parametrize("name", NATIVE)
def test_more_blocks_than_are_computed_at_a_time(name):
    kind = next(kind for kind in TYPES.values() if kind.name == name)
    raw = np.random.default_rng(1).integers(0, 60, 40_000 * kind.size, dtype=np.uint8)  # finite, whatever the place
    want = dequantize(raw.reshape(-1, kind.size), Type[name]).reshape(-1)
    np.testing.assert_array_equal(dequantise(kind, raw), want)


def test_without_the_package(tmp_path, monkeypatch):
    raw = np.zeros((1, 144), np.uint8)
    file = open_gguf(write_gguf(tmp_path / "x.gguf", {}, {"w": (raw, Type.Q4_K)}))
    for module in ("gguf", "gguf.constants", "gguf.quants"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"x.gguf: w: tensors of type Q4_K .* pip install 'dsjax\[gguf\]'"):
        file.read("w")


def test_a_type_that_nobody_reads(tmp_path):
    file = open_gguf(write_gguf(tmp_path / "x.gguf", {}, {"w": (np.zeros((1, 292), np.uint8), Type.Q8_K)}))
    with pytest.raises(ValueError, match=r"w: tensors of type Q8_K cannot be read, .* Q4_0, Q4_1"):
        file.read("w")


def test_every_truncation_is_found(small, tmp_path):
    data, cut = small.read_bytes(), tmp_path / "cut.gguf"
    end = max(place.offset + place.num_bytes for place in open_gguf(small).tensors.values())
    for size in range(end):
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            open_gguf(cut)
    cut.write_bytes(data[: end - 1])
    with pytest.raises(ValueError, match=rf"h lies at offset {end - 10} and takes 10 bytes, .* ends at {end - 1}"):
        open_gguf(cut)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_bytes_end_in_tensors_or_a_value_error(small, tmp_path_factory, changes):
    data = bytearray(small.read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(data)
    try:
        file = open_gguf(path)
        arrays = [file.read(name) for name in file.names()]
    except ValueError:
        return
    assert sum(array.nbytes for array in arrays) <= 8 * len(data)  # float16 doubles, nothing more


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300), version=st.sampled_from([2, 3]), counts=st.tuples(*[st.integers(0, 5)] * 2))
def test_random_headers(tmp_path_factory, data, version, counts):
    path = tmp_path_factory.getbasetemp() / "random.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", version, *counts) + data)
    try:
        file = open_gguf(path)
    except ValueError:
        return
    assert len(file.tensors) == counts[0] and len(file.metadata) == counts[1]


HEAD = struct.Struct("<4sIQQ")
HUGE = 2**62


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(name=b"w", sizes=(4,), kind=0, offset=0) -> bytes:
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def file_of(tensors: list[bytes] = (), pairs: list[bytes] = (), *, version=3, counts=None, data=64) -> bytes:
    counts = (len(tensors), len(pairs)) if counts is None else counts
    header = HEAD.pack(b"GGUF", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


LIES = {
    "tensor count": (file_of(counts=(HUGE, 0)), f"{HUGE} tensors are announced at byte 8"),
    "pair count": (file_of(counts=(0, HUGE)), f"{HUGE} metadata pairs are announced at byte 16"),
    "key length": (file_of(pairs=[text(b"k", HUGE)]), f"a metadata key at byte 24 has {HUGE} bytes"),
    "string length": (file_of(pairs=[text(b"k") + struct.pack("<I", 8) + text(b"", HUGE)]), f"37 has {HUGE} bytes"),
    "array length": (file_of(pairs=[text(b"k") + struct.pack("<IIQ", 9, 6, HUGE)]), f"{HUGE} items of k"),
    "strings": (file_of(pairs=[text(b"k") + struct.pack("<IIQ", 9, 8, 2) + text(b"", HUGE)]), "item 0 of k at byte"),
    "string count": (file_of(pairs=[text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)]), f"{HUGE} items of k"),
    "dimensions": (file_of([tensor(sizes=(1,) * 5)]), "w has 5 dimensions; at most 4"),
    "shape": (file_of([tensor(sizes=(2**40, 2**40))]), "larger than any memory"),
    "size": (file_of([tensor(sizes=(2**40,))]), f"w lies at offset 64 and takes {2**42} bytes"),
    "offset": (file_of([tensor(offset=2**50)]), f"w lies at offset {2**50 + 64}"),
    "unaligned": (file_of([tensor(offset=8)]), "offset 8, no multiple of the alignment 32"),
    "overlap": (file_of([tensor(sizes=(16,)), tensor(b"v", offset=32)]), "v at byte 128 overlaps w, which ends at 160"),
    "two tensors": (file_of([tensor(), tensor()]), "the tensor 'w' comes a second time at byte"),
    "two keys": (file_of(pairs=[text(b"k") + struct.pack("<IB", 0, 1)] * 2), "'k' comes a second time at byte 38"),
    "nested": (file_of(pairs=[text(b"k") + struct.pack("<IIQ", 9, 9, 1)]), "arrays inside an array"),
    "item type": (file_of(pairs=[text(b"k") + struct.pack("<IIQ", 9, 99, 1)]), "the items have the unknown type 99"),
    "value type": (file_of(pairs=[text(b"k") + struct.pack("<I", 99)]), "k at byte 33 has the unknown type 99"),
    "tensor type": (file_of([tensor(kind=36)]), "w has the unknown type 36; known are F32, F16"),
    "rows": (file_of([tensor(sizes=(48,), kind=2)]), "w is Q4_0, in blocks of 32, but has rows of 48"),
    "text": (file_of(pairs=[text(b"\xff") + struct.pack("<IB", 0, 1)]), "a metadata key at byte 24 is not UTF-8"),
    "alignment": (file_of(pairs=[text(b"general.alignment") + struct.pack("<II", 4, 24)]), "alignment is 24"),
    "alignment type": (file_of(pairs=[text(b"general.alignment") + struct.pack("<II", 4, 0)]), "alignment is 0"),
    "version 1": (file_of(version=1), "GGUF version 1; versions 2 and 3 are read"),
    "big endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "a big-endian file"),
    "magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(lie, tmp_path):
    data, said = LIES[lie]
    path = tmp_path / "lie.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as error:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000  # pytest's own records among them
    finally:
        tracemalloc.stop()
    assert said in str(error.value) and str(path) in str(error.value)


def test_what_is_no_file(tmp_path, small):
    with pytest.raises(ValueError, match="no such file"):
        open_gguf(tmp_path)
    assert is_gguf(small) and not is_gguf(tmp_path) and not is_gguf(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"")
    assert not is_gguf(tmp_path / "empty")


def test_a_file_that_is_cut_while_it_is_open(small, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(small.read_bytes())
    file = open_gguf(path)
    path.write_bytes(small.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated since it was opened: w ends at byte"):
        file.read("w")
