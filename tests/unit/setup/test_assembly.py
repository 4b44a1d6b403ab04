"""One assembly for all that use it: on devices, on a mesh without devices, and several on one mesh."""

import dataclasses

import jax
import pytest

from dsjax.config.run import RunConfig
from dsjax.data.config import DataConfig
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
from dsjax.optimizers.kinds.sgd import SGDConfig
from dsjax.plan.plan import planned_setup
from dsjax.setup.assembly import Setup, assemble
from dsjax.setup.config import TrainConfig
from dsjax.setup.state import is_spec
from tests.helpers import TINY

MESH = MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3)
RUN = RunConfig(
    mesh=MESH,
    model=TINY,
    data=DataConfig(sequence_length=16),
    train=TrainConfig(steps=3, batch_size=16, ema_decay=0.9, clip_norm=0.5),
)


def specs(setup: Setup) -> list:
    return jax.tree.leaves(setup.specs, is_leaf=is_spec)


def test_a_mesh_without_devices_gives_the_same():
    """What `plan` measures is what the loop trains."""
    here, planned = assemble(RUN), planned_setup(RUN)
    assert isinstance(planned.layout.mesh, jax.sharding.AbstractMesh) and here.layout.mesh.size == 8
    assert specs(here) == specs(planned) and here.schedule.buckets == planned.schedule.buckets
    assert jax.tree.structure(here.shapes) == jax.tree.structure(planned.shapes)
    for one, other in zip(jax.tree.leaves(here.shapes), jax.tree.leaves(planned.shapes), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding.shard_shape(one.shape) == other.sharding.shard_shape(other.shape)


def test_two_models_on_one_mesh():
    layout = Layout(make_mesh(MESH), MESH.zero_stage)
    first = assemble(RUN, layout=layout)
    config = GPT2Config(vocab_size=32, num_layers=1, model_dim=16, num_heads=2, max_positions=16)
    second = assemble(dataclasses.replace(RUN, model=config, mesh=MeshConfig(data=8)), layout=first.layout)
    assert first.layout is second.layout is layout
    assert {leaf.sharding.mesh for setup in (first, second) for leaf in jax.tree.leaves(setup.shapes)} == {layout.mesh}


def test_the_options_of_a_step_are_the_configs():
    options = assemble(RUN).options
    assert (options.objective.name, options.clip_norm, options.ema_decay) == ("language_model", 0.5, 0.9)
    assert options.dropout == (TINY.dropout > 0)
    still = dataclasses.replace(TINY, dropout=0.0)
    assert not assemble(dataclasses.replace(RUN, model=still)).options.dropout
    attends = dataclasses.replace(still, attention_dropout=0.1)
    assert assemble(dataclasses.replace(RUN, model=attends)).options.dropout


def test_a_setup_with_another_optimizer_has_its_state():
    """What was made of the first one is not kept."""
    adam = assemble(RUN)
    assert adam.shapes.opt_state is not None
    sgd = dataclasses.replace(adam, optimizer=assemble(dataclasses.replace(RUN, optimizer=SGDConfig())).optimizer)
    assert len(jax.tree.leaves(sgd.shapes)) < len(jax.tree.leaves(adam.shapes)) and len(specs(sgd)) < len(specs(adam))
    onebit = assemble(dataclasses.replace(RUN, optimizer=OneBitAdamConfig(freeze_step=1)))
    assert set(onebit.programs.updates) > {"full"} and set(adam.programs.updates) == {"full"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"mesh": MeshConfig(data=3)}, "needs 3 devices"), ({"mesh": MeshConfig(tensor=8, data=1)}, None)],
)
def test_what_does_not_fit_the_devices_is_refused(change, problem):
    run = dataclasses.replace(RUN, **change)
    if problem is None:
        assert assemble(run).layout.size(("tensor",)) == 8
    else:
        with pytest.raises(ValueError, match=problem):
            assemble(run)
