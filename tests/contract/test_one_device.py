"""The layout of one device leaves no trace in a program."""

import jax
import numpy as np
from flax import nnx

from dsjax.layers.cross_entropy import summed_loss
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import ONE_DEVICE, Layout
from dsjax.models.families.build import abstract
from dsjax.models.families.llama.config import LlamaConfig

CONFIG = LlamaConfig(vocab_size=40, num_layers=3, model_dim=24, num_heads=4, num_kv_heads=2, segments=(1, 2))
TRACE = "harding"  # sdy.sharding_constraint, or a custom call of that name


def program(layout: Layout) -> str:
    """Loss and gradient of a model, before XLA sees them."""
    graph, state = nnx.split(abstract(CONFIG), nnx.Param)
    ids = jax.ShapeDtypeStruct((2, 16), np.int32)

    def loss(params, tokens):
        model = nnx.merge(graph, params)
        features, _ = model.features(tokens, segments=tokens, layout=layout)
        inputs, table, bias = model.logit_inputs(features, layout=layout)
        return summed_loss(inputs, table, tokens, tokens > 0, bias, layout)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
    return jax.jit(jax.grad(loss)).lower(shapes, ids).as_text()


def test_one_device_leaves_no_trace():
    mesh = make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    assert TRACE in program(Layout(mesh))
    assert TRACE not in program(ONE_DEVICE)
