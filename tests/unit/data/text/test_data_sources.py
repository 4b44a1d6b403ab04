"""Sources: which documents there are, in which order, cut into parts or not, and what unreadable ones say."""

import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import JsonlSource, ParquetSource, StdlibSource, TextSource
from dsjax.data.text import source as source_of_text
from dsjax.data.text.read import read_part


def documents(config, *, target=1 << 20, undecodable="error"):
    parts = config.open().parts(target)
    return [(d.name, d.text) for part in parts for d in read_part(part, undecodable=undecodable)]


def test_stdlib_has_the_library_without_tests():
    found = dict(documents(StdlibSource()))
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(found)
    assert found["os.py"] == Path(os.__file__).read_text(encoding="utf-8")
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1]) for name in found)
    assert list(found) == [name for name, _ in documents(StdlibSource(), target=1 << 30)]


def test_text_folder_is_sorted_normalised_and_filtered(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("other kind")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / ".hidden" / "e.txt").write_bytes(b"\xff")
    (tmp_path / "._a.txt").write_bytes(b"\xff")
    assert documents(TextSource(path=str(tmp_path))) == [("a.txt", "first"), ("b/x.txt", "one\ntwo\nthree")]
    assert documents(TextSource(path=str(tmp_path), glob="*.md")) == [("c.md", "other kind")]
    assert documents(TextSource(path=str(tmp_path / "c.md"))) == [("c.md", "other kind")]


def test_separator_cuts_a_file_into_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo\n\n\n\nthree")
    found = documents(TextSource(path=str(tmp_path), separator="\n\n"))
    assert found == [("a.txt#0", "one"), ("a.txt#1", "two"), ("a.txt#3", "three")]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=30), st.integers(1, 200), st.booleans())
def test_jsonl_parts_hold_every_line_once(tmp_path_factory, texts, target, final_newline):
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    body = "\n".join(json.dumps({"text": text}) for text in texts) + ("\n" if final_newline else "")
    path.write_text(body, encoding="utf-8")
    parts = JsonlSource(path=str(path)).open().parts(target)
    assert sum(part.num_bytes for part in parts) == path.stat().st_size
    found = [(d.name, d.text) for part in parts for d in read_part(part)]
    assert found == [(f"x.jsonl:{n}", text) for n, text in enumerate(texts, 1)]


def test_compressed_jsonl_and_folders(tmp_path):
    rows = [json.dumps({"body": f"number {n}"}) for n in range(5)]
    data = ("\n\n".join(rows) + "\n").encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(data))
    (tmp_path / "d.json").write_text("not read")
    found = documents(JsonlSource(path=str(tmp_path), field="body"), target=20)
    assert [text for _, text in found] == [f"number {n}" for n in range(5)] * 3
    assert [name for name, _ in found][5:8] == ["b.jsonl.gz:1", "b.jsonl.gz:3", "b.jsonl.gz:5"]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: damaged"):
        documents(JsonlSource(path=str(tmp_path), field="body"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"txt": "a"}', "no key 'text'; its keys are 'txt'"),
        (b'{"text": 3}', "must be a string, got 3"),
        (b'{"text": null}', "must be a string, got None"),
        (b'{"text": "\xff"}', "0xff at byte 10 is not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair at character 0"),
        (b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "is not JSON that can be read: it is nested too deeply"),
        (b'{"text": ' + b"[" * 150 + b"]" * 150 + b"}", "must be a string, got "),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "a whole number of more than 4,300 digits"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is given twice, with different values"),
        (b'{"text": "a"} {"text": "b"}', "Extra data at column 15"),
    ],
)
def test_bad_jsonl_lines_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n{"text": "fine"}\n' + line + b"\n")
    for target in (1 << 20, 8):
        with pytest.raises(ValueError, match=message) as caught:
            documents(JsonlSource(path=str(path)), target=target)
        assert f"{path}:4" in str(caught.value)


