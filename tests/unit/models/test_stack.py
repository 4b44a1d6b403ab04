"""Segments of repeated patterns: the same model however it is cut, its names, and what its layers count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, PartitionSpec

from dsjax.layers.dropout import sample_keys
from dsjax.layers.feed_forward import Dense, DenseSpec
from dsjax.layers.random_ltd import Dropping
from dsjax.layers.weight import FloatWeight
from dsjax.mesh.config import AXES
from dsjax.mesh.layout import Layout
from dsjax.models.families.family import architecture_of
from dsjax.models.feed_forwards import FEED_FORWARDS
from dsjax.models.naming import to_named
from dsjax.models.stack import BlockSpec, cut, layer_numbers
from dsjax.models.transformer import Transformer
from dsjax.models.tree import ModelTree
from dsjax.optimizers.guard import first_not_finite
from dsjax.setup.step import squared_norms
from tests.helpers import FAST, TINY, from_flat

LAYERS, B, T = 7, 3, 8
KINDS = [BlockSpec(DenseSpec(width)) for width in (8, 16, 24)]


@settings(deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12), st.data())
def test_a_cut_keeps_the_layers_and_finds_the_shortest_pattern(layers, data):
    ends = sorted({*data.draw(st.sets(st.integers(1, len(layers)))), len(layers)})
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    segments = cut(layers, lengths)
    assert [segment.num_layers for segment in segments] == lengths
    assert [kind for segment in segments for kind in segment.pattern * segment.repeats] == layers
    for segment, numbers in zip(segments, layer_numbers(segments), strict=True):
        whole = segment.pattern * segment.repeats
        for size in range(1, len(segment.pattern)):  # no shorter one repeats
            assert segment.num_layers % size or any(whole[i] != whole[i % size] for i in range(len(whole)))
        assert [[layers[n] for n in each] for each in numbers] == [[k] * segment.repeats for k in segment.pattern]
    flat = sorted(number for segment in layer_numbers(segments) for numbers in segment for number in numbers)
    assert flat == list(range(len(layers)))


@dataclasses.dataclass(frozen=True)
class CountingSpec:
    """A dense layer that counts: its tokens, and sums of its output's first two values."""

    dense: DenseSpec

    def on_one_device(self, tensor):
        return CountingSpec(self.dense.on_one_device(tensor))


class Counting(Dense):
    def __init__(self, spec, dim, **options):
        super().__init__(spec.dense, dim, **options)

    def __call__(self, x_BTD, context):
        y_BTD, _ = super().__call__(x_BTD, context)
        valid = jnp.ones(x_BTD.shape[:2], bool) if context.valid is None else context.valid
        sums = jnp.where(valid[..., None], y_BTD[..., :2], 0).sum((0, 1))
        return y_BTD, {"tokens": valid.sum(), "sums": sums, "number": jnp.asarray(context.number)}


PAIR = (BlockSpec(CountingSpec(DenseSpec(16))), BlockSpec(DenseSpec(24, gated=True, use_bias=False)))


@pytest.fixture(autouse=True, scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FEED_FORWARDS, CountingSpec, Counting)
        yield


def model_of(lengths, *, remat="none"):
    """A dense layer, then pairs of one that counts and one that has a gate; abstract."""
    config = dataclasses.replace(TINY, num_layers=LAYERS, segments=lengths, dropout=0.0, remat=remat)
    layers = (BlockSpec(DenseSpec(8)), *PAIR * 3)
    architecture = dataclasses.replace(architecture_of(config), layers=layers)
    return nnx.eval_shape(lambda: Transformer(config, architecture, key=jax.random.key(0)))


def run(model, named, *, dropping=None, valid=None):
    """Features, their gradient by name, and statistics."""
    tree, tokens = ModelTree.of(model), jnp.asarray(np.random.default_rng(1).integers(0, 64, (B, T)))
    params = jax.tree.map(jnp.asarray, from_flat(named, tree.shapes, tree.segments))

    def loss(params):
        x_BTD, statistics = nnx.merge(tree.graph, params).features(tokens, dropping=dropping, valid=valid)
        weights = jnp.cos(jnp.arange(x_BTD.size).reshape(x_BTD.shape))
        # A loss of the statistics, too: their gradient goes back through the scan.
        return jnp.sum(x_BTD * weights) + jnp.sum(statistics["sums"] ** 2), (x_BTD, statistics)

    program = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)
    gradient, (x_BTD, statistics) = program(params)
    return np.asarray(x_BTD), to_named(gradient, tree.segments), {name: np.asarray(x) for name, x in statistics.items()}


@pytest.fixture(scope="module")
def named(registered):
    tree, rng = ModelTree.of(model_of((1,) * LAYERS)), np.random.default_rng(0)
    shapes = zip(tree.tensor_names(), jax.tree.leaves(tree.shapes), jax.tree.leaves(tree.leading), strict=True)
    return {name: (0.3 * rng.standard_normal(x.shape[first:])).astype(np.float32) for name, x, first in shapes}


@pytest.fixture(scope="module")
def apart(named):
    """Every layer by itself: nothing is scanned."""
    return run(model_of((1,) * LAYERS), named)


