"""Learning rates over time: properties of every schedule, and exact values at its corners."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.optimizers.kinds.base import ScheduleConfig
from dsjax.optimizers.schedules import Clocks, learning_rate

PEAK = 3e-4
TOKENS = 4096

schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 40),
    decay=st.integers(0, 150),
    min_ratio=st.sampled_from([0.0, 0.1, 1.0]),
)


def rates(config: ScheduleConfig, steps: int, end: int) -> list[float]:
    ends = Clocks(end, end * TOKENS)
    return [learning_rate(config, PEAK, after=Clocks(n, n * TOKENS), end=ends) for n in range(1, steps + 1)]


@settings(deadline=None, max_examples=150)
@given(schedules, st.integers(1, 100))
def test_up_then_down_then_flat(config, end):
    values = rates(config, 200, end)
    assert all(0 <= value <= PEAK * (1 + 1e-12) for value in values)
    warm, after = values[: max(0, config.warmup - 1)], values[max(0, config.warmup - 1) :]
    assert all(value == pytest.approx(PEAK * (n + 1) / config.warmup) for n, value in enumerate(warm))
    assert all(a >= b - 1e-18 for a, b in itertools.pairwise(after))
    stop = max(config.decay or end, config.warmup + 1)
    floor = PEAK if config.kind == "constant" else PEAK * config.min_ratio
    assert all(value == pytest.approx(floor) for value in values[stop - 1 :])


@settings(deadline=None, max_examples=60)
@given(schedules, st.integers(1, 100))
def test_the_clock_may_be_tokens(config, end):
    """A step of 4,096 tokens each: the same schedule in tokens gives the same rates."""
    in_tokens = ScheduleConfig(
        kind=config.kind,
        warmup=config.warmup * TOKENS,
        warmup_by="tokens",
        decay=config.decay * TOKENS,
        decay_by="tokens",
        min_ratio=config.min_ratio,
    )
    assert rates(in_tokens, 120, end) == pytest.approx(rates(config, 120, end), rel=1e-12)


def test_corners():
    cosine = ScheduleConfig(kind="cosine", warmup=10, min_ratio=0.1)
    values = rates(cosine, 110, 110)
    assert values[0] == pytest.approx(PEAK / 10)
    assert values[9] == PEAK
    assert values[59] == pytest.approx(PEAK * 0.55)
    assert values[109] == pytest.approx(PEAK * 0.1)
    linear = ScheduleConfig(kind="linear", warmup=10, min_ratio=0.0)
    assert rates(linear, 110, 110)[59] == pytest.approx(PEAK * 0.5)


def test_a_warm_up_in_another_unit_leaves_the_decay_alone():
    config = ScheduleConfig(kind="linear", warmup=3 * TOKENS, warmup_by="tokens", min_ratio=0.0)
    values = rates(config, 10, 10)
    assert values[:3] == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK * 0.7])
    assert values[9] == 0


def test_a_schedule_of_no_length():
    """The whole run is warm-up, or ends where the warm-up ends: no division by zero."""
    for kind in ("linear", "cosine"):
        assert rates(ScheduleConfig(kind=kind, warmup=5), 5, 5)[-1] <= PEAK


@pytest.mark.parametrize("bad", [{"warmup": -1}, {"decay": -1}, {"min_ratio": 1.5}, {"min_ratio": -0.1}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="must be"):
        ScheduleConfig(**bad)


def test_exponential_is_the_bert_recipes():
    """The formulas of DeepSpeedExamples' warmup_{linear,exp}_decay_exp, with the constants of bert_large_lamb.json."""
    total, share, rate, every = 7500, 0.06, 0.9, 250

    def recipe(step: int, degree: float) -> float:
        x = step / total
        return (x / share) ** degree if x < share else rate ** ((step - share * total) / every)

    for degree in (1.0, 2.0):
        config = ScheduleConfig(
            kind="exponential", warmup=450, warmup_power=degree, decay_rate=rate, decay_every=every, min_ratio=0,
            offset=10e-4,
        )  # fmt: skip
        wanted = [11e-3 * recipe(step, degree) + 10e-4 for step in range(1, 6001)]
        found = [learning_rate(config, 11e-3, after=Clocks(step), end=Clocks(6000)) for step in range(1, 6001)]
        assert found == pytest.approx(wanted, rel=1e-12)
        assert max(found) == pytest.approx(12e-3) and found[449] == max(found)
    floor = ScheduleConfig(kind="exponential", decay_every=10, min_ratio=0.5)
    assert rates(floor, 200, 100)[-1] == PEAK / 2
    ends = ScheduleConfig(kind="exponential", decay_every=10, decay_rate=0.5, decay=20, min_ratio=0)
    assert rates(ends, 30, 100)[19:] == [PEAK / 4] * 11


@pytest.mark.parametrize(
    "wrong",
    [
        {"decay_every": 0},
        {"decay_rate": 1.5},
        {"decay_rate": 0.0},
        {"warmup_power": 0.0},
        {"offset": -1e-4},
    ],
)
def test_what_a_schedule_refuses(wrong):
    with pytest.raises(ValueError, match="got"):
        ScheduleConfig(**wrong)
