"""Building a corpus: what is in it, that it is built once, survives kills and rivals, and refuses what is wrong."""

import gzip
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dsjax.data.config import (
    BPETokenizer,
    ByteTokenizer,
    DataConfig,
    FileTokenizer,
    JsonlSource,
    StdlibSource,
    TextSource,
    TokensSource,
)
from dsjax.data.corpus import assemble, parts
from dsjax.data.corpus.build import build_corpus, cache_folder


def texts(count, seed=0):
    random = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "é", "x = 1\n", "return", "☃"]
    return [" ".join(random.choice(words, random.integers(1, 60))) + f" {seed}-{n}" for n in range(count)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return JsonlSource(path=str(path))


def config_of(tmp_path, *sources, **changes):
    options = {"tokenizer": ByteTokenizer(), "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(sources=sources, **options | changes)


def contents(corpus, split):
    stores = corpus.train if split == "train" else corpus.validation
    return [corpus.tokenizer.decode(store.document(n)) for store in stores for n in range(store.num_documents)]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(assemble, "_MIN_PART_BYTES", 1)
    monkeypatch.setattr(assemble, "_MAX_PART_BYTES", 2000)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer(vocab_size=300)])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_document_once_in_order_and_on_one_side(tmp_path, small_parts, tokenizer, workers):
    documents = texts(200)
    source = write_jsonl(tmp_path / "x.jsonl", [*documents, "", *documents[:20]])
    corpus = build_corpus(config_of(tmp_path, source, tokenizer=tokenizer), workers=workers)
    train, validation = contents(corpus, "train"), contents(corpus, "validation")
    assert not set(train) & set(validation)
    assert train == [text for text in documents + documents[:20] if text in set(train)]
    assert validation == [text for text in documents + documents[:20] if text in set(validation)]
    assert len(train) + len(validation) == 220 and 20 < len(validation) < 70
    for stores, split in ((corpus.train, train), (corpus.validation, validation)):
        assert sum(store.num_bytes for store in stores) == sum(len(text.encode()) for text in split)
    lines = [f"x.jsonl:{n}" for n in range(1, 222) if n != 201]
    names = corpus.document_names
    assert names["train"] == sorted(names["train"], key=lines.index) and set(names["train"]) <= set(lines)
    for store in corpus.train + corpus.validation:
        assert store.tokens.dtype == np.uint16
        assert (store.tokens[store.offsets[1:] - 1] == corpus.tokenizer.end_of_text).all()
        assert (store.tokens == corpus.tokenizer.end_of_text).sum() == store.num_documents