@pytest.mark.parametrize(("lengths", "remat"), [((1, 6), "none"), ((3, 4), "full")])
def test_a_pattern_computes_what_its_layers_compute(named, apart, lengths, remat):
    """(counting, gated) x 3 after the first layer; and 3 layers that repeat nothing, then (gated, counting) x 2."""
    x_BTD, gradient, statistics = run(model_of(lengths, remat=remat), named)
    want_BTD, wanted, counted = apart
    # Other fusions of float32; the stack is seven layers deep.
    np.testing.assert_allclose(x_BTD, want_BTD, atol=1e-5 * np.abs(want_BTD).max())
    assert gradient.keys() == wanted.keys() == named.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(gradient[name], value, atol=1e-4 * np.abs(value).max() + 1e-6, err_msg=name)
    assert statistics["number"].tolist() == counted["number"].tolist() == [1, 3, 5]  # the layers that count, in order
    assert statistics["tokens"].tolist() == [B * T] * 3
    np.testing.assert_allclose(statistics["sums"], counted["sums"], rtol=1e-4, atol=1e-4)
    assert statistics["sums"].shape == (3, 2) and np.ptp(statistics["sums"][:, 0]) > 0.1


def test_a_segment_is_one_scan():
    tree = ModelTree.of(model_of((1, 6)))
    forward = lambda params: nnx.merge(tree.graph, params).features(jnp.zeros((B, T), int))
    scans = [eqn for eqn in jax.make_jaxpr(forward)(tree.shapes).eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [3]
    shapes = tree.shapes["segments"][1]
    assert shapes[0]["mlp"]["up"]["kernel"].shape == (3, 32, 16) and shapes[1]["mlp"]["gate"]["kernel"].shape[0] == 3


def test_only_real_tokens_are_counted_also_where_tokens_are_dropped(named):
    """k = 3 of the first 6 positions in 5 slots, two of which are empty; then rows with padding in the second half."""
    keys = sample_keys(jax.random.key(3), jnp.int32(0), jnp.arange(B))
    dropping = Dropping(keys, range(1, 7), 5, jnp.int32(6), jnp.int32(3))
    model = model_of((1, 6))
    _, _, statistics = run(model, named, dropping=dropping)
    assert statistics["tokens"].tolist() == [3 * B] * 3
    valid = jnp.broadcast_to(jnp.arange(T) < T // 2, (B, T))
    _, _, statistics = run(model, named, dropping=dropping, valid=valid)
    kept = dropping.indices(jnp.array([1, 3, 5]), T)
    assert statistics["tokens"].tolist() == (kept < T // 2).sum((1, 2)).tolist()
    _, _, statistics = run(model, named, valid=valid)
    assert statistics["tokens"].tolist() == [B * T // 2] * 3


def test_statistics_of_workers_are_apart(named):
    """A vmap over workers with gradients inside, as in the gradient program: each worker has its own."""
    tree = ModelTree.of(model_of((1, 6)))
    params = jax.tree.map(jnp.asarray, from_flat(named, tree.shapes, tree.segments))
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 64, (2, B, T)))

    def loss(params, tokens):
        x_BTD, statistics = nnx.merge(tree.graph, params).features(tokens)
        return jnp.mean(x_BTD**2), statistics

    both = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, 0)), compiler_options=FAST)
    _, statistics = both(params, tokens)
    assert statistics["sums"].shape == (2, 3, 2) and statistics["tokens"].tolist() == [[B * T] * 3] * 2
    one = jax.jit(lambda params, tokens: loss(params, tokens)[1], compiler_options=FAST)
    for worker in range(2):
        want = one(params, tokens[worker])["sums"]
        np.testing.assert_allclose(statistics["sums"][worker], want, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """Three perceptrons of one layer, all of which see every token."""

    def on_one_device(self, tensor):
        return self


class Bank(nnx.Module):
    def __init__(self, spec, dim, *, key, std, residual_scale):
        self.bank = FloatWeight.normal(key, (3, dim, dim), ("experts", "embed", "out"), std=std * residual_scale)

    def __call__(self, x_BTD, context):
        return jnp.einsum("btd,edf->btf", x_BTD, self.bank[...]), {}


def test_a_tensor_is_one_layers_and_one_experts(monkeypatch):
    """Three layers of three experts: leading dimensions, specs, names of reports, and the array of a checkpoint."""
    monkeypatch.setitem(FEED_FORWARDS, BankSpec, Bank)
    config = dataclasses.replace(TINY, num_layers=4, segments=(1, 3))
    layers = (BlockSpec(DenseSpec(8)), *[BlockSpec(BankSpec())] * 3)
    architecture = dataclasses.replace(architecture_of(config), layers=layers)
    tree = ModelTree.of(nnx.eval_shape(lambda: Transformer(config, architecture, key=jax.random.key(0))))
    bank = lambda of: of["segments"][1][0]["mlp"]["bank"]
    assert bank(tree.shapes).shape == (3, 3, 32, 32) and bank(tree.leading) == 2
    assert tree.leading["segments"][0][0]["mlp"]["up"]["kernel"] == 1 and tree.leading["embed"]["table"] == 0
    layout = Layout(AbstractMesh((1, 2, 3, 1), AXES), zero_stage=3)
    assert bank(tree.specs(layout.gathered)) == PartitionSpec(None, "expert", None, None)
    assert bank(tree.specs(layout.parameter)) == PartitionSpec(None, "expert", "fsdp", None)

    names = tree.tensor_names()
    assert [name for name in names if "bank" in name] == [
        f"layers.{layer}.mlp.bank[{expert}]" for layer in (1, 2, 3) for expert in range(3)
    ]
    gradients = jax.tree.map(lambda x: np.ones(x.shape, np.float32), tree.shapes)
    bank(gradients)[1, 2, 5, 7] = np.nan
    squares = squared_norms(tree, gradients)
    assert bank(squares).shape == (3, 3)
    assert names[int(first_not_finite(jax.tree.leaves(squares)))] == "layers.2.mlp.bank[2]"
    saved = to_named({"params": gradients}, tree.segments)
    assert saved["params.layers.2.mlp.bank"].shape == (3, 32, 32) and "params.layers.0.mlp.up.kernel" in saved
