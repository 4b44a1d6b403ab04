"""Two tiny models with a byte tokenizer, run folders that hold them, and ways to spoil a Hugging Face folder."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config.load import to_yaml
from dsjax.config.run import RunConfig
from dsjax.data.config import ByteTokenizer, DataConfig
from dsjax.data.tokenizers.tokenizer import byte_tokenizer
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import abstract, create, segments_of
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.naming import to_named
from dsjax.runs.counters import Counters
from dsjax.setup.config import TrainConfig

# Two layers in one scan compile fastest; 264 embeddings for 257 tokens; a large init_std makes decided predictions.
SIZES = {"vocab_size": 264, "num_layers": 2, "model_dim": 16, "num_heads": 2, "init_std": 0.3, "segments": (2,)}
CONFIGS = {"gpt2": GPT2Config(**SIZES, max_positions=48), "bloom": BloomConfig(**SIZES)}


def make_params(config, seed=0):
    """Parameters in which no bias is zero and no scale is one."""
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create(config, key=jax.random.key(seed)), nnx.Param)))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(0.05 * rng.standard_normal(p.shape), jnp.float32), params)


def make_model(config, params):
    return nnx.merge(nnx.split(abstract(config), nnx.Param)[0], params)


def write_run(path, config, checkpoints, *, ema_decay=0.0):
    """A run folder with a byte tokenizer and checkpoints: step -> {"params": tree, "ema": tree}."""
    settings = RunConfig(
        model=config,
        data=DataConfig(tokenizer=ByteTokenizer(), sequence_length=16),
        train=TrainConfig(steps=10, ema_decay=ema_decay),
    )
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(settings))
    byte_tokenizer().save(path / "tokenizer")
    store = CheckpointStore(path / "checkpoints", CheckpointConfig(keep_last=9))
    for step, trees in checkpoints.items():
        tree = to_named({"step": jnp.int32(step), **trees}, segments_of(config))
        store.save(step, tree, clocks={"counters": dataclasses.asdict(Counters(steps=step)), "data_hash": "x"})
    store.close()
    return path


def _change_tensors(path):
    tensors = load_file(path / "model.safetensors")
    tensors["transformer.h.7.extra"] = tensors.pop("transformer.h.1.ln_1.bias")
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"][:3]
    save_file(tensors, path / "model.safetensors")


def _only_a_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _few_embeddings(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))


SPOILED = {  # name -> what is done to a Hugging Face folder, what the message must say
    "tensors": (_change_tensors, ["missing: transformer.h.1.ln_1.bias [16]", "extra: transformer.h.7.extra [16]",
                                  "misshapen: transformer.ln_f.bias [3]"]),
    "pickle": (_only_a_pickle, ["only pickled weights (pytorch_model.bin)", "is not read"]),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), ["has no tokenizer.json"]),
    "tokenizer": (_few_embeddings, ["ids go up to 256", "only 200 embeddings"]),
    "not a tokenizer": (lambda path: (path / "tokenizer.json").write_text("{}"), ["is not a tokenizer.json"]),
    "config": (lambda path: (path / "config.json").write_text('{"model_type": "t5"}'), ["model_type is 't5'"]),
    "generation config": (lambda path: (path / "generation_config.json").write_text("{"), ["is not JSON"]),
}  # fmt: skip