def test_adding_documents_moves_no_other(tmp_path):
    documents = texts(150)
    few = build_corpus(config_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", documents[:100])))
    more = build_corpus(config_of(tmp_path, write_jsonl(tmp_path / "b.jsonl", documents[::-1])))
    assert set(contents(few, "validation")) == set(contents(more, "validation")) & set(documents[:100])
    assert few.hash != more.hash


def test_the_second_call_reads_nothing_and_the_hash_is_of_the_data(tmp_path, monkeypatch):
    config = config_of(tmp_path, StdlibSource(), tokenizer=ByteTokenizer(), validation_fraction=0.02)
    first = build_corpus(config)
    monkeypatch.setattr(parts, "read_part", None)
    monkeypatch.setattr(assemble, "read_part", None)
    begin = time.perf_counter()
    second = build_corpus(config)
    assert time.perf_counter() - begin < 2  # 0.15 s when nothing else runs
    assert second.hash == first.hash and second.train_tokens == first.train_tokens
    assert len(first.train[0].hash) == 64 and first.train[0].hash != first.validation[0].hash


def test_hash_follows_data_tokenizer_and_split_alone(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", texts(60))
    (tmp_path / "elsewhere").mkdir()
    same = write_jsonl(tmp_path / "elsewhere" / "x.jsonl", texts(60))
    base = build_corpus(config_of(tmp_path, source)).hash
    weighted = JsonlSource(path=source.path, weight=3.0)
    assert build_corpus(config_of(tmp_path, weighted, sequence_length=64, shuffle_seed=5)).hash == base
    assert build_corpus(config_of(tmp_path, same, cache_dir=str(tmp_path / "other"))).hash == base
    others = [
        build_corpus(config_of(tmp_path, source, validation_fraction=0.3)).hash,
        build_corpus(config_of(tmp_path, source, tokenizer=BPETokenizer(vocab_size=280))).hash,
        build_corpus(config_of(tmp_path, source, tokenizer=BPETokenizer(vocab_size=290))).hash,
        build_corpus(config_of(tmp_path, source, undecodable="skip")).hash,
        build_corpus(config_of(tmp_path, write_jsonl(tmp_path / "x.jsonl", [*texts(60)[:-1], "changed"]))).hash,
    ]
    assert len({base, *others}) == 6


def test_validation_sources_and_several_sources(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a book")
    first = write_jsonl(tmp_path / "x.jsonl", texts(10))
    held_out = write_jsonl(tmp_path / "v.jsonl", texts(5, seed=1))
    book = TextSource(path=str(tmp_path / "books"), weight=0.3)
    corpus = build_corpus(config_of(tmp_path, first, book, validation_sources=(held_out,)))
    assert [contents(corpus, "train"), contents(corpus, "validation")] == [[*texts(10), "a book"], texts(5, seed=1)]
    assert corpus.train_weights == [1.0, 0.3] and len(corpus.train) == 2
    assert build_corpus(config_of(tmp_path, first, book, validation_fraction=0)).validation == []


def test_bpe_is_trained_on_training_documents_only(tmp_path):
    documents = texts(50)
    corpus = build_corpus(
        config_of(tmp_path, write_jsonl(tmp_path / "x.jsonl", documents), tokenizer=BPETokenizer(vocab_size=300))
    )
    from dsjax.data.tokenizers.train import train_bpe

    alone = train_bpe(contents(corpus, "train"), BPETokenizer(vocab_size=300), tmp_path / "another")
    assert corpus.tokenizer.hash == alone.hash


KILLED = """
import os, signal, sys
from dsjax.data.corpus import assemble, parts
from dsjax.data.corpus.build import build_corpus
from dsjax.data.config import BPETokenizer, DataConfig, JsonlSource
assemble._MIN_PART_BYTES, assemble._MAX_PART_BYTES = 1, 2000
write, written = parts._write_part, []
def write_some(*arguments):
    if len(written) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(write(*arguments))
parts._write_part = write_some
path, cache = sys.argv[1:]
build_corpus(DataConfig(sources=(JsonlSource(path=path),), tokenizer=BPETokenizer(vocab_size=300),
                        validation_fraction=0.2, cache_dir=cache), workers=1)
"""


def test_a_killed_build_goes_on_where_it_was(tmp_path, small_parts, monkeypatch):
    source = write_jsonl(tmp_path / "x.jsonl", texts(200))
    command = [sys.executable, "-c", KILLED, source.path, str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert len(list((tmp_path / "cache" / "corpora").glob("*.partial/*/part-*.npz"))) == 4
    config = config_of(tmp_path, source, tokenizer=BPETokenizer(vocab_size=300))
    numbers = []
    write = parts._write_part
    monkeypatch.setattr(parts, "_write_part", lambda *a: (numbers.append(a[3].name), write(*a)))
    monkeypatch.setattr(assemble, "train_bpe", None)
    corpus = build_corpus(config)
    assert numbers and min(numbers) == "part-000004.npz"
    monkeypatch.undo()
    fresh = build_corpus(
        config_of(tmp_path, source, tokenizer=BPETokenizer(vocab_size=300), cache_dir=str(tmp_path / "b"))
    )
    assert fresh.hash == corpus.hash and np.array_equal(fresh.train[0].tokens, corpus.train[0].tokens)
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == [corpus.folder.name]


def test_a_part_that_is_much_text_is_tokenised_piece_by_piece(tmp_path, small_parts, monkeypatch):
    documents = texts(300)
    data = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    plain = build_corpus(
        config_of(tmp_path, write_jsonl(tmp_path / "x.jsonl", documents), cache_dir=str(tmp_path / "b"))
    )
    monkeypatch.setattr(parts, "_PIECE_CHARACTERS", 1000)
    written = []
    write = parts._write_piece
    monkeypatch.setattr(parts, "_write_piece", lambda *a: (written.append((a[3].name, len(a[2]))), write(*a)))
    packed = build_corpus(config_of(tmp_path, JsonlSource(path=str(tmp_path / "x.jsonl.gz"))))
    assert np.array_equal(packed.train[0].tokens, plain.train[0].tokens)
    assert contents(packed, "validation") == contents(plain, "validation")
    assert written[-1][0] == "part-000000.npz" and written[0][0] == "part-000000.000001.npz"
    assert sum(count for _, count in written) == 300 and max(count for _, count in written) < 60


def test_what_is_left_out_is_told_once(tmp_path, small_parts):
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text {number} " * 40)
    (tmp_path / "text" / "x.txt").write_bytes(b"\xff")
    (tmp_path / "text" / "x.md").write_text("other")
    empty = write_jsonl(tmp_path / "x.jsonl", ["", *texts(40), ""])
    said = []
    source = TextSource(path=str(tmp_path / "text"), separator="===")
    config = config_of(tmp_path, source, empty, undecodable="skip")
    build_corpus(config, report=said.append)
    assert said == [
        f"{tmp_path}/text: 31 files read (glob '*.txt'), skipped: 1 .md",
        f"{tmp_path}/text: left out 1 of its documents or files, which are no UTF-8 text (undecodable: skip)",
        f"{tmp_path}/text: the separator '===' does not occur: each file is one document",
        f"{tmp_path}: left out 2 documents without text",
    ]
    said.clear()
    build_corpus(config, report=said.append)
    assert len(said) == 1 and "skipped: 1 .md" in said[0]


def test_rivals_build_once(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "x.jsonl", texts(300))
    built, results = [], []
    build = assemble._build
    monkeypatch.setattr(assemble, "_build", lambda *a: (built.append(1), time.sleep(0.2), build(*a)))
    config = config_of(tmp_path, source)
    rivals = [threading.Thread(target=lambda: results.append(build_corpus(config))) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert len(built) == 1 and len({corpus.hash for corpus in results}) == 1 and len(results) == 4
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1


def test_what_cannot_be_split_is_refused(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", ["only"])
    with pytest.raises(ValueError, match=r"chose none of the 1 documents; .*separator"):
        build_corpus(config_of(tmp_path, one, validation_fraction=0.0001))
    with pytest.raises(ValueError, match="all of its 1 documents went to validation"):
        build_corpus(config_of(tmp_path, one, validation_fraction=0.9999))
    with pytest.raises(ValueError, match="no document has any text"):
        build_corpus(config_of(tmp_path, write_jsonl(tmp_path / "empty.jsonl", ["", ""])))
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_an_unreadable_document_stops_the_build_and_is_named(tmp_path, small_parts):
    source = write_jsonl(tmp_path / "x.jsonl", texts(100))
    with open(source.path, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:101: 0xff"):
        build_corpus(config_of(tmp_path, source))
    corpus = build_corpus(config_of(tmp_path, source, undecodable="replace"))
    assert "\ufffd" in contents(corpus, "train") + contents(corpus, "validation")


def test_a_full_disk_is_one_line_and_what_was_done_is_kept(tmp_path, small_parts, monkeypatch):
    source = write_jsonl(tmp_path / "x.jsonl", texts(100))
    save, saved = np.savez, []

    def save_two(file, **arrays):
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        saved.append(save(file, **arrays))

    monkeypatch.setattr(np, "savez", save_two)
    with pytest.raises(ValueError, match="is full; what was done is kept"):
        build_corpus(config_of(tmp_path, source), workers=1)
    monkeypatch.setattr(np, "savez", save)
    assert len(list((tmp_path / "cache" / "corpora").glob("*.partial/*/part-*.npz"))) == 2
    assert len(contents(build_corpus(config_of(tmp_path, source)), "train")) > 50


def test_tokens_folder_is_read_back_and_mixed(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", texts(80))
    other = write_jsonl(tmp_path / "y.jsonl", texts(40, seed=1))
    config = config_of(tmp_path, source, tokenizer=BPETokenizer(vocab_size=300))
    made = build_corpus(config, out=tmp_path / "out" / "tokens")
    assert made.folder == tmp_path / "out" / "tokens" and [p.name for p in made.folder.parent.iterdir()] == ["tokens"]
    tokens = TokensSource(path=str(made.folder), weight=2.0)
    alone = build_corpus(config_of(tmp_path, tokens, tokenizer=BPETokenizer(vocab_size=999)))
    assert alone.hash == made.hash and alone.tokenizer.hash == made.tokenizer.hash
    assert contents(alone, "train") == contents(made, "train")
    assert contents(alone, "validation") == contents(made, "validation")
    mixed = build_corpus(
        config_of(tmp_path, other, tokens, tokenizer=FileTokenizer(path=str(made.folder / "tokenizer")))
    )
    assert mixed.train_weights == [1.0, 2.0] and mixed.tokenizer.hash == made.tokenizer.hash
    assert set(contents(mixed, "train") + contents(mixed, "validation")) == set(texts(80) + texts(40, seed=1))
    assert build_corpus(config, out=made.folder).hash == made.hash
    with pytest.raises(ValueError, match="another tokenizer"):
        build_corpus(config_of(tmp_path, tokens, tokenizer=ByteTokenizer()))
    with pytest.raises(ValueError, match="built already"):
        build_corpus(config_of(tmp_path, tokens), out=tmp_path / "again")
    with pytest.raises(ValueError, match="holds a corpus of other data"):
        build_corpus(config_of(tmp_path, other), out=made.folder)
    held_out = build_corpus(
        config_of(tmp_path, other, validation_sources=(tokens,), tokenizer=BPETokenizer(vocab_size=300))
    )
    assert sorted(contents(held_out, "validation")) == sorted(texts(80))


def damage_truncate(folder):
    path = folder / "train-0.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    return "train-0.tokens has .* bytes, .* expected"


def damage_remove(folder):
    (folder / "validation-0.offsets").unlink()
    return "validation-0.offsets is missing"


def damage_offsets(folder):
    path = folder / "train-0.offsets"
    path.write_bytes(path.read_bytes()[:-8] + (5).to_bytes(8, "little"))
    return "does not fit"


def damage_manifest(folder):
    (folder / "corpus.json").write_text('{"format": 1')
    return "corpus.json is damaged"


def damage_key(folder):
    (folder / "corpus.json").write_text('{"format": 1}')
    return "corpus.json is damaged"


def damage_format(folder):
    (folder / "corpus.json").write_text('{"format": 99}')
    return "format 99"


def damage_tokenizer(folder):
    (folder / "tokenizer" / "byte_tokenizer.json").unlink()
    return "no tokenizer"


def damage_everything(folder):
    (folder / "corpus.json").unlink()
    return "is not a corpus folder"


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_remove,
        damage_offsets,
        damage_manifest,
        damage_key,
        damage_format,
        damage_tokenizer,
        damage_everything,
    ],
)
def test_damaged_tokens_folders_are_refused_by_name(tmp_path, damage):
    out = tmp_path / "tokens"
    build_corpus(config_of(tmp_path, write_jsonl(tmp_path / "x.jsonl", texts(50))), out=out)
    message = damage(out)
    with pytest.raises(ValueError, match=message) as caught:
        build_corpus(config_of(tmp_path, TokensSource(path=str(out))))
    assert str(out) in str(caught.value)


def test_out_never_overwrites(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a corpus folder"):
        build_corpus(config_of(tmp_path, write_jsonl(tmp_path / "x.jsonl", texts(50))), out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(DataConfig()) == Path("/somewhere/dsjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "dsjax"
    assert cache_folder(DataConfig(cache_dir="here")) == Path("here")
