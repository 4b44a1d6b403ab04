"""Which row each draw takes: never too difficult, no row twice in an epoch of its cluster, in proportion, no state."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data import Curriculum
from dsjax.data.config import (
    CurriculumConfig,
    CustomSchedule,
    DataConfig,
    DifficultyConfig,
    FixedDiscrete,
    FixedLinear,
    FixedRoot,
    LengthConfig,
    TextSource,
)
from dsjax.data.curriculum.difficulty import difficulty
from dsjax.data.curriculum.draw import check_curriculum
from dsjax.data.rows.permute import permute, permute_each

quick = settings(deadline=None, max_examples=40)
METRICS = ("a", "b")


def up_and_down(step: int) -> int:
    """A schedule that goes back: 5, 50, 20, 80, 100, 10, ..."""
    return (5, 50, 20, 80, 100, 10)[(step - 1) // 3 % 6]


@st.composite
def growths(draw, metric, top):
    """Any way of growing, by percentile or by value."""
    by = draw(st.sampled_from(["percentile", "value"]))
    least, most = sorted(draw(st.lists(st.integers(1, 100 if by == "percentile" else top), min_size=2, max_size=2)))
    kinds = [
        FixedLinear(steps=draw(st.integers(1, 60)), quantum=1),
        FixedRoot(steps=draw(st.integers(1, 60)), degree=draw(st.integers(1, 3))),
        FixedDiscrete(difficulties=(least, most), until=(draw(st.integers(1, 40)),)),
        CustomSchedule(function=f"{__name__}.up_and_down"),
    ]
    return DifficultyConfig(metric=metric, by=by, min=least, max=most, schedule=draw(st.sampled_from(kinds)))


@st.composite
def curricula(draw):
    """Values of 1-2 metrics with many ties, how they grow, and a batch size."""
    num_rows, top = draw(st.integers(1, 60)), draw(st.integers(1, 30))
    values = {metric: np.array(draw(st.lists(st.integers(0, top), min_size=num_rows, max_size=num_rows)))
              for metric in METRICS}  # fmt: skip
    configs = [draw(growths(metric, top)) for metric in METRICS[: draw(st.integers(1, 2))]]
    return values, configs, draw(st.integers(1, 9)), draw(st.integers(0, 2**31))


def visible_sets(values, configs, num_steps):
    """The rows that may be drawn at each step, by sorting and comparing only."""
    easy = []
    for config in configs:
        at = values[config.metric]
        reached = difficulty(config.schedule, np.arange(1, num_steps + 1), least=config.min, most=config.max)
        ranked = sorted(range(len(at)), key=lambda row: (at[row], row))
        sets = []
        for d in np.maximum.accumulate(reached).tolist():
            by_value = {row for row in range(len(at)) if at[row] <= d}
            sets.append(by_value if config.by == "value" else set(ranked[: len(at) * d // 100]))
        easy.append(sets)
    return [set.intersection(*each) for each in zip(*easy, strict=True)]


def clusters_of(sets):
    """The step at which each row became visible."""
    first = {}
    for step, rows in enumerate(sets):
        for row in rows:
            first.setdefault(row, step)
    return first


@quick
@given(curricula())
def test_draws_are_visible_and_come_once_an_epoch_of_their_cluster(case):
    values, configs, batch_size, seed = case
    num_steps = 120
    sets = visible_sets(values, configs, num_steps)
    if len(sets[0]) < batch_size:
        with pytest.raises(
            ValueError, match=rf"{len(sets[0])} of \d+ rows may be drawn .* fewer than the {batch_size}"
        ):
            Curriculum(values, configs, batch_size=batch_size, seed=seed)
        return
    curriculum = Curriculum(values, configs, batch_size=batch_size, seed=seed)
    assert [curriculum.visible(step) for step in range(num_steps)] == [len(rows) for rows in sets]
    rows = curriculum.rows(np.arange(num_steps * batch_size)).tolist()
    assert all(row in sets[draw // batch_size] for draw, row in enumerate(rows))
    first = clusters_of(sets)
    for began in set(first.values()):
        members = {row for row in first if first[row] == began}
        drawn = [row for row in rows if first[row] == began]
        for epoch in itertools.batched(drawn, len(members)):
            assert len(set(epoch)) == len(epoch)


@quick
@given(curricula(), st.integers(0, 10**7), st.data())
def test_random_access_is_reading_on_for_any_hosts(case, start, data):
    values, configs, batch_size, seed = case
    try:
        whole = Curriculum(values, configs, batch_size=batch_size, seed=seed)
    except ValueError:
        return
    start = start % 30_000  # blocks end at multiples of 16,384
    draws = start + np.arange(50 * batch_size)
    expected = whole.rows(draws)
    resumed = Curriculum(values, configs, batch_size=batch_size, seed=seed)
    assert np.array_equal(resumed.rows(draws[20 * batch_size :]), expected[20 * batch_size :])
    order = np.array(data.draw(st.permutations(range(50))))
    hosts = data.draw(st.sampled_from([1, 2, 4]))
    fresh = [Curriculum(values, configs, batch_size=batch_size, seed=seed) for _ in range(hosts)]
    for step in order.tolist():
        of_step = slice(step * batch_size, (step + 1) * batch_size)
        parts = [np.arange(batch_size)[host::hosts] for host in range(hosts)]
        batch = np.empty(batch_size, np.int64)
        for host, part in enumerate(parts):
            batch[part] = fresh[host].rows(draws[of_step][part])
        assert np.array_equal(batch, expected[of_step])


def test_clusters_are_drawn_by_their_sizes_and_rows_alike():
    # 100 rows; 40 visible from the first step, 60 more from step 2,500 on.
    growth = DifficultyConfig(
        metric="a", min=40, max=100, schedule=FixedDiscrete(difficulties=(40, 100), until=(2500,))
    )
    curriculum = Curriculum({"a": np.arange(100)}, [growth], batch_size=16, seed=3)
    early, late = curriculum.rows(np.arange(40_000)), curriculum.rows(40_000 + np.arange(60_000))
    assert early.max() == 39 and np.ptp(np.bincount(early)) <= 1  # one cluster: whole epochs
    share = (late < 40).mean()
    assert abs(share - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 60_000)  # four standard deviations of independent draws
    counts = np.bincount(late, minlength=100)
    assert np.ptp(counts[:40]) <= 2 and np.ptp(counts[40:]) <= 1
    runs = np.flatnonzero(np.diff(late < 40))
    assert 2.0 < np.diff(runs).mean() < 2.17  # of independent draws a run has 1/2 (1/0.4 + 1/0.6) = 2.083


@quick
@given(curricula())
def test_every_cluster_is_drawn_in_proportion(case):
    values, configs, batch_size, seed = case
    sets = visible_sets(values, configs, 120)  # what grows has grown by then
    if len(sets[0]) < batch_size:
        return
    curriculum, num_draws = Curriculum(values, configs, batch_size=batch_size, seed=seed), 10_000
    began = clusters_of(sets)
    drawn = Counter(began[row] for row in curriculum.rows(120 * batch_size + np.arange(num_draws)).tolist())
    for cluster, size in Counter(began.values()).items():
        share = size / len(began)
        # Six standard deviations of independent draws: once in 10^9.
        assert abs(drawn[cluster] - num_draws * share) <= 6 * np.sqrt(num_draws * share * (1 - share))


def test_the_seed_and_the_epoch_change_the_order_only():
    growth = DifficultyConfig(metric="a", min=100, max=100, schedule=FixedLinear(steps=1, quantum=1))
    orders = [
        Curriculum({"a": np.arange(50)}, [growth], batch_size=5, seed=seed).rows(np.arange(100)).reshape(2, 50)
        for seed in (1, 1, 2)
    ]
    assert all(sorted(epoch.tolist()) == list(range(50)) for order in orders for epoch in order)
    assert np.array_equal(orders[0], orders[1])
    assert len({tuple(epoch) for epoch in np.concatenate(orders[1:]).tolist()}) == 4


def test_two_metrics_by_hand():
    values = {"a": np.array([1, 2, 3, 4]), "b": np.array([4, 3, 2, 1])}
    two = FixedDiscrete(difficulties=(3, 4), until=(2,))
    configs = [DifficultyConfig(metric=m, by="value", min=3, max=4, schedule=two) for m in METRICS]
    curriculum = Curriculum(values, configs, batch_size=2)
    assert [curriculum.visible(step) for step in range(4)] == [2, 2, 4, 4]
    assert set(curriculum.rows(np.arange(4)).tolist()) == {1, 2}  # by a rows 0-2, by b rows 1-3
    assert set(curriculum.rows(4 + np.arange(200)).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (33, 49), (34, 51), (99, 148), (100, 150)])
def test_percentile_edges_and_ties(percent, expected):
    # floor(150 d / 100); all are equally difficult, so the first rows are the easiest.
    growth = DifficultyConfig(metric="a", min=percent, max=100, schedule=FixedLinear(steps=10**9, quantum=1))
    curriculum = Curriculum({"a": np.zeros(150, np.int64)}, [growth], batch_size=1)
    assert curriculum.visible(0) == expected
    assert set(curriculum.rows(np.arange(expected)).tolist()) == set(range(expected))


def test_value_edges():
    growth = DifficultyConfig(metric="a", by="value", min=5, max=7, schedule=FixedLinear(steps=2, quantum=1))
    curriculum = Curriculum({"a": np.array([5, 6, 7, 8, 4])}, [growth], batch_size=1)
    assert [curriculum.visible(step) for step in (0, 1, 2, 10**6)] == [3, 4, 4, 4]  # the row of 8 is never drawn
    assert set(curriculum.rows(10**7 + np.arange(100)).tolist()) == {0, 1, 2, 4}


def of_100_steps(step: int) -> int:
    """A schedule that knows nothing of what comes after its run."""
    return list(range(1, 101))[step - 1]


def test_a_schedule_is_not_asked_about_steps_after_the_run():
    growth = DifficultyConfig(metric="a", min=1, max=100, schedule=CustomSchedule(function=f"{__name__}.of_100_steps"))
    values = {"a": np.arange(1000)}
    curricula = [Curriculum(values, [growth], batch_size=2, num_steps=n) for n in (30, 100)]
    assert [[c.visible(step) for step in (0, 28, 29, 30, 99, 10**6)] for c in curricula] == [
        [10, 290, 300, 300, 300, 300],
        [10, 290, 300, 310, 1000, 1000],
    ]
    assert np.array_equal(*(c.rows(np.arange(60)) for c in curricula))
    with pytest.raises(IndexError):
        Curriculum(values, [growth], batch_size=2)


def test_resuming_far_into_a_run():
    growth = DifficultyConfig(metric="a", min=1, max=100, schedule=FixedRoot(steps=20_000))
    values = {"a": np.arange(10_000)}
    far = Curriculum(values, [growth], batch_size=64).rows(np.arange(2_000_000, 2_000_064))
    near = Curriculum(values, [growth], batch_size=64)
    for step in range(0, 2_000_000 // 64, 97):
        near.rows(step * 64 + np.arange(64))
    assert np.array_equal(near.rows(np.arange(2_000_000, 2_000_064)), far)


@quick
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 2**63)), min_size=1, max_size=20), st.data())
def test_permute_each_is_permute(domains, data):
    indices = [data.draw(st.integers(0, size - 1)) for size, _ in domains]
    expected = [int(permute(np.array([i]), size, key=key)[0]) for i, (size, key) in zip(indices, domains, strict=True)]
    sizes, keys = zip(*domains, strict=True)
    # As uint64 from the start: of integers on both sides of 2**63 numpy makes float64, which rounds them.
    assert permute_each(np.array(indices), np.array(sizes), keys=np.array(keys, np.uint64)).tolist() == expected


def one(**changes):
    return DifficultyConfig(**{"metric": "a", "schedule": FixedLinear(steps=5, quantum=1)} | changes)


@pytest.mark.parametrize(
    ("values", "configs", "batch_size", "message"),
    [
        ({"b": np.arange(9)}, [one()], 1, r"no difficulties for the metric 'a'; there are \['b'\]"),
        ({"a": np.arange(9.0)}, [one()], 1, r"difficulties by a must be whole numbers, one a row; got float64 \(9,\)"),
        ({"a": np.zeros((3, 3), int)}, [one()], 1, r"one a row; got int64 \(3, 3\)"),
        ({"a": np.zeros(0, int)}, [one()], 1, r"got \[0\] rows"),
        ({"a": np.arange(9), "b": np.arange(8)}, [one(), one(metric="b")], 1, r"got \[8, 9\] rows for the 2 metrics"),
        ({"a": np.arange(9)}, [], 1, "got .* for the 0 metrics"),
        (
            {"a": np.arange(250)},
            [one(min=2, schedule=FixedLinear(steps=1000, quantum=1))],
            8,
            r"5 of 250 rows may be drawn at the first step \(a up to 2 percent\), fewer than the 8 of a batch: "
            r"raise min to 4, or take a smaller batch or more data",
        ),
        ({"a": np.arange(9)}, [one(by="value", max=100, schedule=FixedRoot(steps=1000))], 8, "raise min to 7, or"),
        (
            {"a": np.arange(250)},
            [one(max=6, schedule=FixedLinear(steps=1000, quantum=1))],
            30,
            "raise min to 12 and max to 12 or more, or",
        ),
        (
            {"a": np.arange(250)},
            [one(schedule=FixedDiscrete(difficulties=(2, 100), until=(5,)))],
            30,
            "make the first of difficulties 12 or more, or",
        ),
    ],
)
def test_one_clear_message(values, configs, batch_size, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(values, configs, batch_size=batch_size)


@quick
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 9), st.integers(1, 80),
    st.sampled_from(["value", "percentile"]), st.sampled_from([FixedLinear, FixedRoot]),
)  # fmt: skip
def test_the_way_out_is_one(values, quantum, batch_size, by, kind):
    """A min that is advised is enough."""
    values, schedule = {"a": np.array(values)}, kind(steps=1000, quantum=quantum)
    try:
        Curriculum(values, [one(by=by, min=quantum, schedule=schedule)], batch_size=batch_size)
    except ValueError as error:
        advised = re.search(r"raise min to (\d+)(?: and max to (\d+))?", str(error))
        if advised is None:
            assert batch_size > len(values["a"]) or "take a smaller quantum" in str(error)
        else:
            least, most = int(advised[1]), int(advised[2] or 100)
            Curriculum(values, [one(by=by, min=least, max=most, schedule=schedule)], batch_size=batch_size)


def test_what_does_not_fit_the_data():
    sources = (TextSource(path="a"), TextSource(path="b", weight=2.0))
    with pytest.raises(ValueError, match=r"weights \[1.0, 2.0\], but curriculum.difficulty draws rows by their diff"):
        check_curriculum(CurriculumConfig(difficulty=(one(),)), DataConfig(sources=sources))
    lengths = LengthConfig(mode="reshape", min=64, max=512, schedule=FixedLinear(steps=5))
    check_curriculum(CurriculumConfig(length=lengths), DataConfig(sources=sources))
    with pytest.raises(ValueError, match=r"a labelled text is one row: use mode: truncate"):
        check_curriculum(CurriculumConfig(length=lengths), DataConfig(task="classification"))
