"""Labelled texts: rows as the tokenizers library itself would cut them, classes, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import ByteTokenizer, DataConfig, FileTokenizer, JsonlSource, ParquetSource, TextSource
from dsjax.data.corpus.build import build_corpus
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.single_rows import encode_rows
from dsjax.data.tokenizers.tokenizer import byte_tokenizer
from tests.wordpiece import SEP, WORDS, library, tokenizer

sentences = st.lists(st.sampled_from([*WORDS, "12", "[SEP]", "?"]), max_size=14).map(" ".join)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(folder, *sources, **settings):
    tokenizer().save(folder / "tokenizer")
    return DataConfig(
        sources=sources,
        tokenizer=FileTokenizer(path=str(folder / "tokenizer")),
        task="classification",
        cache_dir=str(folder / "cache"),
        **{"sequence_length": 8, "validation_fraction": 0, **settings},
    )


@settings(deadline=None)
@given(st.lists(st.tuples(sentences, st.none() | sentences), max_size=5), st.integers(5, 20))
def test_rows_are_what_the_library_gives_when_it_truncates(texts, length):
    oracle = library()
    oracle.encode_special_tokens = True
    oracle.enable_truncation(length)  # longest first
    rows = encode_rows(tokenizer(), [text for text, _ in texts], [pair for _, pair in texts], length=length)
    for row, (text, pair) in zip(rows, texts, strict=True):
        whole = oracle.encode(text, pair) if pair is not None else oracle.encode(text)
        types = [0] * (len(row.ids) - row.num_second) + [1] * row.num_second
        assert len(row.ids) <= length and row.cut == bool(whole.overflowing)
        if pair is None or not row.cut:
            assert (row.ids, types) == (whole.ids, whole.type_ids)
        else:  # of two texts as long as each other the library prefers the other one by one token
            assert abs(types.count(1) - whole.type_ids.count(1)) <= 1 and len(row.ids) == len(whole.ids)
            assert row.ids[-1] == SEP


@settings(deadline=None)
@given(st.text(max_size=20), st.none() | st.text(max_size=20), st.integers(3, 30))
def test_bytes_have_no_special_tokens_but_one_between_a_pair(text, pair, length):
    (row,) = encode_rows(byte_tokenizer(), [text], [pair], length=length)
    whole = [*text.encode()] if pair is None else [*text.encode(), 256, *pair.encode()]
    assert row.num_second == 0 and row.cut == (len(whole) > length)
    assert row.ids == whole if not row.cut else len(row.ids) == length
    assert pair is None or row.ids.count(256) == 1


def test_every_row_once_an_epoch_with_its_label_and_padding(tmp_path):
    rows = [{"text": f"film number {n}", "label": ["bad", "good", "fine"][n % 3]} for n in range(23)]
    made = config(tmp_path, JsonlSource(path=write(tmp_path / "a.jsonl", rows), label="label"))
    corpus = build_corpus(made)
    assert corpus.labels == ("bad", "fine", "good") and corpus.num_cut == 0
    batch = Rows.of(corpus, made, split="train").rows(np.arange(23, 46))
    seen = set()
    for tokens, segments, label in zip(batch["tokens"], batch["segments"], batch["labels"], strict=True):
        real = segments == 1
        assert (tokens[~real] == 0).all() and (np.diff(segments) <= 0).all()
        text = corpus.tokenizer.decode(tokens[real]).replace(" ", "")
        number = int(text.removeprefix("filmnumber"))
        assert corpus.labels[label] == rows[number]["label"]
        seen.add(number)
    assert seen == set(range(23)) and batch["loss_mask"].all() and batch["loss_mask"].shape == (23,)
    assert "token_types" not in batch


def test_pairs_numbers_sources_and_validation(tmp_path):
    first = [{"q": "good film", "a": "the plot was great", "y": n % 3} for n in range(4)]
    second = [{"q": "bad", "a": "poor", "y": 4}] * 3
    sources = [
        JsonlSource(path=write(tmp_path / f"{n}.jsonl", rows), field="q", text_pair="a", label="y", weight=1 + n)
        for n, rows in enumerate((first, second))
    ]
    made = config(tmp_path, *sources, validation_sources=(sources[0],), sequence_length=10)
    corpus = build_corpus(made)
    assert corpus.labels == ("0", "1", "2", "3", "4") and len(corpus.validation) == 1
    batch = Rows.of(corpus, made, split="train").rows(np.arange(3))
    assert batch["token_types"].shape == (3, 10)
    for tokens, types in zip(batch["tokens"], batch["token_types"], strict=True):
        assert tokens[np.flatnonzero(types)[0] - 1] == SEP
    assert build_corpus(made).hash == corpus.hash


def test_parquet_gives_what_jsonl_gives(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"film {n}", "label": n % 2} for n in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    stores = [
        build_corpus(config(tmp_path, source)).train[0]
        for source in (
            JsonlSource(path=write(tmp_path / "a.jsonl", rows), label="label"),
            ParquetSource(path=str(tmp_path / "a.parquet"), label="label"),
        )
    ]
    assert stores[0].tokens.tolist() == stores[1].tokens.tolist()
    assert np.array_equal(stores[0].classes, stores[1].classes)


def test_what_is_cut_is_counted(tmp_path):
    rows = [{"text": "film " * n, "label": 0} for n in (1, 6, 7, 40)]
    corpus = build_corpus(config(tmp_path, JsonlSource(path=write(tmp_path / "a.jsonl", rows), label="label")))
    assert corpus.num_cut == 2  # [CLS] and [SEP] leave room for six
    assert [len(corpus.train[0].document(n)) for n in range(4)] == [3, 8, 8, 8]


BAD = [
    ([{"text": "a", "label": 0}, {"text": "b"}], r"a.jsonl:2: no key 'label'; its keys are 'text'"),
    ([{"text": "a", "label": -1}], r"a.jsonl:1: 'label' must be a label: a whole number from 0"),
    ([{"text": "a", "label": 0.5}], r"a.jsonl:1: 'label' must be a label"),
    ([{"text": "a", "label": True}], r"a.jsonl:1: 'label' must be a label"),
    ([{"text": "a", "label": None}], r"a.jsonl:1: 'label' must be a label"),
    ([{"text": "a", "label": 0}, {"text": "b", "label": "yes"}], r"all whole numbers or all strings; .* 0 and 'yes'"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_labels_that_are_none(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        build_corpus(config(tmp_path, JsonlSource(path=write(tmp_path / "a.jsonl", rows), label="label")))


def test_sources_that_do_not_fit_the_task(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a source of kind text does not have; use one of kind jsonl or parquet"):
        build_corpus(config(tmp_path, TextSource(path=str(tmp_path))))
    with pytest.raises(ValueError, match=r"which a source of kind jsonl gives with `label: KEY`"):
        build_corpus(config(tmp_path, JsonlSource(path="x.jsonl")))
    with pytest.raises(ValueError, match=r"kind jsonl names a label or a second text, which the task language_model"):
        build_corpus(DataConfig(sources=(JsonlSource(path="x.jsonl", label="y"),), tokenizer=ByteTokenizer()))
