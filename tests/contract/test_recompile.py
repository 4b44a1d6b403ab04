"""Nothing is compiled after the first step, and a step leaves every tensor where it was."""

import jax
import jax.numpy as jnp
import pytest

from dsjax.optimizers.kinds.base import ScheduleConfig
from dsjax.optimizers.schedules import Clocks, learning_rate
from dsjax.setup.placement import evaluation_placement
from dsjax.setup.step import GradientInputs
from tests.helpers import MESHES, make_rows, make_training


def test_the_second_step_compiles_nothing():
    """Another batch, another step number and another learning rate are data."""
    training = make_training(MESHES["all"], ema_decay=0.9)
    programs, state = training.programs, training.fresh_state()
    schedule = ScheduleConfig(kind="cosine", warmup=2)
    for step in range(3):
        rate = learning_rate(schedule, 1e-3, after=Clocks(step + 1), end=Clocks(10))
        batch = training.place(make_rows(seed=step), accumulation=2)
        gradients, metrics = programs.gradient(GradientInputs(state.params, state.key, state.step, batch))
        state, _ = programs.updates["full"](state, gradients, metrics["loss"], jnp.float32(rate))
        programs.evaluate(state.params, evaluation_placement(training.layout, batch_size=16)(make_rows(seed=step)))
        assert programs.gradient._cache_size() == 1
        assert programs.updates["full"]._cache_size() == 1
        assert programs.evaluate._cache_size() == 1
    assert int(state.step) == 3


@pytest.mark.parametrize("mesh_name", ["fsdp", "expert", "zero1", "all"])
def test_a_step_leaves_everything_where_it_was(mesh_name):
    training = make_training(MESHES[mesh_name])
    state = training.state()
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    gradients, metrics = training.gradient(state, make_rows(), accumulation=2)
    state, _ = training.update(state, gradients, metrics["loss"])
    same = jax.tree.map(lambda leaf, old: leaf.sharding.is_equivalent_to(old, leaf.ndim), state, before)
    assert all(jax.tree.leaves(same))
    specs = training.model.specs(training.layout.gradient)
    right = jax.tree.map(
        lambda leaf, spec: leaf.sharding.is_equivalent_to(training.layout.named(spec), leaf.ndim), gradients, specs
    )
    assert all(jax.tree.leaves(right))
