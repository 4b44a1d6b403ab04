"""Manifests: any damage to any file is found and named, whoever wrote and whoever reads."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint import manifest


def make_folder(folder: Path, sizes: list[int], *, num_parts: int = 1) -> list[str]:
    """Random files, one of them at the top as JSON, and all the parts."""
    content = random.Random(0)
    names = [f"state/d/{i:02d}" for i in range(len(sizes))] + ["clocks.json"]
    (folder / "state" / "d").mkdir(parents=True)
    for name, size in zip(names, [*sizes, 30], strict=True):
        (folder / name).write_bytes(content.randbytes(size))
    for part in range(num_parts):
        manifest.write_part(folder, part, num_parts=num_parts)
    return names


def test_the_lines_are_sha256sums(tmp_path):
    make_folder(tmp_path, [5])
    *lines, end = (tmp_path / "manifest_00000_of_00001.txt").read_text().splitlines()
    expected = {name: (tmp_path / name).read_bytes() for name in ("state/d/00", "clocks.json")}
    assert lines == [f"{hashlib.sha256(data).hexdigest()} {len(data)} {name}" for name, data in expected.items()]
    assert end == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest() + " end"


@settings(deadline=None, max_examples=15)
@given(sizes=st.lists(st.integers(0, 50), max_size=7), writers=st.integers(1, 4), readers=st.integers(1, 4))
def test_every_file_is_in_exactly_one_share(tmp_path_factory, sizes, writers, readers):
    folder = tmp_path_factory.mktemp("shares")
    names = make_folder(folder, sizes, num_parts=writers)
    lines = [line.split()[2] for part in folder.glob("manifest*") for line in part.read_text().splitlines()[:-1]]
    assert sorted(lines) == sorted(names)
    assert manifest.uncovered(folder) == []
    for name in names:
        (folder / name).write_bytes(b"other" * 20)
    problems = [line for part in range(readers) for line in manifest.verify(folder, part, num_parts=readers)]
    assert sorted(line.split(":")[0] for line in problems) == sorted(names)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_changed_byte_or_length_is_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    make_folder(folder, [1, 40, 300], num_parts=2)
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    file.write_bytes(content)
    problems = manifest.verify(folder)
    assert len(problems) >= 1
    assert problems[0].startswith(file.relative_to(folder).as_posix() + ":")


@pytest.mark.parametrize("lost", ["state/d/01", "clocks.json"])
def test_a_missing_file_is_named(tmp_path, lost):
    make_folder(tmp_path, [4, 4, 4])
    (tmp_path / lost).unlink()
    (problem,) = manifest.verify(tmp_path)
    assert problem.startswith(f"{lost}: expected ") and problem.endswith("found no such file")


def test_parts_say_how_many_they_are(tmp_path):
    make_folder(tmp_path, [4, 4, 4], num_parts=3)
    (tmp_path / "manifest_00001_of_00003.txt").unlink()
    assert not manifest.is_complete(tmp_path)
    (problem,) = manifest.verify(tmp_path)
    assert problem.startswith("manifest_00001_of_00003.txt: ") and "missing" in problem
    manifest.write_part(tmp_path, 0, num_parts=1)
    assert all("one manifest" in line for line in manifest.verify(tmp_path))
    for path in tmp_path.glob("manifest*"):
        path.unlink()
    assert manifest.verify(tmp_path) == ["incomplete: it has no manifest (the save was interrupted)"]


def test_uncovered_files_are_seen_without_hashing(tmp_path):
    make_folder(tmp_path, [4])
    (tmp_path / "state" / "late").write_bytes(b"1")
    (tmp_path / "state" / "d" / "00").write_bytes(b"longer")
    assert manifest.uncovered(tmp_path) == [
        "state/d/00: expected 4 bytes, found 6",
        "state/late: in no part of the manifest",
    ]


def test_write_atomically_replaces_whole(tmp_path):
    path = tmp_path / "x.json"
    manifest.write_atomically(path, b"1" * 100)
    manifest.write_atomically(path, b"2")
    assert path.read_bytes() == b"2" and [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_read_json_names_the_file(tmp_path, text):
    (tmp_path / "bad.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        manifest.read_json(tmp_path / "bad.json")
