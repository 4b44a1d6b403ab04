"""Batches of each step's own shape: rows cut short or into pieces, by a curriculum, on any number of processes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import DifficultyConfig, FixedLinear
from dsjax.data.corpus.store import TokenStore
from dsjax.data.curriculum.draw import Curriculum
from dsjax.data.rows.labels import LabelledFormat
from dsjax.data.rows.masked import MaskedFormat, Masker
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.packed import PackedFormat
from dsjax.data.rows.pipeline import Batches, longest_row
from dsjax.data.rows.shape import BatchShape

quick = settings(deadline=None, max_examples=25)


def rows_of(sizes, length, kind=PackedFormat, **options):
    tokens = np.arange(1, sum(sizes) + 1, dtype=np.uint16)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    classes = np.zeros((len(sizes), 3), np.int32) if kind is LabelledFormat else None
    store = TokenStore(tokens=tokens, offsets=offsets, hash="s" * 64, classes=classes)
    return Rows([store], kind(sequence_length=length, **options), seed=4)


def read(rows, num_steps, **options):
    with Batches(rows, **options) as batches:
        return [next(batches) for _ in range(num_steps)]


def equal(left, right):
    return set(left) == set(right) and all(np.array_equal(left[key], right[key]) for key in left)


@quick
@given(
    st.lists(st.integers(2, 40), min_size=3, max_size=20),
    st.integers(4, 16),
    st.integers(1, 5),
    st.booleans(),
    st.data(),
)
def test_rows_are_cut_short(sizes, length, batch_size, isolate, data):
    rows = rows_of(sizes, length, isolate_documents=isolate)
    width = data.draw(st.integers(1, length))
    kept = data.draw(st.integers(1, width))
    shapes = [BatchShape(batch_size, kept, width), BatchShape(batch_size, length, length)]
    found = read(rows, 2, batch_size=batch_size, shape_at=lambda step: shapes[step % 2], start_step=6)
    assert [step for step, _ in found] == [6, 7]
    whole = [rows.rows(step * batch_size + np.arange(batch_size)) for step in (6, 7)]
    assert equal(found[1][1], whole[1])
    for key, value in found[0][1].items():
        assert value.shape == (batch_size, width) and value.dtype == whole[0][key].dtype
        for row in range(batch_size):
            assert value[row].tolist() == whole[0][key][row].tolist()[:kept] + [0] * (width - kept)


@quick
@given(
    st.lists(st.integers(2, 40), min_size=3, max_size=20),
    st.integers(4, 16),
    st.integers(1, 6),
    st.booleans(),
    st.data(),
)
def test_rows_are_cut_into_pieces(sizes, length, batch_size, isolate, data):
    rows = rows_of(sizes, length, isolate_documents=isolate)
    piece = data.draw(st.integers(1, length))
    all_rows = batch_size * (length // piece)
    num_rows = data.draw(st.integers(all_rows - batch_size + 1, all_rows))  # the last may be left out
    stride = length // (length // piece)
    width = data.draw(st.integers(piece, length))
    hosts = min(num_rows, data.draw(st.sampled_from([1, 2, 4])))
    expected, whole = {}, rows.rows(5 * batch_size + np.arange(batch_size))
    for key, value in whole.items():
        pieces = [row[n * stride :][:piece].tolist() for row in value for n in range(length // piece)]
        expected[key] = [some + [0] * (width - piece) for some in pieces[:num_rows]]
    assert len(pieces) == all_rows
    for host in range(hosts):
        ((_, batch),) = read(
            rows,
            1,
            batch_size=batch_size,
            start_step=5,
            shape_at=lambda _: BatchShape(num_rows, piece, width),
            positions_of=lambda n, host=host: np.arange(n)[host::hosts],
        )
        assert {key: value.tolist() for key, value in batch.items()} == {
            key: value[host::hosts] for key, value in expected.items()
        }


def test_the_rows_of_a_curriculum_with_their_own_masks():
    mask = {"mask_token": 0, "ordinary": np.arange(400) > 0, "share": 0.5, "seed": 2}
    rows = rows_of([7] * 40, 7, MaskedFormat, masker=Masker(**mask))
    growth = DifficultyConfig(metric="a", min=20, max=100, schedule=FixedLinear(steps=30, quantum=1))
    order = Curriculum({"a": np.arange(rows.num_rows)}, [growth], batch_size=4, seed=1)
    found = read(rows, 12, batch_size=4, order=order, start_step=3)
    for step, batch in found:
        draws = step * 4 + np.arange(4)
        plain = rows.read(np.zeros(4, np.int64), order.rows(draws))
        assert equal(batch, Masker(**mask).training(plain, draws))
        halves = [
            read(
                rows,
                1,
                batch_size=4,
                order=order,
                start_step=step,
                positions_of=lambda n, host=host: np.arange(n)[host::2],
            )[0][1]
            for host in range(2)
        ]
        assert all(equal({k: v[host::2] for k, v in batch.items()}, halves[host]) for host in range(2))


def test_labelled_texts_are_cut_short_but_not_into_pieces():
    rows = rows_of([3, 9, 5, 2], 9, LabelledFormat)
    ((_, batch),) = read(rows, 1, batch_size=4, shape_at=lambda _: BatchShape(4, 4, 6))
    assert batch["tokens"].shape == (4, 6) and not batch["tokens"][:, 4:].any() and batch["labels"].shape == (4,)
    assert batch["loss_mask"].all() and (batch["segments"].sum(axis=1) == [min(4, n) for n in _lengths(rows)]).all()
    with pytest.raises(
        ValueError, match=r"labelled texts cannot be cut into pieces: use curriculum.length.mode = trunc"
    ):
        read(rows, 1, batch_size=4, shape_at=lambda _: BatchShape(8, 4, 4))


def _lengths(rows):
    return (rows.rows(np.arange(4))["tokens"] > 0).sum(axis=1).tolist()


@quick
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(2, 12), st.integers(1, 4), st.integers(0, 9))
def test_the_longest_row_of_a_step(sizes, length, batch_size, step):
    rows = rows_of(sizes, length, pack="none")
    _, mask = rows.plain(np.arange(rows.num_rows))
    longest = longest_row(mask.sum(axis=1), rows.numbers, batch_size=batch_size)
    batch = rows.rows(step * batch_size + np.arange(batch_size))
    assert longest(step) == batch["loss_mask"].sum(axis=1).max()  # nothing but padding has no target


@pytest.mark.parametrize("options", [{"pack": "stream"}, {"isolate_documents": False}, {"kind": LabelledFormat}])
def test_plain_rows_say_where_tokens_are(options):
    rows = rows_of([3, 9, 5, 2, 4], 9, **options)
    tokens, mask = rows.plain(np.arange(rows.num_rows)[::-1])
    assert np.array_equal(tokens > 0, mask)  # no document holds the token 0


def test_numbers_run_over_all_sources():
    a, b = rows_of([5] * 6, 4), rows_of([9] * 5, 4)
    stores = [a._readers[0]._store, b._readers[0]._store]
    rows = Rows(stores, PackedFormat(sequence_length=4), seed=1)
    draws = np.arange(64)
    assert equal(rows.drawn(draws, rows.numbers(draws)), rows.rows(draws))
    assert set(rows.numbers(draws).tolist()) == set(range(rows.num_rows))
