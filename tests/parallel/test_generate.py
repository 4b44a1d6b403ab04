"""Generation on a mesh writes what one device writes."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.sampling import Sampling
from dsjax.models.tree import ModelTree
from tests.unit.models.transformer_oracle import MODELS, SHAPE, build, make_tokens

CONFIGS = {
    "alibi": dataclasses.replace(MODELS["bloom-4"], segments=(2,)),
    # Two heads of keys on four devices of `tensor`: all have both.
    "rope": LlamaConfig(num_heads=4, num_kv_heads=2, **SHAPE),
}
MESHES = {
    "data 2, tensor 2": MeshConfig(data=2, tensor=2),
    "fsdp 2, tensor 4": MeshConfig(data=1, fsdp=2, tensor=4, zero_stage=3),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_mesh_writes_the_same(name, mesh):
    model, config = build(CONFIGS[name]), MESHES[mesh]
    devices = jax.devices()[: config.data * config.fsdp * config.tensor]
    layout = Layout(make_mesh(config, devices=devices), config.zero_stage)
    graph, state = nnx.split(model, nnx.Param)
    shardings = jax.tree.map(layout.named, ModelTree.of(model).specs(layout.parameter))
    placed = nnx.merge(graph, jax.device_put(nnx.to_pure_dict(state), shardings))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(placed)))
    for rows in (4, 3):  # divided over data and fsdp, and not
        tokens = make_tokens((rows, 6))
        mask = (np.arange(6) < np.array([6, 3, 5, 1])[:rows, None]).astype(np.int32)
        options = {"max_new_tokens": 5, "sampling": Sampling(temperature=1.0 if rows == 3 else 0.0)}
        got = placed.generate(tokens, mask, layout=layout, **options)
        np.testing.assert_array_equal(got, model.generate(tokens, mask, **options))
