"""Schedules of runs: the papers' bookkeeping, the best buckets, and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config.load import load_run
from dsjax.data.config import CurriculumConfig, FixedDiscrete, FixedLinear, LengthConfig
from dsjax.mesh.config import AXES
from dsjax.models.config import RandomLTDConfig
from dsjax.observe.flops import Matrices, training_flops
from dsjax.optimizers.kinds.base import ScheduleConfig
from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
from dsjax.optimizers.schedules import Clocks, learning_rate
from dsjax.plan.cost import Cost
from dsjax.plan.trace import abstract_layout
from dsjax.setup.assembly import assemble
from dsjax.setup.buckets import Bucket
from dsjax.setup.config import TrainConfig
from dsjax.setup.resolve import resolved
from dsjax.setup.schedule import StepSchedule, make_schedule

ROOT = Path(__file__).parents[3]


def growing(
    steps: int, *, least: int = 80, most: int = 0, mode: str = "truncate", quantum: int = 8
) -> CurriculumConfig:
    schedule = FixedLinear(steps=steps, quantum=quantum)
    return CurriculumConfig(length=LengthConfig(mode=mode, min=least, max=most, schedule=schedule))


@pytest.mark.parametrize(
    ("billions", "curriculum", "dropping", "steps", "raw", "flops"),
    [
        (300, None, None, 286_103, 300.0, 1.0),
        (300, None, 200_000, 372_789, 390.9, 0.984),
        (200, None, 133_333, 248_526, 260.6, 0.656),
        (150, None, 100_000, 186_395, 195.4, 0.492),
        (300, 110_000, None, 339_169, 300.0, 0.991),
        (300, 110_000, 200_000, 377_264, 339.9, 0.983),
        (150, 55_000, 100_000, 188_632, 170.0, 0.492),
    ],
)
def test_the_bookkeeping_of_the_gpt3_recipes(billions, curriculum, dropping, steps, raw, flops):
    """Published GPT-3 1.3B runs, derived from Megatron-DeepSpeed's scripts by hand.

    Steps, raw tokens, and FLOPs of the layers against those of the run of 300 billion tokens without either technique.
    """
    schedule = make_schedule(
        TrainConfig(tokens=billions * 10**9, batch_size=512),
        growing(curriculum) if curriculum else None,
        RandomLTDConfig(min_kept=128, steps=dropping) if dropping else None,
        sequence_length=2048,
        num_layers=24,
    )
    assert schedule.num_steps == steps
    assert round(float((schedule.rows * schedule.length).sum()) / 1e9, 1) == raw
    assert schedule.tokens[-2] < billions * 10**9 <= schedule.tokens[-1]
    assert len(schedule.buckets) <= 16 and schedule.waste < 0.02
    layers = Matrices(12 * 2048**2, 0, num_layers=24, attention_dim=2048, dropping_layers=22)
    plain = training_flops(layers, rows=512, length=2048, kept=2048) * 286_103
    spent = training_flops(layers, rows=schedule.rows, length=schedule.length, kept=schedule.kept).sum()
    assert spent / plain == pytest.approx(flops, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("gpt3-1.3b-curriculum", 339_169), ("gpt3-1.3b-ltd-200b", 248_526), ("gpt3-1.3b-efficient-150b", 188_632)],
)
def test_the_recipes_are_in_the_presets(name, steps):
    one_device = abstract_layout(dict.fromkeys(AXES, 1), zero_stage=0)
    setup = assemble(load_run(ROOT / "configs" / "run" / f"{name}.yaml"), layout=one_device)
    config, schedule, cost = setup.config, setup.schedule, Cost.of(setup)
    assert schedule.num_steps == steps
    # With the output projection, which sees all tokens of a row.
    layers, width, vocabulary = config.model.num_layers, config.model.model_dim, config.model.vocab_size
    layer = lambda tokens: 24 * width**2 * tokens + 4 * width * tokens.astype(float) ** 2
    forward = 2 * layer(schedule.length) + (layers - 2) * layer(np.minimum(schedule.kept, schedule.length))
    flops = 3 * schedule.rows * (forward + 2 * width * vocabulary * schedule.length)
    assert cost.flops == pytest.approx(flops, rel=1e-6)
    dense = 3 * 512 * (layers * layer(np.array(2048)) + 2 * width * vocabulary * 2048)
    done = steps // 2
    assert cost.saving(done) == pytest.approx(1 - flops[:done].sum() / (dense * done), rel=1e-6)


def test_layer_tokens_of_the_cifar_tutorial():
    """The number that DeepSpeed's tutorial prints, to the last digit."""
    schedule = make_schedule(
        TrainConfig(steps=5474, batch_size=32),
        None,
        RandomLTDConfig(min_kept=32, max_kept=197, quantum=8, steps=3910),
        sequence_length=197,
        num_layers=12,
    )
    assert schedule.layer_tokens[-1] == 305_784_192
    assert schedule.clocks(5474) == Clocks(5474, int(schedule.tokens[-1]), 305_784_192)


