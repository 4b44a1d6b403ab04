"""Losses and metrics of the layers' statistics: against float64, weighted by targets, alike on meshes of the same W A.

The toy has two layers with a router whose balancing loss, like Mixtral's, averages over all layers before it
multiplies: E sum_e f_e P_e, of which no sum of per-layer losses is made.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.layers.context import Context
from dsjax.layers.feed_forward import Dense, DenseSpec
from dsjax.layers.parameter import use
from dsjax.layers.statistics import Auxiliary
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.families.family import architecture_of
from dsjax.models.feed_forwards import FEED_FORWARDS
from dsjax.models.stack import BlockSpec
from dsjax.models.transformer import Transformer
from dsjax.models.tree import ModelTree
from dsjax.objectives.language_model import LanguageModel
from dsjax.setup.placement import training_placement
from dsjax.setup.step import GradientInputs, StepOptions, make_gradient
from tests.helpers import TINY, make_rows

V, D, E, L = 64, 8, 4, 2
WEIGHT = 0.3
# Float32 against float64: sums of at most 256 tokens.
TOLERANCE = 1e-5


class Toy(nnx.Module):
    """Embedding, two scanned layers x + tanh(x W) P_0 with P = softmax(x R), and logits over the same table."""

    def __init__(self, values):
        self.table = nnx.Param(values["table"], axes=("vocab", "embed"))
        self.kernel = nnx.Param(values["kernel"], axes=("embed", "mlp"))
        self.router = nnx.Param(values["router"], axes=("embed", "labels"))
        self.segment_specs = ()

    def auxiliary(self, statistics):
        return auxiliary(statistics)


def auxiliary(statistics):
    tokens = statistics["count"].sum()
    hits, load = statistics["hits"].sum(0) / tokens, statistics["load"].sum(0) / tokens
    return Auxiliary({"balance": WEIGHT * E * (hits * load).sum()}, {"busiest": hits.max()})


def layer(x, kernel, router, valid):
    p = jax.nn.softmax(x @ router)
    hits = (p.argmax(-1)[..., None] == jnp.arange(E)) & valid[..., None]
    statistics = {
        "load": (p * valid[..., None]).sum((0, 1)),  # a NaN of the loss would go through this mask
        "hits": hits.sum((0, 1), dtype=jnp.int32),
        "count": valid.sum(dtype=jnp.int32),
    }
    return x + jnp.tanh(x @ kernel) * p[..., :1], statistics


def cross_entropy(x, table, batch):
    z = x @ table.T
    picked = jnp.where(jnp.arange(V) == batch["targets"][..., None], z, 0).sum(-1)
    return jnp.where(batch["loss_mask"], jax.nn.logsumexp(z, axis=-1) - picked, 0).sum()


class ToyObjective(LanguageModel):
    """The next token, with the statistics of the toy's layers."""

    def sums(self, model, batch, *, keys=None, dropping=None, layout):
        context, valid = Context(layout), batch["segments"] > 0
        table = use(model.table, context, jnp.float32)
        gather = lambda value, param: layout.gather(value, param.get_metadata("axes"))

        def body(x, weights):
            kernel, router = gather(weights[0], model.kernel), gather(weights[1], model.router)
            return layer(x, kernel, router, valid)

        x, statistics = jax.lax.scan(body, table[batch["tokens"]], (model.kernel[...], model.router[...]))
        sums = {"loss": cross_entropy(x, table, batch), "count": batch["loss_mask"].sum(dtype=jnp.int32)}
        return sums, statistics


def values():
    rng = np.random.default_rng(3)
    shapes = {"table": (V, D), "kernel": (L, D, D), "router": (L, D, E)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rows():
    """Unequal masks; the first four rows, a micro-batch when there are four, hold no token at all."""
    batch = make_rows()
    batch["segments"][:4], batch["loss_mask"][:4] = 0, False
    return batch


@functools.cache
def oracle(parts: tuple[tuple[int, ...], ...]):
    """In float64, of micro-batches by their rows: the loss, each metric, and the gradient of loss + balance."""
    batch = rows()

    def total(params):
        shown, count = {"loss": 0.0, "balance": 0.0, "busiest": 0.0}, batch["loss_mask"][np.concatenate(parts)].sum()
        for part in parts:
            one = {name: value[np.array(part)] for name, value in batch.items()}
            number = one["loss_mask"].sum()
            if not number:
                continue
            x, each = params["table"][one["tokens"]], []
            for kernel, router in zip(params["kernel"], params["router"], strict=True):
                x, statistics = layer(x, kernel, router, one["segments"] > 0)
                each.append(statistics)
            found = auxiliary({name: jnp.stack([s[name] for s in each]) for name in each[0]})
            shown["loss"] += cross_entropy(x, params["table"], one) / count
            shown["balance"] += found.losses["balance"] * (number / count)
            shown["busiest"] += found.metrics["busiest"] * (number / count)
        return shown["loss"] + shown["balance"], shown

    with jax.enable_x64(True):
        params = {name: jnp.asarray(value, jnp.float64) for name, value in values().items()}
        gradient, shown = jax.grad(total, has_aux=True)(params)
        return jax.device_get(gradient), jax.device_get(shown)


def step(mesh: MeshConfig, accumulation: int, **options):
    """Gradients and metrics of the toy on a mesh."""
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.expert * mesh.tensor]
    layout = Layout(make_mesh(mesh, devices=devices), mesh.zero_stage)
    model = ModelTree.of(Toy(values()))
    params = jax.device_put(values(), jax.tree.map(layout.named, model.specs(layout.parameter)))
    batch = training_placement(layout, batch_size=16, accumulation=accumulation)(rows())
    program = make_gradient(model, layout, StepOptions(objective=ToyObjective()), **options)
    return jax.device_get(jax.jit(program)(GradientInputs(params, jax.random.key(0), jnp.int32(0), batch)))


