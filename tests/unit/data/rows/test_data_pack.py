"""Packing against brute force: every pair of every document once, no row too long, a fill that best fit deserves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.corpus.store import TokenStore
from dsjax.data.rows.pack import PackIndex
from dsjax.data.rows.packed import PackedRows
from dsjax.data.rows.permute import fold, mix, permute

quick = settings(deadline=None, max_examples=80)
sizes_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@quick
@given(sizes_of_documents, st.integers(1, 17), st.sampled_from(["best_fit", "stream", "none"]), st.booleans())
def test_every_input_is_in_exactly_one_row(sizes, length, pack, isolate):
    offsets = offsets_of(sizes)
    index = PackIndex.build(offsets, length, pack=pack, isolate_documents=isolate)
    seen = [
        (int(piece["document"]), int(piece["start"]) + n) for piece in index.pieces for n in range(int(piece["length"]))
    ]
    ends = 1 if pack == "none" or isolate else 0
    expected = [(d, n) for d, size in enumerate(sizes) for n in range(size - ends)]
    if pack == "stream" and not isolate:
        expected.remove((len(sizes) - 1, sizes[-1] - 1))
    assert sorted(seen) == expected
    per_row = np.array([index.pieces["length"][a:b].sum() for a, b in zip(index.rows, index.rows[1:], strict=False)])
    assert (per_row <= length).all() and (per_row > 0).all()
    if pack == "stream":
        assert seen == expected and (per_row[:-1] == length).all()
    if pack == "none":
        assert index.num_rows == len(index.pieces)


@settings(deadline=None, max_examples=200)
@given(
    sizes_of_documents, st.integers(1, 17), st.sampled_from(["best_fit", "stream", "none"]), st.booleans(),
    st.booleans(), st.data(),
)  # fmt: skip
def test_rows_are_their_pieces_copied_one_by_one(sizes, length, pack, isolate, all_tokens, data):
    store = TokenStore(np.arange(1, sum(sizes) + 1, dtype=np.uint16), offsets_of(sizes), hash="x")
    index = PackIndex.build(store.offsets, length, pack=pack, isolate_documents=isolate, all_tokens=all_tokens)
    isolated, ends = isolate and pack != "none", not isolate and pack == "best_fit" and not all_tokens
    reader = PackedRows(store, index, isolated=isolated, mask_ends=ends, all_tokens=all_tokens)
    rows = data.draw(st.lists(st.integers(0, index.num_rows - 1), max_size=8) if index.num_rows else st.just([]))
    blank = lambda: np.zeros((len(rows), length), np.int32)
    wanted = {"tokens": blank(), "targets": blank(), "loss_mask": blank() > 0}
    if isolated or all_tokens:
        wanted["segments"] = blank()
    if isolated:
        wanted["positions"] = blank()
    for i, row in enumerate(rows):
        j = 0
        for number, (document, start, size) in enumerate(index.pieces[index.rows[row] : index.rows[row + 1]].tolist()):
            for place in range(start, start + size):
                at = int(store.offsets[document]) + place
                wanted["tokens"][i, j] = store.tokens[at]
                if not (ends and place + 1 == sizes[document]):
                    wanted["targets"][i, j] = store.tokens[at if all_tokens else at + 1]
                    wanted["loss_mask"][i, j] = True
                if "segments" in wanted:
                    wanted["segments"][i, j] = number + 1 if isolated else 1
                if "positions" in wanted:
                    wanted["positions"][i, j] = place - start
                j += 1
    found = reader.read(np.array(rows, np.int64))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and np.array_equal(found[key], value), key


@quick
@given(sizes_of_documents, st.integers(2, 17))
def test_best_fit_agrees_with_the_textbook(sizes, length):
    index = PackIndex.build(offsets_of(sizes), length)
    pieces = sorted(index.pieces["length"].tolist(), reverse=True)
    rooms: list[int] = []
    for piece in pieces:
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else length) - piece)
    filled = [int(index.pieces["length"][a:b].sum()) for a, b in zip(index.rows, index.rows[1:], strict=False)]
    assert sorted(length - total for total in filled) == sorted(rooms)


def test_rows_do_not_begin_with_their_longest_piece():
    index = PackIndex.build(offsets_of([71, 31] * 200), 100)
    first = index.pieces["length"][index.rows[:-1]]
    assert index.num_rows == 200 and index.fill == 1.0 and 60 < (first == 70).sum() < 140


def test_no_documents():
    for pack in ("best_fit", "stream", "none"):
        for isolate in (True, False):
            index = PackIndex.build(np.zeros(1, np.int64), 8, pack=pack, isolate_documents=isolate)
            assert index.num_rows == 0 and len(index.pieces) == 0 and index.fill == 0


def test_cached_index_is_the_built_one_and_damage_is_named(tmp_path):
    store = TokenStore(tokens=np.zeros(100, np.uint16), offsets=offsets_of([30, 50, 20]), hash="a" * 64)
    options = {"pack": "best_fit", "isolate_documents": True}
    built = PackIndex.build(store.offsets, 16, **options)
    for _ in range(2):
        cached = PackIndex.cached(store, 16, **options, cache_dir=tmp_path)
        assert np.array_equal(cached.rows, built.rows) and np.array_equal(cached.pieces, built.pieces)
    (folder,) = (tmp_path / "packs").iterdir()
    (folder / "pieces.npy").write_bytes((folder / "pieces.npy").read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        PackIndex.cached(store, 16, **options, cache_dir=tmp_path)


@quick
@given(st.integers(1, 300), st.integers(0, 2**64))
def test_permutations_are_bijections_and_random_access(size, key):
    everything = permute(np.arange(size), size, key=key)
    assert sorted(everything.tolist()) == list(range(size))
    assert permute(np.array([size // 2]), size, key=key)[0] == everything[size // 2]


def test_permutations_are_even_and_pinned():
    # 2,400 draws of the 24 orders of 4: 100 each, standard deviation 10; 5 of them either way.
    counts = np.unique([permute(np.arange(4), 4, key=fold(7, key)) for key in range(2400)], axis=0, return_counts=True)[
        1
    ]
    assert len(counts) == 24 and counts.min() > 50 and counts.max() < 150
    # Resuming a run needs the same order for ever: these figures may not change.
    assert permute(np.arange(8), 1000, key=1).tolist() == PINNED
    assert mix(np.arange(2), 3).tolist() == PINNED_HASH


PINNED = [927, 682, 21, 204, 370, 917, 464, 801]
PINNED_HASH = [13604808898340030615, 11553561497916274123]
