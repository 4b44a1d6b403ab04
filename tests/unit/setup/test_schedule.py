"""The pace of runs: the papers' bookkeeping, the best buckets, and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config.load import load_run
from dsjax.data.config import CurriculumConfig, FixedDiscrete, FixedLinear, LengthConfig
from dsjax.models.adapter_training import split_model
from dsjax.models.config import RandomLTDConfig
from dsjax.observe.flops import training_flops
from dsjax.optimizers.config import OneBitAdamConfig, ScheduleConfig
from dsjax.optimizers.create import advice
from dsjax.optimizers.schedules import Clocks, learning_rate
from dsjax.plan.cost import Cost
from dsjax.runs.folder import pace_of, resolved
from dsjax.setup.config import TrainConfig
from dsjax.setup.schedule import Bucket, Pace, make_pace

ROOT = Path(__file__).parents[3]


def growing(steps: int, *, least: int = 80, most: int = 0, how: str = "truncate", quantum: int = 8) -> CurriculumConfig:
    schedule = FixedLinear(steps=steps, quantum=quantum)
    return CurriculumConfig(length=LengthConfig(how=how, min=least, max=most, schedule=schedule))


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
    pace = make_pace(
        TrainConfig(tokens=billions * 10**9, batch_size=512),
        growing(curriculum) if curriculum else None,
        RandomLTDConfig(min_kept=128, steps=dropping) if dropping else None,
        sequence_length=2048,
        num_layers=24,
    )
    assert pace.num_steps == steps
    assert round(float((pace.rows * pace.length).sum()) / 1e9, 1) == raw
    assert pace.tokens[-2] < billions * 10**9 <= pace.tokens[-1]
    assert len(pace.buckets) <= 16 and pace.waste < 0.02
    layers = {"layer_parameters": 12 * 2048**2, "other_parameters": 0, "num_layers": 24, "attention_dim": 2048}
    plain = training_flops(**layers, dropping_layers=0, rows=512, length=2048, kept=2048) * 286_103
    spent = training_flops(**layers, dropping_layers=22, rows=pace.rows, length=pace.length, kept=pace.kept).sum()
    assert spent / plain == pytest.approx(flops, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("gpt3-1.3b-curriculum", 339_169), ("gpt3-1.3b-ltd-200b", 248_526), ("gpt3-1.3b-efficient-150b", 188_632)],
)
def test_the_recipes_are_in_the_presets(name, steps):
    config = resolved(load_run(ROOT / "configs" / "run" / f"{name}.yaml"))
    pace = pace_of(config)
    assert pace.num_steps == steps
    model, frozen = split_model(config.model, None)
    whole = {"rows": config.train.batch_size, "sequence_length": config.data.sequence_length}
    cost = Cost.of(config.model, model, frozen, pace, config.random_ltd, **whole)
    # With the output projection, which sees all tokens of a row.
    layers, width, vocabulary = config.model.num_layers, config.model.model_dim, config.model.vocab_size
    layer = lambda tokens: 24 * width**2 * tokens + 4 * width * tokens.astype(float) ** 2
    forward = 2 * layer(pace.length) + (layers - 2) * layer(np.minimum(pace.kept, pace.length))
    flops = 3 * pace.rows * (forward + 2 * width * vocabulary * pace.length)
    assert cost.flops == pytest.approx(flops, rel=1e-6)
    dense = 3 * 512 * (layers * layer(np.array(2048)) + 2 * width * vocabulary * 2048)
    done = steps // 2
    assert cost.saving(done) == pytest.approx(1 - flops[:done].sum() / (dense * done), rel=1e-6)


def test_layer_tokens_of_the_cifar_tutorial():
    """The number that DeepSpeed's tutorial prints, to the last digit."""
    pace = make_pace(
        TrainConfig(steps=5474, batch_size=32),
        None,
        RandomLTDConfig(min_kept=32, max_kept=197, quantum=8, steps=3910),
        sequence_length=197,
        num_layers=12,
    )
    assert pace.layer_tokens[-1] == 305_784_192
    assert pace.clocks(5474) == Clocks(5474, int(pace.tokens[-1]), 305_784_192)


