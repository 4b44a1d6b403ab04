"""Weights of experts on a mesh: one dimension lies on `expert`, ZeRO splits over what is left, gradients stay the same.

The layer is a mixture in which every expert sees every token, y = sum_e p_e act(x W_e) V_e with p = softmax(x R): this
tests where weights lie, not how tokens find experts. Tolerance: sums in another order, as in test_layouts.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.layers.feed_forward import DenseSpec
from dsjax.layers.parameter import derive
from dsjax.layers.statistics import Auxiliary, Statistics
from dsjax.layers.weight import FloatWeight
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.families.family import architecture_of
from dsjax.models.feed_forwards import FEED_FORWARDS
from dsjax.models.naming import to_named
from dsjax.models.stack import BlockSpec
from dsjax.models.transformer import Transformer
from dsjax.models.tree import ModelTree
from dsjax.objectives.language_model import LanguageModel
from dsjax.setup.placement import training_placement
from dsjax.setup.step import GradientInputs, StepOptions, make_gradient
from tests.helpers import FAST, ONE, TINY, assert_close, from_flat, make_rows

EXPERTS, WIDTH, SPLIT = 4, 16, ("tensor", "fsdp")


@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """Experts of this hidden width."""

    hidden_dim: int

    def on_one_device(self, tensor: int) -> "MixtureSpec":
        return MixtureSpec(self.hidden_dim // tensor)

    def from_statistics(self, statistics: Statistics) -> Auxiliary:
        return Auxiliary()


class Mixture(nnx.Module):
    def __init__(self, spec: MixtureSpec, dim: int, *, key: jax.Array, std: float, residual_scale: float) -> None:
        wide, narrow = (EXPERTS, dim, spec.hidden_dim), (EXPERTS, spec.hidden_dim, dim)
        self.router = FloatWeight.normal(derive(key, "router"), (dim, EXPERTS), ("embed", "out"), std=std)
        self.up = FloatWeight.normal(derive(key, "up"), wide, ("experts", "embed", "mlp"), std=std)
        self.down = FloatWeight.normal(
            derive(key, "down"), narrow, ("experts", "mlp", "embed"), std=std * residual_scale
        )

    def __call__(self, x_BTD: jax.Array, context: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        router, up, down = (w.whole(context, dtype=x_BTD.dtype) for w in (self.router, self.up, self.down))
        p_BTE = jax.nn.softmax(x_BTD @ router)
        h_BETF = jax.nn.gelu(jnp.einsum("btd,edf->betf", x_BTD, up))
        h_BETF = context.layout.activation(h_BETF, "experts", None, "mlp")
        y_BTD = jnp.einsum("bte,betf,efd->btd", p_BTE, h_BETF, down)
        return y_BTD, {"chances": p_BTE.sum((0, 1))}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FEED_FORWARDS, MixtureSpec, Mixture)


def gradients_on(mesh: MeshConfig, named: dict[str, np.ndarray] | None):
    """Parameters and gradients by name, and the gradients as they lie on the mesh, of two pairs (dense, mixture)."""
    config = dataclasses.replace(TINY, num_layers=4, segments=(4,), dropout=0.0)
    pair = (BlockSpec(DenseSpec(WIDTH)), BlockSpec(MixtureSpec(WIDTH)))
    architecture = dataclasses.replace(architecture_of(config), layers=pair * 2)
    model = ModelTree.of(nnx.eval_shape(lambda: Transformer(config, architecture, key=jax.random.key(0))))
    size = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    layout = Layout(make_mesh(mesh, devices=jax.devices()[:size]), mesh.zero_stage)
    if named is None:
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(lambda tree: to_named(tree, model.segments), model.shapes)
        named = {name: (0.3 * rng.standard_normal(x.shape)).astype(np.float32) for name, x in shapes.items()}
    place = jax.tree.map(layout.named, model.specs(layout.parameter), is_leaf=lambda leaf: isinstance(leaf, P))
    params = jax.device_put(from_flat(named, model.shapes, model.segments), place)
    rows = make_rows()
    batch = training_placement(layout, batch_size=len(rows["tokens"]), accumulation=1)(rows)
    program = make_gradient(model, layout, StepOptions(objective=LanguageModel()), per_worker=False)
    inputs = GradientInputs(params, jax.random.key(5), jnp.int32(0), batch)
    tree, _ = jax.jit(program).lower(inputs).compile(compiler_options=FAST)(inputs)
    host = jax.tree.map(np.asarray, tree)
    return named, {k: np.asarray(v) for k, v in to_named(host, model.segments).items()}, tree


def test_gradients_of_experts_are_those_of_one_device():
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2, zero_stage=3)
    named, wanted, _ = gradients_on(ONE, None)
    _, found, tree = gradients_on(mesh, named)
    assert_close(found, wanted, 1e-5, what="gradients")
    mixture = tree["segments"][0][1]["mlp"]
    for name, spec in (("up", P(None, "expert", None, SPLIT)), ("down", P(None, "expert", SPLIT, None))):
        sharding = mixture[name].sharding
        assert sharding.is_equivalent_to(NamedSharding(sharding.mesh, spec), 4), sharding
    assert mixture["up"].addressable_shards[0].data.shape == (2, EXPERTS // 2, 32, WIDTH // 4)
    dense = tree["segments"][0][0]["mlp"]["up"]["kernel"]  # over `expert`, too
    assert dense.addressable_shards[0].data.shape == (2, 32, WIDTH // 8)