def assert_near(got, want, tolerance=TOLERANCE):
    for name, value in want.items():
        assert np.isfinite(got[name]).all()
        np.testing.assert_allclose(got[name], value, atol=tolerance * np.abs(value).max(), rtol=0, err_msg=name)


FOUR = tuple(tuple(range(n, n + 4)) for n in range(0, 16, 4))
MESHES = {
    "one": (MeshConfig(data=1), 4),
    "workers": (MeshConfig(data=4), 1),
    "all": (MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3), 2),
    "expert": (MeshConfig(data=1, fsdp=2, expert=2, zero_stage=2), 4),
}


@pytest.mark.parametrize("name", MESHES)
def test_four_micro_batches_are_weighted_by_their_targets_on_every_mesh(name):
    gradients, metrics = step(*MESHES[name], per_worker=False)
    want, shown = oracle(FOUR)
    assert_near(gradients, want)
    assert_near({**metrics["auxiliary"], "loss": metrics["loss"]}, shown)
    # The mean of unweighted losses would be something else, and so would one micro-batch.
    assert abs(shown["balance"] - oracle((tuple(range(16)),))[1]["balance"]) > 1e-3


def test_gradients_of_each_worker_average_to_the_gradient():
    gradients, metrics = step(MeshConfig(data=2), 2, per_worker=True)
    want, shown = oracle(FOUR)
    assert_near({name: value.mean(0) for name, value in gradients.items()}, want)
    assert_near(metrics["auxiliary"], {name: shown[name] for name in ("balance", "busiest")})


def test_workers_that_do_not_talk_weigh_by_their_own_targets():
    gradients, metrics = step(MeshConfig(data=2), 2, per_worker=True, local=True)
    for worker in range(2):
        want, shown = oracle(FOUR[2 * worker : 2 * worker + 2])
        own = lambda tree, worker=worker: {name: value[worker] for name, value in tree.items()}
        if worker == 0:  # half of its micro-batches have no token
            assert metrics["tokens"][0] == rows()["loss_mask"][4:8].sum()
        assert_near(own({"loss": metrics["loss"], **metrics["auxiliary"]}), shown)
        assert_near(own(gradients), want)


@dataclasses.dataclass(frozen=True)
class NamedSpec(DenseSpec):
    """A dense layer's settings with a loss of its own name."""

    name: str = ""

    def from_statistics(self, statistics):
        return Auxiliary({self.name: statistics[self.name].sum()}, {f"most_{self.name}": statistics[self.name].max()})


def test_every_kind_of_layer_gives_its_losses_once(monkeypatch):
    monkeypatch.setitem(FEED_FORWARDS, NamedSpec, Dense)

    def model(*names):
        layers = tuple(BlockSpec(NamedSpec(8 + number, name=name)) for number, name in enumerate(names))
        config = dataclasses.replace(TINY, num_layers=2 * len(names), segments=(2 * len(names),))
        architecture = dataclasses.replace(architecture_of(config), layers=layers * 2)
        return nnx.eval_shape(lambda: Transformer(config, architecture, key=jax.random.key(0)))

    found = model("a", "b").auxiliary({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 5.0])})
    assert (found.losses, found.metrics) == ({"a": 3, "b": 8}, {"most_a": 2, "most_b": 5})
    with pytest.raises(ValueError, match="have one name, a, most_a: rename one of each"):
        model("a", "a").auxiliary({"a": jnp.array([1.0, 2.0])})


def test_a_metric_with_a_name_that_is_taken_is_refused():
    class Clash(ToyObjective):
        def from_statistics(self, model, statistics):
            found = super().from_statistics(model, statistics)
            return dataclasses.replace(found, metrics={"grad_norm": found.metrics["busiest"]})

    layout, model = Layout(make_mesh(MeshConfig(data=1), devices=jax.devices()[:1]), 0), ModelTree.of(Toy(values()))
    program = make_gradient(model, layout, StepOptions(objective=Clash()), per_worker=False)
    batch = training_placement(layout, batch_size=16, accumulation=1)(rows())
    with pytest.raises(ValueError, match="names that are taken, grad_norm: rename them"):
        jax.eval_shape(program, GradientInputs(model.shapes, jax.random.key(0), jnp.int32(0), batch))
