"""Rows and batches: every pair once an epoch, random access equal to reading on, mixtures, threads that end."""

import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.labels import LabelledFormat
from dsjax.data.rows.masked import MaskedFormat, Masker
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.packed import PackedFormat
from dsjax.data.rows.pipeline import Batches, FixedBatches

quick = settings(deadline=None, max_examples=50)
END = 0


def store_of(sizes, *, base=1, name="s"):
    """Documents of distinct tokens, each ending with END, so that every token tells where it is from."""
    tokens, value = [], base
    for size in sizes:
        tokens += [*range(value, value + size - 1), END]
        value += size
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return TokenStore(tokens=np.array(tokens, np.uint32), offsets=offsets, hash=name * 64)


def pairs_of(batch):
    mask = batch["loss_mask"]
    return sorted(zip(batch["tokens"][mask].tolist(), batch["targets"][mask].tolist(), strict=True))


def pairs_in(store):
    documents = [store.document(n).tolist() for n in range(store.num_documents)]
    return sorted(pair for document in documents for pair in itertools.pairwise(document))


@quick
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=25),
    st.integers(2, 12),
    st.sampled_from(["best_fit", "stream", "none"]),
    st.booleans(),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_pair_once(sizes, length, pack, isolate, epoch):
    store = store_of(sizes)
    rows = Rows([store], PackedFormat(sequence_length=length, pack=pack, isolate_documents=isolate), seed=9)
    batch = rows.rows(epoch * rows.num_rows + np.arange(rows.num_rows))
    expected = pairs_in(store)
    if pack == "stream" and not isolate:
        expected = sorted(zip(store.tokens[:-1].tolist(), store.tokens[1:].tolist(), strict=True))
    assert pairs_of(batch) == expected
    assert all(value.shape == (rows.num_rows, length) for value in batch.values())
    assert not batch["tokens"][~batch["loss_mask"]].any() and not batch["targets"][~batch["loss_mask"]].any()
    assert {key: value.dtype.name for key, value in batch.items() if key != "loss_mask"} == dict.fromkeys(
        set(batch) - {"loss_mask"}, "int32"
    )
    assert ("segments" in batch) == ("positions" in batch) == (isolate and pack != "none")
    if "segments" in batch:
        check_segments(batch)


def check_segments(batch):
    for tokens, segments, positions, mask in zip(
        batch["tokens"], batch["segments"], batch["positions"], batch["loss_mask"], strict=True
    ):
        count = segments.max()
        assert np.array_equal(mask, segments > 0) and np.array_equal(np.unique(segments[mask]), 1 + np.arange(count))
        assert (np.diff(segments[mask]) >= 0).all() and not positions[~mask].any()
        for number in range(1, count + 1):
            piece = segments == number
            assert positions[piece].tolist() == list(range(piece.sum()))
            assert (np.diff(tokens[piece]) == 1).all()  # one document's tokens, in order


def test_best_fit_that_runs_on_keeps_the_separators():
    store = store_of([4, 4])
    batch = Rows([store], PackedFormat(sequence_length=8, isolate_documents=False)).rows(np.arange(1))
    tokens = batch["tokens"][0].tolist()
    assert sorted([tokens[:4], tokens[4:]]) == [[1, 2, 3, END], [5, 6, 7, END]]
    assert batch["loss_mask"][0].tolist() == [True, True, True, False] * 2