paces = st.builds(
    lambda steps, least, until, quantum, kept, ltd, programs, how: make_pace(
        TrainConfig(steps=steps, batch_size=4, max_programs=programs),
        growing(until, least=max(least, quantum), quantum=quantum, how=how),
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
@given(paces)
def test_every_step_fits_into_its_bucket(pace: Pace):
    for step in range(pace.num_steps):
        bucket = pace.bucket_at(step)
        assert bucket.rows == pace.rows[step] and pace.length[step] <= bucket.width <= 64
        dropping = pace.kept[step] < pace.length[step]
        assert (bucket.num_kept is not None) == dropping
        assert pace.kept[step] <= bucket.slots <= bucket.width
        shape = pace.shape_at(step)
        assert (shape.rows, shape.length, shape.width) == (bucket.rows, pace.length[step], bucket.width)
    used = {pace.bucket_at(step) for step in range(pace.num_steps)}
    assert used == set(pace.buckets) and len(pace.buckets) <= 20
    whole = pace.rows * (pace.length * 2 + pace.kept * 3)
    assert np.array_equal(
        np.diff(pace.layer_tokens), np.where(pace.kept < pace.length, whole, pace.rows * 5 * pace.length)
    )
    assert (np.diff(pace.tokens) * 5 <= np.diff(pace.layer_tokens)).all()
    assert 0 <= pace.waste < 1


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
    pace = make_pace(
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
    assert sum(pace.bucket_at(step).width for step in range(pace.num_steps)) == min(map(computed, ways))


def test_reshaping_keeps_the_tokens_of_a_step():
    config = growing(917, least=32, how="reshape")
    train = TrainConfig(steps=1000, batch_size=4, max_programs=6)
    pace = make_pace(train, config, None, sequence_length=1024, num_layers=2)
    assert [(b.rows, b.width) for b in pace.buckets] == [(128 >> i, 32 << i) for i in range(6)]
    assert set(np.diff(pace.tokens)) == {4096} and not pace.left_out.any()
    odd = make_pace(train, growing(10, least=300, how="reshape", quantum=1), None, sequence_length=1000, num_layers=2)
    assert odd.length[0] == 333 and odd.length[5] == 500 and odd.left_out[0] == 1
    wanted = 300 + 70 * np.minimum(np.arange(1, 1001), 10)
    assert (odd.length <= wanted).all()


def test_a_run_without_either_has_one_size():
    pace = make_pace(TrainConfig(tokens=1000, batch_size=3), None, None, sequence_length=50, num_layers=7)
    assert pace.num_steps == 7 and pace.buckets == (Bucket(3, 50),) and pace.settled == 0 and pace.waste == 0
    assert pace.tokens.tolist() == [150 * step for step in range(8)]


def test_columns_that_no_row_needs_are_cut():
    pace = make_pace(TrainConfig(steps=4, batch_size=2, max_programs=4), None, None, sequence_length=64, num_layers=2)
    cut = pace.cut(lambda step: [5, 17, 40, 64][step], most=4)
    assert [cut.bucket_at(step).width for step in range(4)] == [16, 32, 48, 64]
    assert [cut.shape_at(step).length for step in range(4)] == [16, 32, 48, 64]
    assert cut.tokens.tolist() == pace.tokens.tolist()


def test_a_decay_in_tokens_begins_where_the_warm_up_in_steps_ends():
    """Megatron's formula: ratio = (n - w) / (D - w), w the tokens at the end of the warm-up."""
    pace = make_pace(TrainConfig(steps=40, batch_size=2), growing(20, least=8), None, sequence_length=64, num_layers=2)
    schedule = ScheduleConfig(kind="linear", warmup=10, decay_by="tokens", min_ratio=0.0)
    end, warmed = pace.clocks(40), pace.warmed(schedule)
    assert warmed == pace.clocks(10)
    rates = [learning_rate(schedule, 1.0, after=pace.clocks(step), end=end, warmed=warmed) for step in range(1, 41)]
    tokens = pace.tokens[1:].astype(float)
    decayed = 1 - (tokens - tokens[9]) / (tokens[-1] - tokens[9])
    assert rates == pytest.approx([min((n + 1) / 10, d) for n, d in enumerate(decayed)])


def test_a_rate_by_layer_tokens():
    """LayerToken (arXiv 2211.11586): warm-up and decay by the tokens that layers have seen."""
    dropping = RandomLTDConfig(min_kept=16, quantum=8, steps=20)
    pace = make_pace(TrainConfig(steps=40, batch_size=2), None, dropping, sequence_length=64, num_layers=3)
    by_layers = ScheduleConfig(
        kind="linear", warmup=1000, warmup_by="layer_tokens", decay_by="layer_tokens", min_ratio=0.0
    )
    end, warmed = pace.clocks(40), pace.warmed(by_layers)
    assert warmed.layer_tokens >= 1000 > pace.layer_tokens[warmed.steps - 1]
    rates = [learning_rate(by_layers, 1.0, after=pace.clocks(step), end=end, warmed=warmed) for step in range(1, 41)]
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
        make_pace(TrainConfig(steps=10), curriculum, dropping, sequence_length=64, num_layers=3)


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
    pace = make_pace(TrainConfig(steps=40), growing(10, least=8), dropping, sequence_length=64, num_layers=3)
    assert pace.settled == 20
    told = lambda step: advice(OneBitAdamConfig(freeze_step=step), workers=2, steps=40, growing_until=pace.settled)
    assert told(20) == [] and len(told(19)) == 1
    assert "optimizer.freeze_step = 19 lies before step 20, up to which rows or kept tokens grow" in told(19)[0]


def test_too_few_programs_are_refused():
    config = growing(10, least=16, how="truncate")
    dropping = RandomLTDConfig(min_kept=24, steps=20)
    with pytest.raises(ValueError, match="max_programs = 1 is too few: this schedule needs 2"):
        make_pace(TrainConfig(steps=30, max_programs=1), config, dropping, sequence_length=64, num_layers=3)
