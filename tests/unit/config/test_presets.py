"""Every file under configs/ loads, says what it is for, and has the published sizes; runs divide over their meshes."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.config.load import decode, load_run
from dsjax.config.strict_yaml import parse_yaml
from dsjax.mesh.config import MeshConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import abstract
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.families.llama.model import architecture

CONFIGS = Path(__file__).parents[3] / "configs"
RUNS = sorted((CONFIGS / "run").glob("*.yaml"))

# BLOOM: arXiv 2211.05100. GPT-2: the released checkpoints. Exact.
EXACT = {
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
}
# Llama 2: arXiv 2307.09288; Llama 3: 2407.21783; SmolLM2: 2502.02737; BERT: 1810.04805, with the head for masked words.
# Parameters as the released checkpoints have them.
OTHERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
}
# arXiv 2005.14165, table 2.1: the nominal number, then layers, width, heads. Its 1.3B has 24 heads, its 13B width 5140.
GPT3 = {
    "gpt3-350m": (350e6, 24, 1024, 16),
    "gpt3-760m": (760e6, 24, 1536, 16),
    "gpt3-1.3b": (1.3e9, 24, 2048, 16),
    "gpt3-2.7b": (2.7e9, 32, 2560, 32),
    "gpt3-6.7b": (6.7e9, 32, 4096, 32),
    "gpt3-13b": (13e9, 40, 5120, 40),
    "gpt3-175b": (175e9, 96, 12288, 96),
}
# Rows a step and peak learning rate: table 2.1 in tokens / 2048, and the BLOOM paper's table 3 (176B: see its file).
RECIPES = {
    "gpt3-350m": (256, 3e-4, 3e-5),
    "gpt3-760m": (256, 2.5e-4, 2.5e-5),
    "gpt3-1.3b": (512, 2e-4, 2e-5),
    "gpt3-2.7b": (512, 1.6e-4, 1.6e-5),
    "gpt3-6.7b": (1024, 1.2e-4, 1.2e-5),
    "gpt3-13b": (1024, 1e-4, 1e-5),
    "gpt3-175b": (1536, 6e-5, 6e-6),
    "bloom-560m": (256, 3e-4, 1e-5),
    "bloom-1b1": (256, 2.5e-4, 1e-5),
    "bloom-1b7": (512, 2e-4, 1e-5),
    "bloom-3b": (512, 1.6e-4, 1e-5),
    "bloom-7b1": (512, 1.2e-4, 1e-5),
    "bloom-176b": (2016, 6e-5, 6e-6),
}
# DeepSpeedExamples 45b4b71, bing_bert and BingBertSquad: rows a step, rows of a micro-batch, learning rate, last step
# before the freeze (of second phases, where the recipe counts on from the first, less the first's steps).
ONE_BIT = {
    "bert-large-onebit-adam": (4096, 16, 4e-4, 23000),
    "bert-large-onebit-adam-512": (4096, 16, 1e-5, 1500),
    "bert-large-onebit-lamb": (65536, 64, 11e-3, 1000),
    "bert-large-onebit-lamb-512": (32768, 16, 2e-3, 6100 - 5993),
    "bert-large-zero-one-adam": (4096, 16, 4e-4, 12500),
    "bert-large-zero-one-adam-512": (4096, 16, 2.82e-5, 155000 - 152511),
    "bert-large-squad-onebit-adam": (96, 3, 3e-5, 400),
}
DEVICES = {"cpu8": 8, "gpu1": 1, "gpu8": 8, "gpu8x8": 64, "gpu48x8": 384}


def read(kind: str, name: str) -> dict[str, object]:
    value = parse_yaml((CONFIGS / kind / f"{name}.yaml").read_text(), name)
    assert isinstance(value, dict)
    return value


def model_of(name: str) -> Any:
    mapping = read("model", name)
    kinds = {"bloom": BloomConfig, "gpt2": GPT2Config, "llama": LlamaConfig, "bert": BertConfig}
    return decode(kinds[str(mapping["kind"])], mapping, origin=name)


def parameters(model: GPT2Config | BloomConfig) -> int:
    """The published closed forms: 12 H^2 + 13 H a block; the embeddings; the LayerNorms outside the blocks."""
    width = model.model_dim
    blocks = model.num_layers * (12 * width**2 + 13 * width)
    if isinstance(model, BloomConfig):
        return model.vocab_size * width + blocks + 4 * width
    return (model.vocab_size + model.max_positions) * width + blocks + 2 * width


def other_parameters(model: LlamaConfig | BertConfig) -> int:
    """Matrices, biases and norms, added up by hand."""
    width, hidden = model.model_dim, model.hidden_dim
    if isinstance(model, LlamaConfig):
        shared = 2 * width * model.kv_heads * model.head_size
        layer = 2 * width * model.num_heads * model.head_size + shared + 3 * width * hidden + 2 * width
        tables = 1 if model.tied_embedding else 2
        return tables * model.vocab_size * width + model.num_layers * layer + width
    layer = 4 * (width**2 + width) + 2 * width * hidden + hidden + width + 4 * width
    head = width**2 + 3 * width + model.vocab_size
    return (model.vocab_size + model.max_positions + 2) * width + 2 * width + model.num_layers * layer + head


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_begins_by_saying_what_it_is_for(path):
    lines = path.read_text().splitlines()
    comment = [line for line in lines if line.startswith("#")]
    assert lines[0].startswith("# ") and len(" ".join(comment)) > 100
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", EXACT)
def test_exact_sizes(name):
    assert parameters(model_of(name)) == EXACT[name]
    assert f"{EXACT[name]:,}" in (CONFIGS / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_sizes(name):
    model, (nominal, *shape) = model_of(name), GPT3[name]
    assert [model.num_layers, model.model_dim, model.num_heads] == shape
    assert parameters(model) == pytest.approx(nominal, rel=0.02)  # the names are rounded: 355.9M is called 350M
    assert f"{parameters(model):,}" in (CONFIGS / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", OTHERS)
def test_llama_and_bert_sizes(name):
    model = model_of(name)
    built = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract(model), nnx.Param)))
    assert other_parameters(model) == built == OTHERS[name]
    assert f"{OTHERS[name]:,}" in (CONFIGS / "model" / f"{name}.yaml").read_text()


def test_rope_of_llama_3():
    """Frequencies of Llama 3.1 as its release computes them: wavelengths above 8192 are stretched by 8."""
    model = model_of("llama-3.1-8b")
    assert (model.head_size, model.kv_heads, model_of("llama-3.2-1b").head_size) == (128, 8, 64)
    for ours, plain in zip(architecture(model).frequencies, 500000.0 ** (-np.arange(64) / 64), strict=True):
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            want = plain
        elif wavelength > 8192 / 1:
            want = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * plain / 8 + smooth * plain
        assert ours == pytest.approx(want, rel=1e-6)


def test_all_models_are_covered():
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == {*EXACT, *GPT3, *OTHERS, "tiny"}
    assert parameters(model_of("tiny")) == 132_992
    assert all(model_of(name).init_std == 0.0048 for name in EXACT if name.startswith("bloom"))


def test_meshes():
    assert {path.stem for path in (CONFIGS / "mesh").glob("*.yaml")} == set(DEVICES)
    for name, count in DEVICES.items():
        mesh = decode(MeshConfig, read("mesh", name), origin=name)
        assert mesh.data * mesh.fsdp * mesh.expert * mesh.tensor == count


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs(path):
    config = load_run(path)
    mesh, model, train = config.mesh, config.model, config.train
    assert config.name == path.stem
    assert train.batch_size % (mesh.data * train.accumulation * mesh.fsdp * mesh.expert) == 0
    shards = mesh.fsdp * mesh.expert * mesh.tensor
    assert [size % shards for size in (model.vocab_size, model.model_dim, model.hidden_dim)] == [0, 0, 0]
    assert model.num_heads % mesh.tensor == 0
    if isinstance(model, GPT2Config):
        assert config.data.sequence_length <= model.max_positions
    if config.data.tokenizer.kind == "bpe":
        assert config.data.tokenizer.vocab_size <= model.vocab_size
    if path.stem in RECIPES:
        rows, peak, last = RECIPES[path.stem]
        optimizer, schedule = config.optimizer, config.optimizer.schedule
        assert (train.batch_size, optimizer.learning_rate, config.data.sequence_length) == (rows, peak, 2048)
        assert math.isclose(peak * schedule.min_ratio, last, rel_tol=1e-6)
        tokens = 260e9 if path.stem.startswith("gpt3") else 200e6 * 2048
        assert (schedule.kind, schedule.decay, schedule.decay_by, schedule.warmup_by) == (
            "cosine", tokens, "tokens", "tokens",
        )  # fmt: skip
        assert optimizer.kind == "adamw" and (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.95, 1e-8)


def test_every_recipe_has_a_run():
    assert {*RECIPES, *(name for name in EXACT if name.startswith("gpt2"))} <= {path.stem for path in RUNS}


@pytest.mark.parametrize("name", ONE_BIT)
def test_recipes_with_compressed_communication(name):
    config = load_run(CONFIGS / "run" / f"{name}.yaml")
    optimizer, train = config.optimizer, config.train
    micro = train.batch_size // (config.mesh.data * train.accumulation)
    assert (train.batch_size, micro, optimizer.learning_rate, optimizer.last_full(train.steps)) == ONE_BIT[name]
    assert not optimizer.bias_correction and optimizer.last_full(train.steps) < train.steps and train.clip_norm == 1
