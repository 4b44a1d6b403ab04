"""Files by their first bytes: compressed and UTF-16 ones are read, what is no text is refused with what to do."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import zipfile
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import JsonlSource, TextSource
from dsjax.data.text import jsonl, sniff
from dsjax.data.text.read import read_documents
from dsjax.data.text.sniff import compression_of, not_text, open_bytes

COMPRESS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
if sys.version_info < (3, 14):
    zstandard = pytest.importorskip("zstandard")
    COMPRESS["Zstandard"] = zstandard.compress
else:
    from compression import zstd

    COMPRESS["Zstandard"] = zstd.compress
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


def documents(config, **options):
    said = []
    found = [(document.name, document.text) for document in read_documents([config], report=said.append, **options)]
    return found, said


@settings(deadline=None, max_examples=60)
@given(
    # Bytes of 0 in a plain text are taken for no text, wherever there are many among the first.
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), min_size=1),
    st.sampled_from([None, *COMPRESS]),
    st.sampled_from(ENCODINGS),
)
def test_what_is_written_is_read_however_it_is_packed(tmp_path_factory, texts, compression, encoding):
    folder = tmp_path_factory.mktemp("packed")
    pack = COMPRESS[compression] if compression else bytes
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "a.jsonl").write_bytes(pack(lines.encode(encoding)))
    assert documents(JsonlSource(path=str(folder / "a.jsonl"))) == (
        [(f"a.jsonl:{number}", text) for number, text in enumerate(texts, 1)],
        [],
    )
    whole = "x" + "\u2028".join(texts)
    (folder / "a.txt").write_bytes(pack(whole.encode(encoding)))
    expected = whole.replace("\r\n", "\n").replace("\r", "\n")
    assert documents(TextSource(path=str(folder / "a.txt")))[0] == [("a.txt", expected)]


@pytest.mark.parametrize("name", COMPRESS)
def test_the_name_says_nothing_and_frames_may_follow_one_another(tmp_path, name):
    pack = COMPRESS[name]
    assert compression_of(pack(b"text")) == name
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(pack(b'{"text": "one"}\n{"te') + pack(b'xt": "two"}\n') + b"\0" * 8 * (name == "xz"))
    assert documents(JsonlSource(path=str(path)))[0] == [("a.jsonl.gz:1", "one"), ("a.jsonl.gz:2", "two")]
    path.write_bytes(b'{"text": "unpacked by a browser"}\n')
    assert documents(JsonlSource(path=str(path)))[0] == [("a.jsonl.gz:1", "unpacked by a browser")]
    whole = pack(b'{"text": "one"}\n' * 100)
    for cut in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged compressed file"):
            documents(JsonlSource(path=str(path)))
    path.write_bytes(pack(pack(b"text")))
    with pytest.raises(ValueError, match=f"compressed with {name}, and inside compressed again with {name}"):
        documents(JsonlSource(path=str(path)))


@pytest.mark.parametrize("name", COMPRESS)
def test_a_small_file_that_holds_much_takes_little(tmp_path, name, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(sniff, "MAX_DECOMPRESSED", 1 << 20)
    monkeypatch.setattr(jsonl, "MAX_DECOMPRESSED", 1 << 20)
    packed = COMPRESS[name](b"a" * (40 << 20))
    for path, config in (
        (tmp_path / "a.txt", TextSource(path=str(tmp_path / "a.txt"))),
        (tmp_path / "a.jsonl", JsonlSource(path=str(tmp_path / "a.jsonl"))),
    ):
        path.write_bytes(packed)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"holds a document or a line of more than 1,048,576 bytes"):
            documents(config)
        assert tracemalloc.get_traced_memory()[1] < 36 << 20  # of 40; xz takes 8 MB, a KiB of Zstandard becomes 32
        tracemalloc.stop()


def test_only_what_is_asked_for_is_decompressed(tmp_path):
    path = tmp_path / "a"
    data = gzip.compress(bytes(1 << 20))
    path.write_bytes(data[: len(data) // 2])
    with open_bytes(path) as opened:
        assert opened.stream.read(100) == bytes(100)  # the missing half is not looked for


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "text")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


NO_TEXT = {
    "zip": (zipped(), "a ZIP archive .*unpack it"),
    "tar": (tarred(), "a tar archive, no text: unpack it"),
    "tar.gz": (gzip.compress(tarred()), "compressed with gzip, and inside a tar archive, no text: unpack it"),
    "parquet": (b"PAR1\x15\x04\x15\x00", "a Parquet file, no text: read it by a source of kind parquet"),
    "pdf": (b"%PDF-1.7\n%\xb5\xed", "a PDF document, no text: extract its text first"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0", "a picture"),
    "gguf": (b"GGUF\x03\0\0\0\1\0", "a GGUF model"),
    "npy": (b"\x93NUMPY\x01\x00", "a NumPy array"),
    "elf": (b"\x7fELF\x02\x01", "a program"),
    "utf-16 without a mark": ("Grüße, Welt".encode("utf-16-le"), "UTF-16 without a byte-order mark.*iconv -f UTF-16LE"),
    "zeros": (bytes(100), "100 of its first 100 bytes are 0: it is no text"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_refused_and_never_replaced(tmp_path, name):
    data, message = NO_TEXT[name]
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"text")
    source = TextSource(path=str(tmp_path))
    for undecodable in ("error", "replace"):
        with pytest.raises(ValueError, match=message) as caught:
            documents(source, undecodable=undecodable)
        assert str(tmp_path / "a.txt") in str(caught.value) and "undecodable" not in str(caught.value)
    found, said = documents(source, undecodable="skip")
    assert found == [("b.txt", "text")] and "left out 1 of its documents or files, which are no UTF-8 text" in said[0]


@pytest.mark.parametrize(
    "text",
    [
        "PAR1 is how Parquet begins",
        "GGUF is a format",
        "BZh is bzip2",
        "RIFF holds sound",
        "ID3 tags",
        "MZ",
        "Rar!",
        "PK",
        "The ftyp box",
    ],
)
def test_text_that_begins_like_something_else_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert documents(TextSource(path=str(tmp_path / "a.txt")))[0] == [("a.txt", text)]


@given(st.text(min_size=1))
def test_no_text_in_utf_8_is_taken_for_something_else(text):
    data = text.encode()
    assert compression_of(data) is None and (not_text(data) == "" or 10 * data.count(0) > len(data))


def test_another_encoding_is_not_recommended_to_be_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Война и мир".encode("cp1251"))
    with pytest.raises(ValueError, match=r"not UTF-8.*another encoding \(convert it: iconv") as caught:
        documents(TextSource(path=str(path)))
    assert "replace" not in str(caught.value)
    path.write_bytes("Es war ein schöner Tag, sagte sie.".encode("latin-1"))  # one in 34: U+FFFD may do
    with pytest.raises(ValueError, match=r"set data\.undecodable .* to 'replace' or 'skip'"):
        documents(TextSource(path=str(path)))


def test_zstandard_without_its_package_names_it(tmp_path, monkeypatch):
    if sys.version_info >= (3, 14):
        pytest.skip("Python has it")
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS["Zstandard"](b'{"text": "a"}\n'))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst is compressed with Zstandard.*pip install 'dsjax\[zstd\]'"):
        documents(JsonlSource(path=str(tmp_path)))


def test_a_folder_of_compressed_and_other_files_is_read_or_told(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(COMPRESS["Zstandard"](b'{"text": "packed"}\n'))
    (tmp_path / "b.jsonl").write_text('{"text": "plain"}\n{"text": ""}\n')
    for name in ("c.json", "d.csv", "e.csv", "README", ".hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.jsonl").write_text("x")
    (tmp_path / "linked").symlink_to(tmp_path / ".git")
    found, said = documents(JsonlSource(path=str(tmp_path)))
    assert found == [("a.jsonl.zst:1", "packed"), ("b.jsonl:1", "plain")]
    assert said == [
        f"{tmp_path}: 2 files read (kind jsonl), skipped: 2 .csv, 1 .json, 1 empty file, 1 file that begins with a "
        "dot, 1 file without an ending, 1 folder that begins with a dot, 1 link to a folder",
        f"{tmp_path}: left out 1 document without text",
    ]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"text"))
    assert documents(TextSource(path=str(tmp_path), glob="x.*"))[0] == [("x.txt.gz", "text")]
    with pytest.raises(ValueError, match=r"no file that matches \*\.txt .*it holds 2 \.csv.*1 \.txt\.gz"):
        documents(TextSource(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("separator", "hint"),
    [("---", ""), ("\\n\\n", "a line end is .* in double quotes"), ("\r\n", "every line end becomes")],
)
def test_a_separator_that_does_not_occur_is_said(tmp_path, separator, hint):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"one\r\n\r\ntwo")
    found, (said,) = documents(TextSource(path=str(tmp_path), separator=separator))
    assert len(found) == 2 and "does not occur: each file is one document" in said
    assert hint == "" or any(word in said for word in hint.split(" .* "))
    assert documents(TextSource(path=str(tmp_path), separator="\n\n"))[1] == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl", '[{"text": "one"},\n {"text": "two"}]\n', "one JSON array"),
        ("a.json", '[{"text": "one"}, {"text": "two"}]', "one JSON array"),
        ("a.json", '{"version": 1, "rows": [{"text": "one"}, {"text": "two"}]}', "Its key 'rows' holds 2 objects"),
        ("a.csv", 'text,label\none,1\ntwo,"2"\n', "a table of values"),
        ("a.tsv", "text\tlabel\none\t1\ntwo\t2\n", "a table of values"),
        ("a.json", '{\n  "text": "one"\n}\n', "goes over several lines"),
    ],
)
def test_other_forms_of_rows_are_named_and_the_command_that_is_shown_mends_them(tmp_path, name, content, why):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}:1.*one JSON object a line|{name}:1.*these one a line") as caught:
        documents(JsonlSource(path=str(path)))
    assert why in str(caught.value)
    command = sys.executable + str(caught.value).partition("python")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    (mended,) = tmp_path.glob("a-lines.jsonl" if name == "a.jsonl" else "a.jsonl")
    texts = [text for _, text in documents(JsonlSource(path=str(mended)))[0]]
    assert texts == (["one"] if "several lines" in why else ["one", "two"])


def test_rows_that_are_read_as_plain_text_are_told(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.json"):
        (tmp_path / name).write_text('{"text": "one"}\n')
        _, (said,) = documents(TextSource(path=str(tmp_path / name)))
        assert f"{name}: .{name.split('.')[1]} is read as plain text" in said and "kind jsonl" in said


def test_magic_numbers_exclude_one_another():
    beginnings = [data for data, _ in NO_TEXT.values()] + [pack(b"text") for pack in COMPRESS.values()]
    kinds = [[magic for magic, *_ in sniff._REFUSED if sniff.re.match(magic, data)] for data in beginnings]
    assert all(len(found) <= 1 for found in kinds), kinds
    assert all(a is not b for a, b in pairwise(sniff._COMPRESSED))
