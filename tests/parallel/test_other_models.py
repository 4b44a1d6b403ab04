"""A model that is no Transformer goes through everything: shardings, names, a step on eight devices, the planner.

It classifies a text by its words without their order. Its dataclass, its FAMILY and its line in the registry are all
that it needs; the reference is in float64 and written by hand.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.config.run import RunConfig
from dsjax.data.config import DataConfig
from dsjax.layers.context import Context
from dsjax.layers.embedding import Embedding
from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive
from dsjax.layers.statistics import Auxiliary
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import ONE_DEVICE
from dsjax.models.families.build import check_divisible
from dsjax.models.families.family import Family
from dsjax.models.families.registry import FAMILIES, Registered
from dsjax.models.naming import abstract_named, from_named, to_named
from dsjax.plan.plan import plan
from dsjax.setup.config import TrainConfig
from tests.helpers import MESHES, ONE, assert_close, make_training


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BagConfig:
    """Words, hidden units, classes."""

    kind: Literal["bag"] = "bag"
    vocab_size: int = 64
    model_dim: int = 16
    hidden_dim: int = 32
    task: Literal["classification"] = "classification"
    num_labels: int = 3
    init_from: str = ""
    num_layers: ClassVar[int] = 1
    filled_in: ClassVar[dict[str, int]] = {}
    segment_lengths: ClassVar[tuple[int, ...]] = ()
    dropout: ClassVar[float] = 0.0
    attention_dropout: ClassVar[float] = 0.0
    compute_dtype: ClassVar[str] = "float32"
    remat: ClassVar[str] = "none"


@dataclasses.dataclass(frozen=True)
class BagDescription:
    """Its sizes, and all that others ask before it is built."""

    vocab_size: int
    model_dim: int
    hidden_dim: int
    max_positions: ClassVar[int] = 0
    attention_dim: ClassVar[int] = 0
    causal: ClassVar[bool] = False
    tied: ClassVar[bool] = False

    @property
    def divided_by_tensor(self):
        return {"vocab_size": self.vocab_size, "hidden_dim": self.hidden_dim}

    def segments(self, lengths):
        return ()

    def on_one_device(self, tensor):
        return BagDescription(self.vocab_size // tensor, self.model_dim, self.hidden_dim // tensor)

    def sums_over_tensor(self, layout, *, remat):
        return 1.0  # the embedding; what comes after is one vector a row


class Bag(nnx.Module):
    """mean(tanh(E[tokens] U)) V."""

    def __init__(self, config, description, *, key):
        self.config, self.description = config, description
        dim, hidden = description.model_dim, description.hidden_dim
        self.embed = Embedding(description.vocab_size, dim=dim, rows="vocab", key=derive(key, "embed"), std=0.5)
        linear = functools.partial(Linear, std=0.5, use_bias=False)
        self.up = linear((dim, hidden), ("embed", "mlp"), key=derive(key, "up"))
        self.classifier = linear((hidden, config.num_labels), ("mlp", "labels"), key=derive(key, "classifier"))

    segment_specs = ()

    def features(self, tokens, *, layout=ONE_DEVICE, **unused):
        context = Context(layout=layout)
        h_BTF = jnp.tanh(self.up(self.embed(tokens, context, dtype="float32"), context))
        return layout.activation(h_BTF, None, "mlp"), {}

    def auxiliary(self, statistics):
        return Auxiliary()

    def classify(self, x_BTF, mask, *, keys=None, layout=ONE_DEVICE):
        mean = (x_BTF * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]
        return self.classifier(mean, Context(layout=layout))


FAMILY = Family(
    tasks=("classification",),
    architecture=lambda config: BagDescription(config.vocab_size, config.model_dim, config.hidden_dim),
    build=Bag,
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "bag", Registered(BagConfig, __name__))
        yield


def rows_of_texts() -> dict[str, np.ndarray]:
    """Sixteen texts of 1 to 16 words."""
    rng = np.random.default_rng(0)
    real = np.arange(16) < np.arange(1, 17)[:, None]
    return {
        "tokens": (rng.integers(0, 64, (16, 16)) * real).astype(np.int32),
        "segments": real.astype(np.int32),
        "labels": rng.integers(0, 3, 16).astype(np.int32),
        "loss_mask": np.ones(16, bool),
    }


def loss_and_gradients(params: dict[str, np.ndarray], rows: dict[str, np.ndarray]):
    """The mean of the rows' losses and its gradient by name, in float64."""
    names = ("embed.table", "up.kernel", "classifier.kernel")
    table, up, down = (params[name].astype(np.float64) for name in names)
    real = rows["segments"] > 0
    weight = (real / real.sum(1, keepdims=True))[..., None]
    words = table[rows["tokens"]]
    hidden = np.tanh(words @ up)
    mean = (weight * hidden).sum(1)
    z = mean @ down
    chances = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    onehot = np.eye(z.shape[1])[rows["labels"]]
    d_z = (chances - onehot) / len(z)
    d_hidden = weight * (d_z @ down.T)[:, None] * (1 - hidden**2)
    d_table = np.zeros_like(table)
    np.add.at(d_table, rows["tokens"], d_hidden @ up.T)
    gradients = dict(zip(names, (d_table, np.einsum("btd,btf->df", words, d_hidden), mean.T @ d_z), strict=True))
    return -np.log((chances * onehot).sum(1)).mean(), gradients


