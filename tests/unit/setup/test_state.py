"""The state's tree: shapes, specs and the bytes that each ZeRO stage leaves on a device."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec

from dsjax.mesh.config import MeshConfig
from dsjax.mesh.report import placements
from tests.helpers import TINY, make_params, make_training

P = sum(value.nbytes for value in make_params(TINY).values())


def bytes_per_device(tree) -> int:
    return sum(row.bytes_per_device for row in placements(tree) if row.shape)


@pytest.mark.parametrize(
    ("stage", "params", "moments"), [(0, P, 2 * P), (1, P, P // 4), (2, P, P // 4), (3, P // 8, P // 4)]
)
def test_zero_stages_save_what_they_say(stage, params, moments):
    """Over fsdp 4 x expert 2; every tensor of the model divides by 8."""
    training = make_training(MeshConfig(data=1, fsdp=4, expert=2, zero_stage=stage), ema_decay=0.9)
    state = training.setup.shapes
    assert bytes_per_device(state.params) == params
    assert bytes_per_device(state.opt_state) == moments
    assert bytes_per_device(state.ema) == (P if stage == 0 else P // 8)


def test_the_abstract_state_is_that_of_a_real_one():
    training = make_training(MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3), ema_decay=0.9)
    abstract = training.setup.shapes
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, str(x.sharding)), tree)
    assert describe(abstract) == describe(training.state())


def test_a_models_tree_tells_stacks_from_layers():
    config = dataclasses.replace(TINY, num_layers=4, segments=())
    model = make_training(MeshConfig(data=1), config).model
    assert model.axes["embed"]["table"] == ("vocab", "embed")
    assert model.axes["segments"][1][0]["mlp"]["up"]["kernel"] == ("embed", "mlp")
    assert model.shapes["segments"][1][0]["mlp"]["up"]["kernel"].shape == (2, 32, 128)
    assert set(jax.tree.leaves(model.leading["segments"])) == {1}
    assert set(jax.tree.leaves({name: tree for name, tree in model.leading.items() if name != "segments"})) == {0}
    specs = model.specs(lambda axes, shape: PartitionSpec(*axes))
    assert specs["segments"][1][0]["mlp"]["up"]["kernel"] == PartitionSpec(None, "embed", "mlp")
    assert specs["final_norm"]["scale"] == PartitionSpec("embed")
