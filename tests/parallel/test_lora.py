"""LoRA in training: only adapters move, on any mesh alike, and what is kept of them is the adapter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsjax.config.run import RunConfig
from dsjax.data.config import ByteTokenizer, DataConfig
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models import adapter_training as lora
from dsjax.models.config import LoRAConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.build import create, segments_of
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.pretrained import save_pretrained
from dsjax.models.naming import to_named
from dsjax.setup.assembly import assemble, first_state
from dsjax.setup.config import TrainConfig
from dsjax.setup.placement import training_placement
from dsjax.setup.step import GradientInputs
from tests.helpers import FAST, assert_close, make_rows

SIZES = {"vocab_size": 64, "num_layers": 2, "model_dim": 32, "num_heads": 8, "mlp_dim": 48, "segments": (2,)}
LLAMA = LlamaConfig(num_kv_heads=2, **SIZES)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=r"(attention\.(q|v|out)|mlp\.(up|down))\.kernel")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model."""
    path = tmp_path_factory.mktemp("base") / "llama"
    save_pretrained(create(dataclasses.replace(LLAMA, init_std=0.2), key=jax.random.key(1)), path)
    return path


class Run:
    """A few steps with adapters on a mesh."""

    def __init__(self, config, mesh: MeshConfig, *, lora_config=LORA):
        sizes = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
        self.config, self.layout = config, Layout(make_mesh(mesh, devices=jax.devices()[:sizes]), mesh.zero_stage)
        data, train = DataConfig(sequence_length=16, tokenizer=ByteTokenizer()), TrainConfig(steps=1, batch_size=16)
        setup = assemble(RunConfig(model=config, lora=lora_config, data=data, train=train), layout=self.layout)
        self.model, self.programs = setup.model, setup.programs
        self.state, self.frozen = first_state(setup)

    def step(self, rows, *, accumulation=1):
        batch = training_placement(self.layout, batch_size=len(rows["tokens"]), accumulation=accumulation)(rows)
        inputs = GradientInputs(self.state.params, self.state.key, self.state.step, batch, self.frozen)
        gradients, metrics = _fast(self.programs.gradient, inputs)
        update = (self.state, gradients, metrics["loss"], jnp.float32(1e-2))
        self.state, _ = _fast(self.programs.updates["full"], *update)
        return float(metrics["loss"]), self.named(gradients)

    def named(self, tree):
        return {name: np.asarray(value) for name, value in to_named(tree, segments_of(self.config)).items()}


def _fast(program, *arguments):
    return program.lower(*arguments).compile(compiler_options=FAST)(*arguments)


def of(base):
    return dataclasses.replace(LLAMA, init_from=str(base))


def test_only_adapters_move_and_only_they_have_optimizer_state(base):
    run = Run(of(base), MeshConfig(data=1))
    before = run.named(run.frozen)
    first = run.named(run.state.params)
    losses = [run.step(make_rows(seed=0))[0] for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01
    after = run.named(run.frozen)
    assert all((after[name] == before[name]).all() for name in before) and not any("lora" in name for name in before)
    names = set(run.named(run.state.params))
    parts = ("attention.q", "attention.v", "attention.out", "mlp.up", "mlp.down")
    assert names == {f"layers.{i}.{part}.lora_{x}" for i in range(2) for part in parts for x in "ab"}
    moved = run.named(run.state.params)
    assert all((moved[name] != first[name]).any() for name in names)
    size = sum(leaf.size for leaf in jax.tree.leaves(run.state.params))
    assert sum(leaf.size for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim) == 2 * size  # Adam's moments


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3),
        pytest.param(MeshConfig(data=1, tensor=8, zero_stage=0), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=4, fsdp=2, zero_stage=2), marks=pytest.mark.slow),
    ],
    ids=["all", "tensor", "zero2"],
)
def test_a_mesh_changes_nothing(base, mesh):
    one, many = Run(of(base), MeshConfig(data=1)), Run(of(base), mesh)
    assert all(
        (a == b).all() for a, b in zip(*(run.named(run.state.params).values() for run in (one, many)), strict=True)
    )
    for seed in range(2):
        rows = make_rows(seed=seed)
        want, gradients = one.step(rows)
        got, other = many.step(rows, accumulation=2)
        assert abs(got - want) < 2e-6 * want
        # Sums in another order: 2e-5. After Adam's first step, whose size is that of the learning rate however small a
        # gradient is, the parameters themselves differ a little.
        assert_close(other, gradients, 2e-5 if seed == 0 else 2e-3, what=f"step {seed}")
    a = many.state.params["segments"][0][0]["attention"]["out"]["kernel"]["lora_a"]
    b = many.state.params["segments"][0][0]["attention"]["q"]["kernel"]["lora_b"]
    if mesh.tensor > 1 and mesh.zero_stage == 0:  # split as their kernels are: by rows and by heads
        assert a.sharding.spec == PartitionSpec(None, "tensor", None)
        assert b.sharding.spec == PartitionSpec(None, None, "tensor", None)


def test_a_classifier_is_trained_beside_its_adapters(tmp_path):
    config = BertConfig(**SIZES, max_positions=16)
    save_pretrained(create(config, key=jax.random.key(0)), tmp_path / "bert")
    config = dataclasses.replace(config, task="classification", init_from=str(tmp_path / "bert"))
    trained, frozen = lora.split_model(config, LoRAConfig(targets=r"attention\.q\.kernel"))
    assert set(trained.shapes) == {"segments", "classifier", "pooler"}  # the weights hold a language model's head
    assert set(frozen.shapes) == {"segments", "embed", "positions", "token_types", "embed_norm"}
    params, rest = lora.first_params(
        config, trained, Layout(make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])), seed=0
    )
    assert jax.tree.structure(params) == jax.tree.structure(trained.shapes)
    assert jax.tree.structure(rest) == jax.tree.structure(frozen.shapes)
    assert float(jnp.abs(params["classifier"]["kernel"]).max()) > 0


def test_there_must_be_something_to_adapt():
    with pytest.raises(ValueError, match=r"lora adapts weights that exist: give model.init_from"):
        lora.split_model(LLAMA, LORA)