def test_its_parameters_are_split_by_the_names_of_their_dimensions():
    training = make_training(MESHES["all"], BagConfig())
    both = ("tensor", "fsdp", "expert")
    assert training.model.specs(training.layout.parameter) == {
        "embed": {"table": PartitionSpec(both, None)},
        "up": {"kernel": PartitionSpec(None, both)},
        "classifier": {"kernel": PartitionSpec(both, None)},
    }
    check_divisible(BagConfig(), {"tensor": 2})
    with pytest.raises(ValueError, match=r"tensor = 3 does not divide model.vocab_size = 64, model.hidden_dim = 32"):
        check_divisible(BagConfig(), {"tensor": 3})


def test_a_step_on_eight_devices_is_that_of_the_reference_in_float64():
    training, rows = make_training(MESHES["all"], BagConfig()), rows_of_texts()
    state = training.fresh_state()
    before = training.named(state.params)
    assert_close(training.named(make_training(ONE, BagConfig()).fresh_state().params), before, 0, what="first weights")
    gradients, metrics = training.gradient(state, rows, accumulation=2)
    loss, want = loss_and_gradients(before, rows)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    # Float32 sums in another order.
    assert_close(training.named(gradients), want, 1e-5, what="gradients")
    state, metrics = training.update(state, gradients, metrics["loss"])
    assert bool(metrics["finite"])
    moved = training.named(state.params)
    assert loss_and_gradients(moved, rows)[0] < loss
    # Through a checkpoint's names and back onto the mesh.
    named = to_named(state.params, ())
    assert named.keys() == {"embed.table", "up.kernel", "classifier.kernel"} == abstract_named(state.params, ()).keys()
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        training.model.shapes,
        training.shardings.params,
    )
    again = from_named(dict(named).pop, shapes, ())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, state.params))


def test_the_planner_counts_it():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3)
    train = TrainConfig(steps=1, batch_size=16, accumulation=2)
    needs = plan(RunConfig(model=BagConfig(), mesh=mesh, data=DataConfig(sequence_length=32), train=train))
    table, up, classifier = 64 * 16, 16 * 32, 32 * 3
    assert needs.num_parameters == table + up + classifier
    assert needs.memory.parameters == 4 * needs.num_parameters // 4  # over fsdp and tensor
    # Of the matrices each word meets U alone, three times in a step.
    assert needs.model_flops == 6 * up * 16 * 32
    moved = {row.axis: row.bytes for row in needs.traffic if row.what.startswith(("reduce", "sum"))}
    assert moved["data"] == 4 * needs.num_parameters // 4 + 8
    # Each of two micro-batches has 2 rows on a device, and sums one [2, 32, 16] and three [2, 32] over `tensor`.
    assert moved["tensor"] == 2 * (2 * 32 * 16 + 3 * 2 * 32) * 4
