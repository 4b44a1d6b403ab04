"""0/1 Adam's closed forms of its schedule against counters that are stepped (schedules_oracle.py)."""

import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedules_oracle import ZeroOneSchedule

from dsjax.optimizers.algorithms.onebit_adam import Moments
from dsjax.optimizers.algorithms.zero_one_adam import ZeroOneAdam, variance_steps
from dsjax.optimizers.workers import Workers

KINDS = {"full": "full", "compressed": "onebit", "first_sync": "sync", "sync": "sync", "local": "local", "noop": "noop"}


def closed_form(steps: int, var_freeze_step: int, deepspeed_parity: bool, xp=np, **scalers: int) -> list[str]:
    own = ZeroOneAdam(Workers("data", 2), Moments(deepspeed_parity=deepspeed_parity), var_freeze_step, **scalers)
    return [own.names[int(stage)] for stage in own.stage(xp.arange(steps), own.last_full, xp)]


def stepped(steps: int, **options) -> list[str]:
    schedule = ZeroOneSchedule(**options)
    return [schedule.step() for _ in range(steps)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 40), st.integers(1, 20), st.booleans())
@example(var_freeze_step=200, kappa=1, scaler=1, clipper=7, deepspeed_parity=False)
def test_the_closed_form_is_the_stepped_schedule(var_freeze_step, kappa, scaler, clipper, deepspeed_parity):
    scalers = {"var_update_scaler": kappa, "local_step_scaler": scaler, "local_step_clipper": clipper}
    names = closed_form(400, var_freeze_step, deepspeed_parity, **scalers)
    assert [KINDS[name] for name in names] == stepped(
        400, var_freeze_step=var_freeze_step, deepspeed_parity=deepspeed_parity, **scalers
    )
    # The first step after the freeze synchronises, and is where errors begin anew.
    first = var_freeze_step + deepspeed_parity
    assert [t for t, name in enumerate(names) if name == "first_sync"] == [first]


def test_the_same_traced_on_the_device():
    scalers = {"var_update_scaler": 3, "local_step_scaler": 5, "local_step_clipper": 4}
    assert closed_form(64, 20, False, jnp, **scalers) == closed_form(64, 20, False, **scalers)


def test_bert_larges_variance_is_learnt_153_times():
    assert len(variance_steps(12500, 16)) == 153
    assert closed_form(12500, 12500, False, var_update_scaler=16).count("compressed") == 12347
