"""The stepped schedules against a search by hand and against the figures that the papers' settings give."""

import itertools

import pytest
from schedules_oracle import ZeroOneSchedule, bytes_sent, onebit_kinds, rounds


def kinds(num_steps: int, **options) -> list[str]:
    schedule = ZeroOneSchedule(**options)
    return [schedule.step() for _ in range(num_steps)]


def test_the_variance_of_a_short_peer_run():
    """Recorded: updates at 2, 3, 4 | 6, 8, 10 | 12, 16, 20 with kappa = 3; the gap after a doubling is the old one."""
    steps = kinds(21, var_freeze_step=20, var_update_scaler=3, deepspeed_parity=True)
    assert [t for t, kind in enumerate(steps, 1) if kind == "full"] == [2, 3, 4, 6, 8, 10, 12, 16, 20]
    assert steps[0] == "noop" and steps[20] == "onebit"


def test_ours_loses_no_step_and_freezes_where_it_says():
    steps = kinds(30, var_freeze_step=20, var_update_scaler=3, local_step_scaler=100)
    assert [t for t, kind in enumerate(steps, 1) if kind == "full"] == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert steps[20:] == ["sync"] * 10


def test_a_constant_interval():
    steps = kinds(40, var_freeze_step=10, local_step_scaler=1, local_step_clipper=5)
    assert [t for t, kind in enumerate(steps, 1) if kind == "sync"][3:] == [20, 25, 30, 35, 40]


# BERT-Large's published settings: 0/1 Adam with var_freeze_step 12500 and the defaults, 1-bit Adam with 23K of 152K.
@pytest.mark.parametrize("deepspeed_parity", [False, True])
def test_the_rounds_until_the_variance_is_frozen(deepspeed_parity):
    schedule = ZeroOneSchedule(var_freeze_step=12500, deepspeed_parity=deepspeed_parity)
    found = rounds(itertools.islice(iter(schedule.step, None), 12500))
    assert schedule.var_interval == 512
    assert (found.full, found.onebit, found.none) == (
        153,
        12346 if deepspeed_parity else 12347,
        1 if deepspeed_parity else 0,
    )


@pytest.mark.parametrize(
    ("num_steps", "skipped", "bits", "saving"), [(118_000, 0.40, 0.62, 26), (152_000, 0.51, 0.50, 32)]
)
def test_zero_one_adams_volume(num_steps, skipped, bits, saving):
    found = rounds(kinds(num_steps, var_freeze_step=12500))
    assert found.steps == num_steps
    assert found.skipped == pytest.approx(skipped, abs=0.005)
    assert found.bits == pytest.approx(bits, abs=0.005)
    assert found.saving == pytest.approx(saving, abs=0.5)


def test_onebit_adams_volume():
    found = rounds(onebit_kinds(152_000, 23_000))
    assert found.bits == pytest.approx(3.27, abs=0.005)
    assert found.saving == pytest.approx(4.9, abs=0.05)


def test_bytes_on_the_wire():
    """340M parameters, 8 workers: 74.4 MB for a 1-bit round, 2380 MB for a float32 one."""
    onebit, full = rounds(["onebit"], full_bits=32), rounds(["full"], full_bits=32)
    assert bytes_sent(onebit, 340_000_000, 8) == pytest.approx(74.4e6, rel=1e-3)
    assert bytes_sent(full, 340_000_000, 8) == pytest.approx(2380e6, rel=1e-3)
