"""Folders of safetensors: round trips against the reference package, and no damage that gets past the reader."""

import json
import random
import shutil
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint.safetensors_folder import open_folder, write_folder

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


@st.composite
def tensor_dicts(draw):
    names = draw(st.lists(st.text("abc.é0", min_size=1, max_size=8), max_size=6, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = [tuple(draw(st.lists(st.integers(0, 5), max_size=3))) for _ in names]
    return {
        name: rng.integers(0, 2 if (dtype := draw(st.sampled_from(DTYPES))) is np.bool_ else 100, shape).astype(dtype)
        for name, shape in zip(names, shapes, strict=True)
    }


def assert_same(folder, tensors):
    assert folder.names() == sorted(tensors)
    for name, array in tensors.items():
        read = folder.read(name)
        assert (read.shape, read.dtype) == (array.shape, array.dtype) == (folder.shape(name), folder.dtype(name))
        assert read.tobytes() == array.tobytes()
        assert read.flags.writeable


@settings(deadline=None, max_examples=40)
@given(tensors=tensor_dicts(), max_shard_bytes=st.sampled_from([1, 50, 1e9]))
def test_round_trip(tmp_path_factory, tensors, max_shard_bytes):
    path = tmp_path_factory.mktemp("round") / "model"
    write_folder(path, tensors.items(), config={"n_layer": 2}, max_shard_bytes=max_shard_bytes)
    folder = open_folder(path)
    assert folder.config == {"n_layer": 2}
    assert_same(folder, tensors)
    for file in path.glob("*.safetensors"):  # the reference package reads the same, and the sizes keep the bound
        for name, array in safetensors.numpy.load_file(file).items():
            assert array.tobytes() == tensors[name].tobytes()
        held = [name for name, info in folder.tensors.items() if info.file == file]
        assert len(held) == 1 or sum(tensors[name].nbytes for name in held) <= max_shard_bytes


def test_reads_what_the_reference_package_writes(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(True), "c": np.zeros((0, 4), np.int64)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    assert_same(open_folder(tmp_path), tensors)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_part_is_the_part(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("part") / "model"
    array = np.arange(120, dtype=np.int32).reshape(4, 5, 6)
    write_folder(path, {"x": array}, config={})
    index = tuple(
        slice(*sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))))
        for n in array.shape[: data.draw(st.integers(0, 3))]
    )
    np.testing.assert_array_equal(open_folder(path).read("x", index), array[index])


def test_any_order_and_byte_order_is_written_the_same(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {
        "big_endian": array.astype(">f4"),
        "transposed": np.asfortranarray(array),
        "scalar": np.float32(3).reshape(()),
    }
    write_folder(tmp_path / "model", tensors, config={})
    folder = open_folder(tmp_path / "model")
    np.testing.assert_array_equal(folder.read("big_endian"), array)
    np.testing.assert_array_equal(folder.read("transposed"), array)
    assert folder.read("scalar").shape == ()


def test_holds_one_shard_at_a_time(tmp_path):
    def stream():
        for i in range(40):
            yield f"t{i}", np.full(250_000, i, np.float32)  # 1 MB each

    tracemalloc.start()
    write_folder(tmp_path / "model", stream(), config={}, max_shard_bytes=3e6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # three tensors of the shard, one being made, one that did not fit
    assert len(list((tmp_path / "model").glob("model-*-of-00014.safetensors"))) == 14


def damage(content: bytearray, chance: random.Random) -> None:
    """Changes bytes (mostly in the header), cuts, grows, or writes a number or a token somewhere."""
    header_end = 8 + int.from_bytes(content[:8], "little")
    place = chance.randrange(header_end if chance.random() < 0.8 else len(content))
    kind = chance.randrange(5)
    if kind == 0:
        content[place] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content += b"\0" * chance.randrange(1, 9)
    elif kind == 3:
        content[:8] = chance.choice([0, 2**31, 2**63, 2**64 - 1, header_end, 99_999_999]).to_bytes(8, "little")
    else:
        token = chance.choice([b"9" * 30, b"-1", b"null", b"[" * 200, b'"BOOL"', b"1e9", b"{}", b"true"])
        content[place : place + len(token)] = token


def test_damaged_files_give_a_value_error_or_the_tensors(tmp_path):
    tensors = {"a.weight": np.ones((3, 5), np.float32), "b": np.zeros(7, np.bool_), "c": np.ones((2, 2), np.float16)}
    write_folder(tmp_path / "model", tensors, config={})
    file = tmp_path / "model" / "model.safetensors"
    whole = file.read_bytes()
    refused = 0
    tracemalloc.start()
    for seed in range(400):
        content = bytearray(whole)
        damage(content, random.Random(seed))
        file.write_bytes(content)
        try:
            folder = open_folder(tmp_path / "model")
            for name in folder.names():
                folder.read(name)
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 300  # the others changed a value or a name, which no reader of one file can see
    assert peak < 1e6  # the file is 300 bytes; nothing is allocated because the file says so


def write_raw(tmp_path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + data)
    (tmp_path / "config.json").write_text("{}")


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"123", r"truncated: a ends at byte \d+, the file at byte \d+"),
        ({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456", r"b starts at byte \d+ and overlaps a"),
        ({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789", "leaves a gap after a"),
        ({"a": entry()}, b"12345", r"the tensors end at byte \d+, the file at byte \d+"),
        ({"a": entry(shape=(2,))}, b"1234", r"F32\[2\] needs 8 bytes, its offsets \[0, 4\] give 4"),
        ({"a": entry(offsets=(4, 0))}, b"1234", "needs 4 bytes"),
        ({"a": entry(offsets=(-4, 0))}, b"1234", "needs 4 bytes"),
        ({"a": entry(shape=(2**62, 0, 2**62), offsets=(0, 0))}, b"", "larger than any memory"),
        ({"a": entry(shape=(-1, -1))}, b"1234", "expected a shape"),
        ({"a": entry(shape=(1,) * 65)}, b"1234", "at most 64"),
        ({"a": entry(dtype="F31")}, b"1234", "dtype F31 is not supported; supported: F64, "),
        ({"a": 3}, b"", "a: expected an entry"),
        ([], b"", "not a JSON object"),
        (b'{"a": 1, "a": 1}', b"", "the key 'a' is given twice"),
        (b"[" * 100_000, b"", "nested too deeply|not JSON"),
        ({"a": entry("BOOL", (1,), (0, 1))}, b"\2", "holds the byte 2"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, header, data, message):
    write_raw(tmp_path, header, data)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path).read("a")


def test_a_header_length_is_checked_before_it_is_believed(tmp_path):
    write_raw(tmp_path, {}, length=2**40)
    with pytest.raises(ValueError, match="a header of 1099511627776 bytes; at most 100000000"):
        open_folder(tmp_path)
    write_raw(tmp_path, {}, length=3)
    with pytest.raises(ValueError, match="truncated: the header ends at byte 11, the file at byte 10"):
        open_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(ValueError, match="truncated: 3 bytes"):
        open_folder(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="no weights"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\).*safe_serialization=True"):
        open_folder(tmp_path)
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tensor named b\.weight"):
        open_folder(tmp_path).read("b.weight")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../other.safetensors", "refused"),
        ("9" * 5000, "refused"),
        ("/etc/passwd", "refused"),
        ("sub/x.safetensors", "refused"),
        ("..", "refused"),
        ("lost.safetensors", "1 of 1 shards are missing: lost.safetensors"),
        ("shard.safetensors", r"not in their shards: w \(in shard.safetensors\)"),
        (3, "weight_map"),
    ],
)
def test_an_index_is_not_believed(tmp_path, file, message):
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "shard.safetensors")
    safetensors.numpy.save_file({"w": np.ones(1)}, tmp_path.parent / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path)


def test_writes_all_or_nothing(tmp_path):
    def stream():
        yield "a", np.ones(3, np.float32)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_folder(tmp_path / "model", stream(), config={})
    for broken, message in [
        ([("a", np.ones(1)), ("a", np.ones(1))], "given twice: a"),
        ([("a", np.array(["text"]))], "a: safetensors cannot hold <U4"),
    ]:
        for max_shard_bytes in (1, 100):
            with pytest.raises(ValueError, match=message):
                write_folder(tmp_path / "model", broken, config={}, max_shard_bytes=max_shard_bytes)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("keep me")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        write_folder(tmp_path / "full", {}, config={})
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", {"a": np.ones(1)}, config={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_parts_of_a_split_model_are_no_model(tmp_path):
    """Not without their index, not as a whole, and not where the index forgets one."""
    write_folder(tmp_path / "whole", {name: np.ones(3) for name in "abc"}, config={}, max_shard_bytes=1)
    assert open_folder(tmp_path / "whole").names() == ["a", "b", "c"]
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())
    part = tmp_path / "whole" / "model-00001-of-00003.safetensors"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_text("{}")
    shutil.copy(part, tmp_path / "alone")
    with pytest.raises(ValueError, match=r"1 of 3 parts of a split model \(model-00001-of-00003.safetensors\) without"):
        open_folder(tmp_path / "alone")
    shutil.copy(part, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(ValueError, match=r"safetensors: a part of a split model: .* 2 tensors that it lacks \(b, c\)"):
        open_folder(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    del index["weight_map"]["c"]
    (tmp_path / "whole" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names 2 files, but by their names there are 3 parts"):
        open_folder(tmp_path / "whole")