schedules = st.builds(
    lambda steps, least, until, quantum, kept, ltd, programs, mode: make_schedule(
        # Rows that are cut otherwise and rows that drop tokens or not need programs of their own.
        TrainConfig(steps=steps, batch_size=4, max_programs=programs * (2 if ltd and mode == "reshape" else 1)),
        growing(until, least=max(least, quantum), quantum=quantum, mode=mode),
        RandomLTDConfig(min_kept=kept, quantum=8, steps=ltd) if ltd else None,
        sequence_length=64,
        num_layers=5,
    ),
    st.integers(1, 60),
    st.integers(1, 64),
    st.integers(1, 50),
    st.sampled_from([1, 8, 16]),
    st.sampled_from([8, 24, 40]),
    st.sampled_from([0, 5, 40]),
    st.integers(8, 10),
    st.sampled_from(["truncate", "reshape"]),
)


@settings(deadline=None, max_examples=80)
@given(schedules)
def test_every_step_fits_into_its_bucket(schedule: StepSchedule):
    for step in range(schedule.num_steps):
        bucket = schedule.bucket_at(step)
        assert bucket.rows == schedule.rows[step] and schedule.length[step] <= bucket.width <= 64
        dropping = schedule.kept[step] < schedule.length[step]
        assert (bucket.num_kept is not None) == dropping
        assert schedule.kept[step] <= bucket.slots <= bucket.width
        shape = schedule.shape_at(step)
        assert (shape.rows, shape.length, shape.width) == (bucket.rows, schedule.length[step], bucket.width)
    used = {schedule.bucket_at(step) for step in range(schedule.num_steps)}
    assert used == set(schedule.buckets) and len(schedule.buckets) <= 20
    whole = schedule.rows * (schedule.length * 2 + schedule.kept * 3)
    assert np.array_equal(
        np.diff(schedule.layer_tokens),
        np.where(schedule.kept < schedule.length, whole, schedule.rows * 5 * schedule.length),
    )
    assert (np.diff(schedule.tokens) * 5 <= np.diff(schedule.layer_tokens)).all()
    assert 0 <= schedule.waste < 1


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=6, unique=True),
    st.lists(st.integers(1, 9), min_size=6, max_size=6),
    st.integers(1, 4),
)
def test_buckets_waste_as_little_as_any(lengths, counts, most):
    """Against all ways of cutting the sorted lengths into so many runs."""
    lengths = [8 * length for length in sorted(lengths)]
    ends = list(itertools.accumulate(counts[: len(lengths)]))
    discrete = FixedDiscrete(difficulties=tuple(lengths), until=tuple(ends[:-1]))
    schedule = make_schedule(
        TrainConfig(steps=ends[-1], batch_size=1, max_programs=most),
        CurriculumConfig(length=LengthConfig(min=1, max=96, schedule=discrete)),
        None,
        sequence_length=96,
        num_layers=2,
    )

    def computed(cuts: tuple[int, ...]) -> int:
        bounds = [0, *cuts, len(lengths)]
        return sum(counts[i] * lengths[end - 1] for start, end in itertools.pairwise(bounds) for i in range(start, end))

    ways = (cuts for k in range(most) for cuts in itertools.combinations(range(1, len(lengths)), k))
    assert sum(schedule.bucket_at(step).width for step in range(schedule.num_steps)) == min(map(computed, ways))


def test_reshaping_keeps_the_tokens_of_a_step():
    config = growing(917, least=32, mode="reshape")
    train = TrainConfig(steps=1000, batch_size=4, max_programs=6)
    schedule = make_schedule(train, config, None, sequence_length=1024, num_layers=2)
    assert [(b.rows, b.width) for b in schedule.buckets] == [(128 >> i, 32 << i) for i in range(6)]
    assert set(np.diff(schedule.tokens)) == {4096} and not schedule.left_out.any()
    odd = make_schedule(
        train, growing(10, least=300, mode="reshape", quantum=1), None, sequence_length=1000, num_layers=2
    )
    assert odd.length[0] == 333 and odd.length[5] == 500 and odd.left_out[0] == 1
    wanted = 300 + 70 * np.minimum(np.arange(1, 1001), 10)
    assert (odd.length <= wanted).all()


def test_a_run_without_either_has_one_size():
    schedule = make_schedule(TrainConfig(tokens=1000, batch_size=3), None, None, sequence_length=50, num_layers=7)
    assert (
        schedule.num_steps == 7
        and schedule.buckets == (Bucket(3, 50),)
        and schedule.settled == 0
        and schedule.waste == 0
    )
    assert schedule.tokens.tolist() == [150 * step for step in range(8)]


