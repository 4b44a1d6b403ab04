"""Hidden tokens: which, as what, and that they depend on nothing but the draw."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import BPETokenizer, ByteTokenizer, DataConfig, FileTokenizer, JsonlSource
from dsjax.data.corpus.build import build_corpus
from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.masked import MaskedFormat, Masker
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.pack import PackIndex
from tests.wordpiece import CLS, MASK, SEP, tokenizer

VOCAB = 50
ORDINARY = np.arange(VOCAB) >= 5


def make_masker(share=0.15, seed=0):
    return Masker(mask_token=MASK, ordinary=ORDINARY, share=share, seed=seed)


def make_batch(tokens, real):
    return {"tokens": tokens * real, "targets": tokens * real, "loss_mask": real, "segments": real.astype(np.int32)}


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 40), st.floats(0.01, 0.99))
def test_only_ordinary_real_tokens_are_hidden_and_the_rest_stays(data, rows, length, share):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tokens, real = rng.integers(0, VOCAB, (rows, length)), rng.random((rows, length)) < 0.8
    batch = make_batch(tokens, real)
    draws = rng.integers(0, 2**40, rows)
    masked = make_masker(share).training(batch, draws)
    hidden = masked["loss_mask"]
    assert not (hidden & ~(real & ORDINARY[tokens])).any()
    assert (masked["tokens"] == np.where(hidden, masked["tokens"], batch["tokens"])).all()
    assert (masked["targets"] == np.where(hidden, tokens, 0)).all()
    shown = masked["tokens"][hidden]
    assert (ORDINARY[shown] | (shown == MASK)).all()
    assert masked["tokens"].dtype == masked["targets"].dtype == np.int32 and hidden.dtype == bool
    # A row's own draw decides, not the rows beside it.
    for place in range(rows):
        one = slice(place, place + 1)
        alone = make_masker(share).training({key: value[one] for key, value in batch.items()}, draws[one])
        assert all(np.array_equal(alone[key][0], masked[key][place]) for key in masked)


def test_the_shares_are_those_of_the_paper():
    tokens = np.random.default_rng(0).integers(5, VOCAB, (500, 400))
    masked = make_masker().training(make_batch(tokens, tokens > 0), np.arange(500))
    hidden = masked["loss_mask"]
    # 200,000 independent draws: a standard deviation is 0.0008 for 15%, 0.0024 of the hidden ones for 80%.
    assert abs(hidden.mean() - 0.15) < 0.004
    shown, true = masked["tokens"][hidden], tokens[hidden]
    others = VOCAB - 5
    assert abs((shown == MASK).mean() - 0.8) < 0.012
    assert abs((shown == true).mean() - (0.1 + 0.1 / others)) < 0.009
    assert len(np.unique(shown[(shown != MASK) & (shown != true)])) == others
    # Neither neighbours nor rows one after the other are hidden together more than by chance.
    for shifted in (hidden[:, 1:] & hidden[:, :-1], hidden[1:] & hidden[:-1]):
        assert abs(shifted.mean() - 0.15**2) < 0.002


def test_another_epoch_or_seed_hides_others_and_validation_never_changes():
    tokens = np.full((4, 200), 9)
    batch = make_batch(tokens, tokens > 0)
    one = make_masker().training(batch, np.arange(4))["loss_mask"]
    assert np.array_equal(one, make_masker().training(batch, np.arange(4))["loss_mask"])
    assert not np.array_equal(one, make_masker().training(batch, np.arange(4, 8))["loss_mask"])
    assert not np.array_equal(one, make_masker(seed=1).training(batch, np.arange(4))["loss_mask"])
    fixed = [make_masker(seed=seed).fixed(batch, np.arange(4))["loss_mask"] for seed in (0, 1)]
    assert np.array_equal(*fixed) and not np.array_equal(fixed[0], one)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.integers(2, 16),
    st.sampled_from(["best_fit", "stream", "none"]),
    st.booleans(),
)
def test_every_token_is_an_input_once(sizes, length, pack, isolate):
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    index = PackIndex.build(offsets, length, pack=pack, isolate_documents=isolate, all_tokens=True)
    seen = [
        (document, at)
        for document, start, count in index.pieces.tolist()
        for at in range(start, start + count)
    ]  # fmt: skip
    assert sorted(seen) == [(document, at) for document, size in enumerate(sizes) for at in range(size)]


@pytest.mark.parametrize("pack", ["best_fit", "stream", "none"])
def test_padding_is_never_seen_and_places_count_in_the_document(pack):
    tokens = np.array([CLS, 7, 8, SEP, CLS, 9, SEP])
    store = TokenStore(tokens=tokens, offsets=np.array([0, 4, 7]), hash="x")
    for isolate in (True, False):
        rows = Rows(
            [store], MaskedFormat(sequence_length=5, pack=pack, isolate_documents=isolate, masker=make_masker(0.5))
        )
        batch = rows.rows(np.arange(rows.num_rows))
        real = batch["segments"] > 0
        assert real.sum() == 7 and not batch["loss_mask"][~real].any()
        if "positions" in batch:
            starts = np.diff(np.pad(batch["segments"], ((0, 0), (1, 0))), axis=1) != 0
            assert (batch["positions"][starts & real] == 0).all()


def test_documents_are_framed_and_a_mask_token_is_needed(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"film {n}"}) + "\n" for n in range(9)))
    tokenizer().save(tmp_path / "tokenizer")
    made = DataConfig(
        sources=(JsonlSource(path=str(tmp_path / "a.jsonl")),),
        tokenizer=FileTokenizer(path=str(tmp_path / "tokenizer")),
        task="masked",
        sequence_length=8,
        validation_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )
    corpus = build_corpus(made)
    ends = [(int(document[0]), int(document[-1])) for document in map(corpus.train[0].document, range(9))]
    assert set(ends) == {(CLS, SEP)}
    with pytest.raises(ValueError, match=r"a tokenizer with a token \[MASK\] or <mask>; the one of kind byte has none"):
        build_corpus(DataConfig(sources=made.sources, tokenizer=ByteTokenizer(), task="masked",
                                validation_fraction=0, cache_dir=made.cache_dir))  # fmt: skip
    trained = DataConfig(sources=made.sources, tokenizer=BPETokenizer(vocab_size=260), task="masked",
                         validation_fraction=0, cache_dir=made.cache_dir)  # fmt: skip
    corpus = build_corpus(trained)
    assert corpus.tokenizer.mask_token == 1 and not (corpus.train[0].tokens == 1).any()
    assert corpus.tokenizer.decode(corpus.train[0].document(0)) == "film 0"
