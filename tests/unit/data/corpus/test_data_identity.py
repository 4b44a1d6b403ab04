"""Large files are the same data while their content is, whatever their times; what earlier versions made goes on."""

import os

import pytest

from dsjax.data.config import ByteTokenizer, DataConfig, TextSource
from dsjax.data.corpus import assemble, build, identity, parts
from dsjax.data.corpus.build import build_corpus
from dsjax.data.text import source as source_of_text

# Of the files of `folder`, as 4dad114 gave it, which identified large files by their times.
FORMER = "2a8bdec0e291ab229a7811ab12cee4c11773c1c1b2ad9de76d6b60584560a36c"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(source_of_text, "_WHOLE_CONTENT_BYTES", 10)
    monkeypatch.setattr(identity, "_SETTLED_NANOSECONDS", -(1 << 62))
    (tmp_path / "text").mkdir()
    for number, name in enumerate(("a.txt", "b.txt")):
        (tmp_path / "text" / name).write_text(f"text {number}\n" * 10)
        os.utime(tmp_path / "text" / name, ns=(5, 10**18 + number))
    return tmp_path / "text"


def corpus_of(folder, cache="cache", begun=""):
    source = TextSource(path=str(folder))
    return build_corpus(
        DataConfig(
            sources=(source,),
            tokenizer=ByteTokenizer(),
            validation_fraction=0,
            cache_dir=str(folder.parent / cache),
        ),
        begun=begun,
    )


def touch(folder, seconds=2_000_000_000):
    for file in folder.iterdir():
        os.utime(file, (seconds, seconds))


def former_corpus(folder, monkeypatch):
    """As 4dad114 built it."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "identity", lambda source, cache_dir, progress: source.fingerprint())
        old = corpus_of(folder)
    assert old.hash == FORMER
    assert not (folder.parent / "cache" / "files").exists()
    return old


def test_touched_copied_and_neighbours_are_the_same_data(folder, tmp_path, monkeypatch):
    first = corpus_of(folder)
    monkeypatch.setattr(parts, "read_part", None)
    monkeypatch.setattr(assemble, "read_part", None)
    touch(folder)
    assert corpus_of(folder).hash == first.hash
    folder.rename(tmp_path / "elsewhere")
    touch(tmp_path / "elsewhere", 1)
    assert corpus_of(tmp_path / "elsewhere").hash == first.hash
    (tmp_path / "elsewhere" / "notes.md").write_text("not read")
    (tmp_path / "elsewhere" / "empty.txt").touch()
    assert corpus_of(tmp_path / "elsewhere").hash == first.hash


def test_other_content_with_the_same_size_and_times_is_seen(folder):
    first = corpus_of(folder)
    (folder / "a.txt").write_text("Text 0\n" * 10)
    os.utime(folder / "a.txt", ns=(5, 10**18))
    second = corpus_of(folder)
    assert second.hash != first.hash
    (folder / "a.txt").rename(folder / "c.txt")
    assert corpus_of(folder).hash not in (first.hash, second.hash)


def test_a_hash_is_kept_and_computed_when_time_or_size_differ(folder, monkeypatch):
    hashed, real = [], identity._hash
    monkeypatch.setattr(identity, "_hash", lambda file, bar: hashed.append(file.name) or real(file, bar))
    corpus_of(folder)
    corpus_of(folder)
    assert hashed == ["a.txt", "b.txt"]
    os.utime(folder / "b.txt", (7, 7))
    corpus_of(folder)
    assert hashed == ["a.txt", "b.txt", "b.txt"]
    (kept,) = (folder.parent / "cache" / "files").iterdir()
    for damage in ("{", "[1]", '{"files": 3}', '{"files": {"a.txt": [1], "b.txt": 2}}'):
        kept.write_text(damage)
        hashed.clear()
        corpus_of(folder)
        assert hashed == ["a.txt", "b.txt"]
    monkeypatch.setattr(identity, "_SETTLED_NANOSECONDS", 1 << 62)  # too young to be trusted
    kept.unlink()
    hashed.clear()
    corpus_of(folder)
    corpus_of(folder)
    assert hashed == ["a.txt", "b.txt"] * 2


def test_a_cache_of_an_earlier_version_goes_on_when_its_files_are_touched(folder, monkeypatch):
    former_corpus(folder, monkeypatch)
    monkeypatch.setattr(parts, "read_part", None)
    monkeypatch.setattr(assemble, "read_part", None)
    assert corpus_of(folder).hash == FORMER
    touch(folder)
    touched = corpus_of(folder)
    assert touched.hash == FORMER


def test_without_its_cache_an_earlier_run_still_knows_its_untouched_data(folder, monkeypatch):
    former_corpus(folder, monkeypatch)
    anew = corpus_of(folder, cache="another")
    assert anew.hash != FORMER and corpus_of(folder, cache="another", begun=FORMER).hash == FORMER
    touch(folder)
    assert corpus_of(folder, cache="another", begun=FORMER).hash == anew.hash  # nothing says that it is the same


def test_a_corpus_in_a_folder_of_its_own_is_found_by_both(folder, monkeypatch, tmp_path):
    config = DataConfig(
        sources=(TextSource(path=str(folder)),),
        tokenizer=ByteTokenizer(),
        validation_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(build, "identity", lambda source, cache_dir, progress: source.fingerprint())
        build_corpus(config, out=tmp_path / "old")
    assert build_corpus(config, out=tmp_path / "old").hash == FORMER
    new = build_corpus(config, out=tmp_path / "new").hash
    touch(folder)
    assert build_corpus(config, out=tmp_path / "new").hash == new != FORMER