def test_undecodable_text_is_named_replaced_or_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")
    source = TextSource(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"b\.txt: 0xe9 at byte 3 is not UTF-8.*undecodable"):
        documents(source)
    assert documents(source, undecodable="replace")[1] == ("b.txt", "caf\ufffd au lait")
    assert documents(source, undecodable="skip") == [("a.txt", "good")]
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    lines = JsonlSource(path=str(tmp_path / "x.jsonl"))
    assert [text for _, text in documents(lines, undecodable="replace")] == ["a\ufffdb", "😀"]
    assert [text for _, text in documents(lines, undecodable="skip")] == ["😀"]


def test_missing_and_empty_paths(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for config, message in [
        (TextSource(path=str(tmp_path / "no")), "no file or folder"),
        (TextSource(path=str(tmp_path)), "no file that matches"),
        (TextSource(path=str(tmp_path / "empty.txt")), "is empty"),
        (JsonlSource(path=str(tmp_path)), "no file that matches .jsonl"),
    ]:
        with pytest.raises(ValueError, match=message):
            config.open()


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {n} " * n for n in range(1, 50)]
    parquet.write_table(arrow.table({"text": texts, "n": list(range(49))}), tmp_path / "x.parquet", row_group_size=10)
    source = ParquetSource(path=str(tmp_path))
    for target in (1 << 20, 400, 1):
        assert documents(source, target=target) == [(f"x.parquet:{n}", text) for n, text in enumerate(texts)]
    with pytest.raises(ValueError, match="no column 'body'; its columns are 'text', 'n'"):
        documents(ParquetSource(path=str(tmp_path), column="body"))
    with pytest.raises(ValueError, match="row 0, column 'n' must be a string"):
        documents(ParquetSource(path=str(tmp_path), column="n"))
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        documents(source)


def test_parquet_that_is_damaged_or_not_utf8_is_named(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    latin = arrow.array([b"fine", b"au caf\xe9, Monsieur"]).cast(arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": latin}), path)
    source = ParquetSource(path=str(path))
    with pytest.raises(ValueError, match=r"x\.parquet: row 1, column 'text': 0xe9 at byte 6 is not UTF-8.*undecodable"):
        documents(source)
    assert documents(source, undecodable="skip") == [("x.parquet:0", "fine")]
    assert documents(source, undecodable="replace")[1] == ("x.parquet:1", "au caf\ufffd, Monsieur")
    parquet.write_table(arrow.table({"text": ["some text " * n for n in range(99)]}), path)
    data = bytearray(path.read_bytes())
    data[40:80] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.parquet is damaged") as caught:
        documents(source)
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"dsjax\[parquet\]"):
        documents(ParquetSource(path=str(tmp_path)))


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprint_sees_content_names_and_nothing_else(tmp_path, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(source_of_text, "_WHOLE_CONTENT_BYTES", 10)
        monkeypatch.setattr(source_of_text, "_BLOCK_BYTES", 16)
    for where in ("a", "b"):
        (tmp_path / where).mkdir()
        for name in ("x.txt", "y.txt"):
            (tmp_path / where / name).write_bytes(bytes(range(60, 110)) * 20)
            os.utime(tmp_path / where / name, ns=(1, 1))

    def print_of(where):
        return TextSource(path=str(tmp_path / where)).open().fingerprint()

    first = print_of("a")
    assert print_of("b") == first
    data = bytearray((tmp_path / "b" / "y.txt").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / "y.txt").write_bytes(data)
    os.utime(tmp_path / "b" / "y.txt", ns=(1, 1))
    assert print_of("b") != first
    (tmp_path / "a" / "y.txt").rename(tmp_path / "a" / "z.txt")
    assert print_of("a") != first
    (tmp_path / "a" / "z.txt").rename(tmp_path / "a" / "y.txt")
    os.utime(tmp_path / "a" / "y.txt", ns=(2, 2))
    assert (print_of("a") == first) == whole
