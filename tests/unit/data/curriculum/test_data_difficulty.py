"""Schedules against DeepSpeed: values of its unit tests and recipes, its formula in plain Python at every step."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import (
    CurriculumConfig,
    CustomSchedule,
    DifficultyConfig,
    FixedDiscrete,
    FixedLinear,
    FixedRoot,
    LengthConfig,
)
from dsjax.data.curriculum.difficulty import difficulty

LINEAR = FixedLinear(steps=10, quantum=1)


def at(schedule, steps, least, most):
    return difficulty(schedule, np.array(steps, np.int64), least=least, most=most).tolist()


def test_the_values_of_deepspeeds_own_tests():
    assert at(FixedLinear(steps=8, quantum=2), range(1, 11), 2, 10) == [2, 4, 4, 6, 6, 8, 8, 10, 10, 10]
    discrete = FixedDiscrete(difficulties=(1, 2, 3, 4, 5), until=(2, 4, 6, 8))
    assert at(discrete, range(1, 10), 1, 5) == [1, 1, 2, 2, 3, 3, 4, 4, 5]


def test_the_recipes_of_gpt3():
    truncate = {447: 80, 448: 88, 1000: 96, 55_000: 1064, 109_999: 2040, 110_000: 2048, 10**9: 2048}
    assert at(FixedLinear(steps=110_000, quantum=8), list(truncate), 80, 2048) == list(truncate.values())
    rarity = {11: 1, 45: 3, 1100: 10, 11_000: 32, 27_500: 50, 55_000: 71, 110_000: 100, 10**9: 100}
    assert at(FixedRoot(steps=110_000), list(rarity), 1, 100) == list(rarity.values())


def test_the_edges_are_upstreams():
    # A least value that is no multiple of the quantum: the first difficulties are below it.
    hundreds = FixedLinear(steps=1000, quantum=16)
    assert at(hundreds, [1, 13, 14, 1000], 100, 1000) == [96, 96, 112, 992]
    # A largest value that is none is reached when the line, which goes on, passes the next multiple.
    assert at(hundreds, [1008, 1009, 10**6], 100, 1000) == [992, 1000, 1000]
    vit = FixedLinear(steps=3910, quantum=8)
    assert at(vit, [3910, 3981, 3982, 3983, 10**6], 32, 197) == [192, 192, 197, 197, 197]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5000), st.integers(1, 300), st.integers(0, 3000), st.integers(1, 64), st.integers(1, 4), st.data()
)
def test_the_formula_at_every_step(total, least, more, quantum, degree, data):
    most = least + more
    steps = data.draw(st.lists(st.integers(0, 2 * total), min_size=1, max_size=50))
    schedule = FixedRoot(steps=total, degree=degree, quantum=quantum)
    expected = []
    for step in steps:
        value = math.floor((float(step) / total) ** (1.0 / degree) * (most - least) + least)
        expected.append(min(value - value % quantum, most))
    assert at(schedule, steps, least, most) == expected
    if degree == 1:
        assert at(FixedLinear(steps=total, quantum=quantum), steps, least, most) == expected


def bad(step):
    return {1: 5, 2: 5.0, 3: 0, 4: True}[step]


def test_a_schedule_of_ones_own():
    schedule = CustomSchedule(function=f"{__name__}.bad")
    assert at(schedule, [1], 1, 100) == [5] and at(schedule, [1], 1, 3) == [3]
    for step, shown in ((2, "5.0"), (3, "0"), (4, "True")):
        with pytest.raises(
            ValueError, match=rf"bad\({step}\) gave {shown}; a difficulty must be a whole number from 1"
        ):
            at(schedule, [step], 1, 100)
    for path, message in (
        ("nothing", "cannot import 'nothing'"),
        ("no.such.place", "cannot import 'no.such' of 'no.such.place'"),
        ("math.pi", "'math.pi' names no function"),
        ("math.nothing", "'math' has no 'nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            at(CustomSchedule(function=path), [1], 1, 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLinear(steps=0), "steps and quantum must be 1 or more; got 0 and 8"),
        (lambda: FixedRoot(steps=1, degree=0), "degree must be 1 or more; got 0"),
        (lambda: FixedDiscrete(difficulties=(1, 2), until=()), "until must have one entry less than difficulties"),
        (lambda: FixedDiscrete(difficulties=(), until=()), "one entry less"),
        (lambda: FixedDiscrete(difficulties=(1, 2, 3), until=(5, 5)), r"steps from 1 on that grow; got \[5, 5\]"),
        (lambda: FixedDiscrete(difficulties=(0, 2), until=(5,)), r"difficulties must be 1 or more; got \[0, 2\]"),
        (lambda: DifficultyConfig(min=50, max=20, schedule=LINEAR), "not above max; got min 50 and max 20"),
        (lambda: DifficultyConfig(max=101, schedule=LINEAR), "at most 100 by percentile; got 101; use by: value"),
        (
            lambda: DifficultyConfig(schedule=FixedLinear(steps=9)),
            "min = 1 is rounded down to a multiple of quantum = 8",
        ),
        (lambda: LengthConfig(min=5, schedule=FixedLinear(steps=9)), "use a min of 8 or more, or a smaller quantum"),
        (
            lambda: DifficultyConfig(by="value", schedule=FixedDiscrete(difficulties=(90, 5000), until=(9,))),
            r"difficulties \[90, 5000\] must lie between min = 1 and max = 100",
        ),
        (
            lambda: LengthConfig(schedule=FixedDiscrete(difficulties=(32, 128), until=(9,))),
            r"difficulties \[32, 128\] must not be below min = 64",
        ),
        (CurriculumConfig, "a curriculum needs difficulty, length or cut_to_longest"),
        (
            lambda: CurriculumConfig(difficulty=(DifficultyConfig(schedule=LINEAR),) * 2),
            r"each metric may be given once; got \['vocab_rarity', 'vocab_rarity'\]",
        ),
    ],
)
def test_configs_that_contradict_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