@quick
@given(
    st.lists(st.integers(2, 20), min_size=1, max_size=12),
    st.lists(st.integers(2, 20), min_size=1, max_size=12),
    st.sampled_from([(1.0, 1.0), (3.0, 1.0), (0.7, 0.3), (1.0, 1e-6), (0.123456789, 1.0)]),
    st.integers(1, 7),
    st.integers(0, 2**31),
    st.data(),
)
def test_random_access_is_reading_on(a, b, weights, batch_size, seed, data):
    stores = [store_of(a), store_of(b, base=1000, name="t")]

    def fresh():
        return Rows(stores, PackedFormat(sequence_length=5), weights=weights, seed=seed)

    draws = data.draw(st.integers(0, 2000)) * batch_size + np.arange(40 * batch_size)
    whole = fresh().rows(draws)
    order = data.draw(st.permutations(range(len(draws) // batch_size)))
    again = fresh()
    for step in order:
        chosen = slice(step * batch_size, (step + 1) * batch_size)
        for key, value in again.rows(draws[chosen]).items():
            assert np.array_equal(value, whole[key][chosen])


def test_epochs_are_different_permutations_that_follow_the_seed():
    store = store_of([6] * 30)
    orders = [
        Rows([store], PackedFormat(sequence_length=5), seed=seed).locate(np.arange(90))[1].reshape(3, 30)
        for seed in (1, 1, 2)
    ]
    assert all(sorted(epoch.tolist()) == list(range(30)) for order in orders for epoch in order)
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    assert len({tuple(epoch) for epoch in orders[0].tolist()}) == 3


@pytest.mark.parametrize(
    ("weights", "block", "counts"),
    [((1, 1), 256, (128, 128)), ((3, 1), 256, (192, 64)), ((0.7, 0.2, 0.1), 260, (182, 52, 26)), ((5,), 256, (256,))],
)
def test_mixtures_follow_the_weights_exactly_in_every_block(weights, block, counts):
    stores = [store_of([3] * (5 + n), base=1000 * n + 1, name=str(n)) for n in range(len(weights))]
    rows = Rows(stores, PackedFormat(sequence_length=2), weights=weights, seed=3)
    sources, where = rows.locate(np.arange(20 * block))
    for part in sources.reshape(20, block):
        assert tuple(np.bincount(part, minlength=len(weights))) == counts
    for number in range(len(weights)):
        mine, size = where[sources == number], 5 + number
        whole = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(whole, axis=1) == np.arange(size)).all()


def test_weights_without_a_small_denominator_are_nearest():
    stores = [store_of([3] * 5000), store_of([3] * 5000, name="t")]
    rows = Rows(stores, PackedFormat(sequence_length=2), weights=(np.pi, np.e))
    sources, _ = rows.locate(np.arange(1 << 16))
    assert abs((sources == 0).mean() - np.pi / (np.pi + np.e)) <= 1 / 65536


def test_bad_stores_and_weights():
    store = store_of([3] * 5)
    with pytest.raises(ValueError, match="two tokens"):
        Rows([store_of([1])], PackedFormat(sequence_length=4))
    with pytest.raises(ValueError, match="as many weights"):
        Rows([store], PackedFormat(sequence_length=4), weights=(1, 2))
    with pytest.raises(ValueError, match="above 0"):
        Rows([store, store], PackedFormat(sequence_length=4), weights=(1, 0))


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_from_any_step_are_the_rows_of_that_step(threads):
    rows = Rows([store_of([9] * 40)], PackedFormat(sequence_length=4), seed=1)
    positions = np.array([5, 0, 2])
    for start in (0, 1, 17):
        with Batches(
            rows, batch_size=6, positions_of=lambda _: positions, threads=threads, start_step=start
        ) as batches:
            for step in range(start, start + 30):  # several epochs
                found, batch = next(batches)
                expected = rows.rows(step * 6 + positions)
                assert found == step and all(np.array_equal(batch[key], expected[key]) for key in expected)


def test_closing_ends_the_threads():
    rows = Rows([store_of([9] * 40)], PackedFormat(sequence_length=4))
    before = set(threading.enumerate())
    batches = Batches(rows, batch_size=6, threads=3)
    next(batches)
    ours = set(threading.enumerate()) - before
    assert ours
    batches.close()
    for thread in ours:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in ours)


def test_an_error_in_a_thread_reaches_the_reader(monkeypatch):
    rows = Rows([store_of([9] * 4)], PackedFormat(sequence_length=4))
    monkeypatch.setattr(rows, "rows", lambda draws: (_ for _ in ()).throw(OSError("the disk went away")))
    with Batches(rows, batch_size=2) as batches, pytest.raises(OSError, match="went away"):
        next(batches)


def test_fixed_batches_are_the_same_rows_each_time_padded():
    rows = Rows([store_of([9] * 20), store_of([9] * 3, base=1000, name="t")], PackedFormat(sequence_length=4))
    assert rows.num_rows == 46
    everything = FixedBatches(rows, batch_size=8)
    batches = list(everything)
    assert len(batches) == len(everything) == 6 and everything.num_rows == 46
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    assert joined["tokens"].shape == (48, 4)
    assert not joined["loss_mask"][46:].any() and joined["loss_mask"][:46].any(axis=1).all()
    assert pairs_of(joined) == sorted(pairs_in(store_of([9] * 20)) + pairs_in(store_of([9] * 3, base=1000)))
    for first, second in zip(batches, everything, strict=True):
        assert all(np.array_equal(first[key], second[key]) for key in first)
    few = FixedBatches(rows, batch_size=8, num_rows=11, positions=np.array([1, 7]))
    for number, batch in enumerate(few):
        assert all(np.array_equal(batch[k][0], batches[number][k][1]) for k in batch)
        assert np.array_equal(batch["tokens"][1], batches[number]["tokens"][7]) == (number == 0)
    assert not batch["loss_mask"][1].any() and len(few) == 2
    assert list(FixedBatches(None, batch_size=8)) == [] and len(FixedBatches(None, batch_size=8)) == 0


MASKER = Masker(mask_token=9, ordinary=np.ones(64, bool), share=0.5, seed=0)
FORMATS = {
    "best_fit": PackedFormat(sequence_length=5),
    "none": PackedFormat(sequence_length=5, pack="none"),
    "together": PackedFormat(sequence_length=5, isolate_documents=False),
    "masked": MaskedFormat(sequence_length=5, masker=MASKER),
    "masked apart": MaskedFormat(sequence_length=5, pack="none", masker=MASKER),
    "labelled": LabelledFormat(sequence_length=5),
    "pairs": LabelledFormat(sequence_length=5, with_pairs=True),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_foretells_the_arrays_that_it_reads(kind):
    store = dataclasses.replace(store_of([5] * 6), classes=np.zeros((6, 3), np.int32))
    rows = Rows([store], FORMATS[kind])
    spec = {name: (array.shape, array.dtype) for name, array in FORMATS[kind].spec((3,)).items()}
    for batch in (rows.rows(np.arange(3)), rows.fixed(np.arange(3))):
        assert {name: (value.shape, value.dtype) for name, value in batch.items()} == spec
    assert FORMATS[kind].spec((2, 1, 3))["tokens"].shape == (2, 1, 3, 5)


@pytest.mark.parametrize("kind", ["best_fit", "none", "masked", "labelled"])
def test_a_process_without_rows_in_the_last_batch_pads_like_the_others(kind):
    """Its share of a batch lies behind the last row."""
    store = store_of([5] * 6)
    if kind == "labelled":
        store = dataclasses.replace(store, classes=np.zeros((6, 3), np.int32))
    rows = Rows([store], FORMATS[kind])
    size = rows.num_rows + 3
    (whole,) = FixedBatches(rows, batch_size=size)
    (share,) = FixedBatches(rows, batch_size=size, positions=np.arange(rows.num_rows, size))
    assert share.keys() == whole.keys() and "tokens" in share
    for key, value in share.items():
        assert value.dtype == whole[key].dtype and value.shape == (3, *whole[key].shape[1:]) and not value.any()


def test_packing_many_documents_is_fast():
    sizes = np.clip(np.random.default_rng(0).lognormal(6, 1.3, 200_000).astype(int), 2, None)
    store = TokenStore(tokens=np.zeros(1, np.uint16), offsets=np.concatenate([[0], np.cumsum(sizes)]), hash="x")
    begin = time.perf_counter()
    rows = Rows([store], PackedFormat(sequence_length=1024))
    assert time.perf_counter() - begin < 5  # 0.15 s when nothing else runs
    assert rows.fill > 0.999
