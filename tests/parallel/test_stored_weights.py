"""A weight that is stored in another way, here in 8 bits: in a model, in training, in checkpoints and in files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.safetensors_file import read_header, read_tensor, write_file
from dsjax.checkpoint.store import CheckpointStore
from dsjax.layers.parameter import use
from dsjax.layers.weight import FloatWeight
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.adapters import is_adapter, with_adapters, with_weights
from dsjax.models.config import LoRAConfig
from dsjax.models.families.build import abstract
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.naming import abstract_named, from_named, leaf_names, to_named
from dsjax.models.tree import ModelTree, joined
from dsjax.runs.disk import tensor_bytes
from tests.unit.models.transformer_oracle import build, make_tokens

CONFIG = GPT2Config(vocab_size=40, num_layers=3, model_dim=24, num_heads=4, max_positions=16, segments=(1, 2))
CHOSEN = lambda name: name.startswith("mlp.")


class Int8(nnx.Module):
    """Codes [D, F] int8 and one scale [F] for each output."""

    def __init__(self, weight) -> None:
        scales = jnp.abs(weight[...]).max(-2) / 127
        codes = jnp.round(weight[...] / scales[..., None, :]).astype(jnp.int8)
        self.codes, self.scales = nnx.Param(codes, axes=weight.axes), nnx.Param(scales, axes=weight.axes[1:])

    @property
    def shape(self):
        return self.codes.shape

    @property
    def axes(self):
        return self.codes.get_metadata("axes")

    def whole(self, context, *, dtype):
        return use(self.codes, context, dtype) * use(self.scales, context, dtype)

    def apply(self, x, context):
        return jnp.tensordot(x, use(self.codes, context, x.dtype), axes=1) * use(self.scales, context, x.dtype)

    def rows(self, ids, context, *, dtype):
        return self.whole(context, dtype=dtype)[ids]

    def merged(self):
        return FloatWeight(self.codes[...].astype(jnp.float32) * self.scales[..., None, :], axes=self.axes)


def layout(**sizes) -> Layout:
    config = MeshConfig(**sizes)
    devices = jax.devices()[: config.data * config.fsdp * config.expert * config.tensor]
    return Layout(make_mesh(config, devices=devices), config.zero_stage)


def placed(tree: ModelTree, values, where: Layout):
    return jax.device_put(values, jax.tree.map(where.named, tree.specs(where.parameter)))


@pytest.fixture(scope="module")
def packed():
    """The model's tree, what of it is trained and frozen, and all parameters."""
    model = with_weights(build(CONFIG), CHOSEN, Int8)
    tree = ModelTree.of(model)
    return tree, *tree.split(), nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_what_is_not_float_is_frozen(packed):
    tree, trained, frozen, values = packed
    without_values = nnx.eval_shape(lambda model: with_weights(model, CHOSEN, Int8), abstract(CONFIG))
    assert tree.shapes == ModelTree.of(without_values).shapes
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trained.shapes)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen.shapes)} == {"int8"}
    assert len(jax.tree.leaves(trained.shapes)) + len(jax.tree.leaves(frozen.shapes)) == len(jax.tree.leaves(values))
    # Of 12 D^2 weights in a layer 8 D^2 take a byte, and each of their 5 D outputs has a scale.
    plain = tensor_bytes(ModelTree.of(abstract(CONFIG)).shapes)
    assert tensor_bytes(tree.shapes) == plain - 3 * (3 * 8 * 24**2 - 4 * 5 * 24)


def test_adapters_stand_on_it():
    model = nnx.eval_shape(lambda model: with_weights(model, CHOSEN, Int8), abstract(CONFIG))
    tree = ModelTree.of(with_adapters(model, LoRAConfig(rank=2, targets=r"mlp\.up\.kernel")))
    names = {name for layers, _ in leaf_names(tree.shapes, tree.segments) for name in layers}
    parts = {name.removeprefix("layers.2.mlp.up.") for name in names if name.startswith("layers.2.mlp.up.")}
    assert parts == {"bias", "kernel.codes", "kernel.scales", "lora_a", "lora_b"}
    trained, _ = tree.split(is_adapter)
    assert len(jax.tree.leaves(trained.shapes)) == 2 * len(CONFIG.segments)


def test_gradients_of_the_float_part_on_a_mesh_are_those_of_one_device(packed):
    tree, trained, frozen, values = packed
    tokens = make_tokens((4, 8))

    def run(where: Layout):
        def loss(part, rest):
            features, _ = nnx.merge(tree.graph, joined(part, rest)).features(tokens, layout=where)
            return jnp.square(features).mean()

        parts = (placed(part, _part(values, part.shapes), where) for part in (trained, frozen))
        return jax.jit(jax.value_and_grad(loss))(*parts)

    loss, want = run(layout(data=1))
    other, got = run(layout(data=1, fsdp=2, expert=2, tensor=2, zero_stage=3))
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())  # sums in another order
    assert all(np.abs(leaf).max() > 0 for name, leaf in to_named(want, tree.segments).items() if "scales" in name)


def _part(values, shapes):
    """The values of those leaves that `shapes` has."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(values)}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[jax.tree_util.keystr(path)], shapes)


def test_a_checkpoint_goes_to_another_mesh_and_a_file_holds_the_same(packed, tmp_path):
    tree, _, _, values = packed
    first, second = layout(data=1, fsdp=4, zero_stage=3), layout(data=1, tensor=2)
    named = to_named(placed(tree, values, first), tree.segments)
    assert named["layers.2.mlp.up.kernel.codes"].dtype == jnp.int8
    assert named["layers.2.mlp.up.kernel.scales"].shape == (96,)
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    store.save(1, named, clocks={})
    store.close()
    shardings = jax.tree.map(second.named, tree.specs(second.parameter))
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree.shapes, shardings)
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    found = store.restore(1, abstract_named(shapes, tree.segments))
    restored = from_named(found.__getitem__, shapes, tree.segments)
    store.close()
    for want, got, sharding in zip(*map(jax.tree.leaves, (values, restored, shardings)), strict=True):
        assert got.dtype == want.dtype and got.sharding.is_equivalent_to(sharding, got.ndim)
        np.testing.assert_array_equal(got, want)
    write_file(tmp_path / "x.safetensors", {name: np.asarray(x) for name, x in named.items()}, metadata={})
    read = {name: read_tensor(info) for name, info in read_header(tmp_path / "x.safetensors").items()}
    assert read.keys() == named.keys()
    assert all(read[name].dtype == x.dtype and (read[name] == np.asarray(x)).all() for name, x in named.items())


def test_it_is_the_model_that_it_was_but_for_rounding(packed):
    tree, _, _, values = packed
    tokens, model = make_tokens((2, 8)), nnx.merge(packed[0].graph, packed[3])
    merged = with_weights(nnx.merge(tree.graph, values), lambda _: True, lambda weight: weight.merged())
    want, got = np.asarray(build(CONFIG)(tokens)), np.asarray(model(tokens))
    np.testing.assert_allclose(np.asarray(merged(tokens)), got, atol=1e-4 * np.abs(got).max())
    assert 1e-4 < np.abs(got - want).max() / np.abs(want).max() < 0.1