def test_columns_that_no_row_needs_are_cut():
    schedule = make_schedule(
        TrainConfig(steps=4, batch_size=2, max_programs=4), None, None, sequence_length=64, num_layers=2
    )
    cut = schedule.cut(lambda step: [5, 17, 40, 64][step], most=4)
    assert [cut.bucket_at(step).width for step in range(4)] == [16, 32, 48, 64]
    assert [cut.shape_at(step).length for step in range(4)] == [16, 32, 48, 64]
    assert cut.tokens.tolist() == schedule.tokens.tolist()


def test_a_decay_in_tokens_begins_where_the_warm_up_in_steps_ends():
    """Megatron's formula: ratio = (n - w) / (D - w), w the tokens at the end of the warm-up."""
    schedule = make_schedule(
        TrainConfig(steps=40, batch_size=2), growing(20, least=8), None, sequence_length=64, num_layers=2
    )
    rate = ScheduleConfig(kind="linear", warmup=10, decay_by="tokens", min_ratio=0.0)
    end, warmed = schedule.clocks(40), schedule.warmed(rate)
    assert warmed == schedule.clocks(10)
    rates = [learning_rate(rate, 1.0, after=schedule.clocks(step), end=end, warmed=warmed) for step in range(1, 41)]
    tokens = schedule.tokens[1:].astype(float)
    decayed = 1 - (tokens - tokens[9]) / (tokens[-1] - tokens[9])
    assert rates == pytest.approx([min((n + 1) / 10, d) for n, d in enumerate(decayed)])


def test_a_rate_by_layer_tokens():
    """LayerToken (arXiv 2211.11586): warm-up and decay by the tokens that layers have seen."""
    dropping = RandomLTDConfig(min_kept=16, quantum=8, steps=20)
    schedule = make_schedule(TrainConfig(steps=40, batch_size=2), None, dropping, sequence_length=64, num_layers=3)
    by_layers = ScheduleConfig(
        kind="linear", warmup=1000, warmup_by="layer_tokens", decay_by="layer_tokens", min_ratio=0.0
    )
    end, warmed = schedule.clocks(40), schedule.warmed(by_layers)
    assert warmed.layer_tokens >= 1000 > schedule.layer_tokens[warmed.steps - 1]
    rates = [
        learning_rate(by_layers, 1.0, after=schedule.clocks(step), end=end, warmed=warmed) for step in range(1, 41)
    ]
    kept = np.minimum(16 + 48 * np.arange(40) // 20 // 8 * 8, 64)
    seen = np.cumsum(2 * (2 * 64 + kept)).astype(float)
    assert rates == pytest.approx(np.minimum(seen / 1000, (seen[-1] - seen) / (seen[-1] - 1000)))


@pytest.mark.parametrize(
    ("curriculum", "dropping", "message"),
    [
        (growing(5, least=8, most=128), None, "data.sequence_length = 64"),
        (growing(5, least=80), None, "goes from 80 to 64"),
        (None, RandomLTDConfig(min_kept=80, steps=5), "random_ltd keeps from 80 to 64 tokens"),
        (None, RandomLTDConfig(min_kept=16, max_kept=65, steps=5), "random_ltd keeps from 16 to 65 tokens"),
        (None, RandomLTDConfig(min_kept=16, steps=5, first_layers=2), "use a deeper model"),
    ],
)
def test_what_does_not_fit_is_refused(curriculum, dropping, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(TrainConfig(steps=10), curriculum, dropping, sequence_length=64, num_layers=3)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["curriculum={length: {min: 64, max: 4096, schedule: {kind: fixed_linear, steps: 5}}}"],
            "goes from 64 to 4096",
        ),
        (["random_ltd={min_kept: 4000, steps: 5}"], "random_ltd keeps from 4000 to"),
        (["random_ltd={min_kept: 16, steps: 5, first_layers: 40}"], "use a deeper model"),
    ],
)
def test_refused_before_any_text_is_read(sets, message):
    """By plan as by train, which both resolve their config first."""
    with pytest.raises(ValueError, match=message):
        resolved(load_run(ROOT / "configs" / "run" / "quickstart.yaml", sets))


def test_a_freeze_before_the_last_growth_is_told_of():
    dropping = RandomLTDConfig(min_kept=16, quantum=8, steps=20)
    schedule = make_schedule(TrainConfig(steps=40), growing(10, least=8), dropping, sequence_length=64, num_layers=3)
    assert schedule.settled == 20
    told = lambda step: OneBitAdamConfig(freeze_step=step).advice(workers=2, steps=40, growing_until=schedule.settled)
    assert told(20) == [] and len(told(19)) == 1
    assert "optimizer.freeze_step = 19 lies before step 20, up to which rows or kept tokens grow" in told(19)[0]


def test_too_few_programs_are_refused():
    config = growing(10, least=16, mode="truncate")
    dropping = RandomLTDConfig(min_kept=24, steps=20)
    with pytest.raises(ValueError, match="max_programs = 1 is too few: this schedule needs 2"):
        make_schedule(TrainConfig(steps=30, max_programs=1), config, dropping, sequence_length=64, num_layers=3)
