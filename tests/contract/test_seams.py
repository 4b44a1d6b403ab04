"""The seams: a feed-forward with its own loss and metric, a weight storage, an objective, its row format, and a family.

Each is one definition and one name, nothing else is touched, and they train on a mesh as any run does.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dsjax.train
from dsjax.config.run import RunConfig
from dsjax.data.config import ByteTokenizer, DataConfig, TextSource
from dsjax.data.rows.format import ArraySpec
from dsjax.data.rows.formats import FORMATS
from dsjax.data.rows.packed import PackedFormat
from dsjax.layers.cross_entropy import logits
from dsjax.layers.feed_forward import DenseSpec
from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive, use
from dsjax.layers.statistics import Auxiliary
from dsjax.layers.weight import FloatWeight
from dsjax.mesh.config import MeshConfig
from dsjax.models.adapters import with_weights
from dsjax.models.architecture import Architecture, sizes
from dsjax.models.families.config import TransformerConfig
from dsjax.models.families.family import Family
from dsjax.models.families.registry import FAMILIES, Registered
from dsjax.models.feed_forwards import FEED_FORWARDS
from dsjax.models.stack import BlockSpec
from dsjax.models.transformer import Transformer
from dsjax.objectives.api import features
from dsjax.objectives.language_model import LanguageModel
from dsjax.objectives.registry import OBJECTIVES
from dsjax.setup.config import TrainConfig

EXPERTS = 4


@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """A feed-forward: all experts, mixed by a router; balanced by E sum_e p_e^2 over all layers."""

    hidden_dim: int

    def on_one_device(self, tensor):
        return MixtureSpec(self.hidden_dim // tensor)

    def from_statistics(self, statistics):
        share = statistics["load"].sum(0) / statistics["tokens"].sum()
        return Auxiliary({"balance": 0.1 * EXPERTS * (share**2).sum()}, {"busiest": share.max()})


class Mixture(nnx.Module):
    def __init__(self, spec, dim, *, key, std, residual_scale):
        shape, std_down = (EXPERTS, dim, spec.hidden_dim), std * residual_scale
        self.router = Linear((dim, EXPERTS), ("embed", "out"), key=derive(key, "router"), std=1.0)
        self.up = FloatWeight.normal(derive(key, "up"), shape, ("experts", "embed", "mlp"), std=std)
        self.down = Linear((spec.hidden_dim, dim), ("mlp", "embed"), key=derive(key, "down"), std=std_down)

    def __call__(self, x_BTD, context):
        chances = jax.nn.softmax(self.router(x_BTD, context))
        hidden = jnp.einsum("btd,edf,bte->btf", x_BTD, use(self.up, context, x_BTD.dtype), chances)
        load = jnp.where(context.valid[..., None], chances, 0).sum((0, 1))
        return self.down(jnp.tanh(hidden), context), {"load": load, "tokens": context.valid.sum(dtype=jnp.int32)}


class Turned(nnx.Module):
    """A way to store a weight: as its transpose. (No adapter and no table asks for more than this.)"""

    def __init__(self, weight):
        self.turned = nnx.Param(jnp.swapaxes(weight[...], -1, -2), axes=weight.axes[::-1])

    def whole(self, context, *, dtype):
        return use(self.turned, context, dtype).T

    def apply(self, x, context):
        return x @ self.whole(context, dtype=x.dtype)


class WeightedFormat(PackedFormat):
    """A row format: packed rows whose later positions count less."""

    def spec(self, rows):
        return {**super().spec(rows), "weights": ArraySpec((*rows, self.sequence_length), np.dtype(np.float32))}

    def training(self, batch, draws):
        return {**batch, "weights": 1 / (1 + batch["positions"].astype(np.float32))}


class WeightedWords(LanguageModel):
    """An objective: the next token, weighted by its row's array."""

    name = "weighted"

    def trains(self, config):
        return config.kind == "toy"

    def sums(self, model, batch, *, keys=None, dropping=None, layout):
        x_BTD, statistics = features(model, batch, keys=keys, dropping=dropping, layout=layout)
        x_BTD, table, bias = model.logit_inputs(x_BTD, layout=layout)
        chances = jax.nn.log_softmax(logits(x_BTD, table, bias))
        each = -jnp.take_along_axis(chances, batch["targets"][..., None], axis=-1)[..., 0]
        mask, weights = batch["loss_mask"], batch["weights"]
        return {"loss": (each * weights * mask).sum(), "count": mask.sum(dtype=jnp.int32)}, statistics


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig(TransformerConfig):
    """A family: dense and mixed layers in turn, each `up` of a dense one turned."""

    kind: str = "toy"


def architecture(config):
    kinds = (BlockSpec(DenseSpec(config.hidden_dim)), BlockSpec(MixtureSpec(config.hidden_dim)))
    return Architecture(**sizes(config), positions="alibi", layers=kinds * (config.num_layers // 2))


def build(config, architecture, *, key):
    return with_weights(Transformer(config, architecture, key=key), lambda name: name == "mlp.up.kernel", Turned)


FAMILY = Family(tasks=("language_model",), architecture=architecture, build=build)


def test_one_of_each_trains_on_a_mesh(tmp_path, monkeypatch):
    for registry, name, thing in (
        (FEED_FORWARDS, MixtureSpec, Mixture), (FORMATS, "weighted", WeightedFormat.of),
        (OBJECTIVES, "weighted", WeightedWords()), (FAMILIES, "toy", Registered(ToyConfig, __name__)),
    ):  # fmt: skip
        monkeypatch.setitem(registry, name, thing)
    (tmp_path / "text.txt").write_text("A line of words for rows. " * 40)
    data = DataConfig(
        sources=(TextSource(path=str(tmp_path / "text.txt")),), tokenizer=ByteTokenizer(), task="weighted",
        sequence_length=16, cache_dir=str(tmp_path / "cache"), validation_fraction=0,
    )  # fmt: skip
    config = RunConfig(
        mesh=MeshConfig(data=2, fsdp=2, expert=2, zero_stage=3), data=data, train=TrainConfig(steps=2, batch_size=8),
        model=ToyConfig(vocab_size=260, num_layers=4, model_dim=16, num_heads=2, segments=(4,)),
    )  # fmt: skip
    result = dsjax.train.run(config, run_dir=tmp_path / "run")
    first, second = map(json.loads, (result.folder / "metrics.jsonl").read_text().splitlines()[:2])
    # Near the start every expert has a quarter of the tokens, and every byte one chance in 260.
    assert 0.1 <= first["balance"] < 0.15 and 0.25 <= first["busiest"] < 0.5
    assert np.isfinite([first["loss"], second["loss"]]).all() and second["loss"] != first["loss"]
