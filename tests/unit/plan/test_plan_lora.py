"""The plan of a run with adapters, against the compiled programs and against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsjax.config.run import RunConfig
from dsjax.data.config import FileTokenizer
from dsjax.inference.convert import byte_tokenizer_file
from dsjax.models.config import LoRAConfig, PretrainedConfig
from dsjax.models.families.build import abstract
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.pretrained import save_pretrained
from dsjax.plan.compile import lower_programs, measure
from dsjax.plan.plan import plan
from dsjax.plan.table import plan_table
from dsjax.setup.assembly import assemble
from tests.unit.plan.plan_configs import config, layout_of

SHAPE = {"vocab_size": 260, "num_layers": 4, "model_dim": 64, "num_heads": 4, "max_positions": 32}
BASES = {"gpt2": GPT2Config(**SHAPE), "llama": LlamaConfig(**SHAPE, num_kv_heads=2, mlp_dim=160)}
TARGETS = {"gpt2": r"(attention\.(qkv|out)|mlp\.(up|down))\.kernel", "llama": r"attention\.(q|v)\.kernel"}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """name -> a run that trains adapters of rank 8 on that base; more as for `config`."""
    place = tmp_path_factory.mktemp("bases")
    for name, base in BASES.items():
        graph, state = nnx.split(abstract(base), nnx.Param)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(state))
        save_pretrained(nnx.merge(graph, zeros), place / name)
        byte_tokenizer_file().save(place / name)

    def make(name: str, **more) -> RunConfig:
        run = config(**more)
        data = dataclasses.replace(run.data, tokenizer=FileTokenizer(path=str(place / name)))
        model = PretrainedConfig(init_from=str(place / name))
        return dataclasses.replace(run, model=model, data=data, lora=LoRAConfig(rank=8, targets=TARGETS[name]))

    return make


@pytest.mark.parametrize(("name", "accumulation"), [("gpt2", 2), ("llama", 1)])
def test_one_device_against_xla(adapted, name, accumulation):
    run = adapted(name, accumulation=accumulation)
    layout, predicted = layout_of(run), plan(run, num_devices=1)
    for program, lowered in lower_programs(assemble(run, layout=layout)).items():
        found, ours = measure(lowered, dict(layout.mesh.shape)), getattr(predicted, program)
        assert ours.arguments == pytest.approx(found["arguments"], rel=0.02)
        assert ours.temporary == pytest.approx(found["temporary"], rel=0.25)


def test_only_adapters_cross_the_mesh(adapted):
    run = adapted("llama", data=2, fsdp=2, zero_stage=2, accumulation=2)
    layout, predicted = layout_of(run), plan(run)
    sizes = dict(layout.mesh.shape)
    found = [measure(lowered, sizes) for lowered in lower_programs(assemble(run, layout=layout)).values()]
    moved = sum(row.bytes for row in predicted.traffic)
    assert moved == pytest.approx(sum(sum(program["axes"].values()) for program in found), rel=0.02)
    # Reduced in each of two micro-batches, gathered when they are new, and in their shards over `data`; two scalars.
    assert moved == 4 * predicted.num_trained * (2 + 1 + 0.5) + 2 * 8


def test_what_is_frozen_is_held_once_and_has_no_moments(adapted):
    run = adapted("gpt2")
    full, lora = plan(dataclasses.replace(run, lora=None), num_devices=1), plan(run, num_devices=1)
    adapters = 4 * 8 * ((64 + 3 * 64) + (64 + 64) + (64 + 256) + (256 + 64))
    assert lora.num_trained == adapters and lora.num_parameters == full.num_parameters + adapters
    assert full.num_trained == full.num_parameters and full.memory.frozen == 0
    memory = lora.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * adapters, 4 * adapters, 8 * adapters + 4)
    assert memory.frozen == full.memory.parameters
    assert lora.peak == sum(vars(memory).values()) < full.peak
    assert f"({adapters:,} trained)" in plan_table(lora).renderables[0].title


def test_products_are_those_of_the_formula(adapted):
    """Of frozen kernels no gradient; in the first layer none of what goes into q, k and v, and none of k is needed."""
    needs = plan(adapted("llama"), num_devices=1)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    adapters = 8 * (64 + 64) + 8 * (64 + 32)
    per_token = 4 * (4 * layer + 64 * 260) + 6 * 4 * adapters + 12 * 4 * 64 * 32
    assert needs.model_flops == per_token * needs.step_tokens
    first = 2 * (64 * 64 + 2 * 64 * 32) + 2 * 2 * 64 * 8 + 2 * 64 * 32
    assert needs.step_flops == (per_token - first) * needs.step_tokens
