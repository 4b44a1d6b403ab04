"""Weights are read one tensor at a time: the host holds the model's share and little else."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dsjax.checkpoint.safetensors_folder import write_folder
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.config_json import config_to_hf

CONFIG = LlamaConfig(vocab_size=2048, num_layers=8, model_dim=512, num_heads=8, mlp_dim=2048, tied_embedding=True)
# The program that imports everything and loads a small model first, so that only the weights are left to count.
CHILD = """
import sys
from dsjax.models import load_pretrained
from dsjax.observe.memory import peak_host_bytes
load_pretrained(sys.argv[1])
before = peak_host_bytes()
model = load_pretrained(sys.argv[2], segments=eval(sys.argv[3]))
print(peak_host_bytes() - before)
"""


def shapes(config: LlamaConfig):
    dim, hidden = config.model_dim, config.hidden_dim
    yield "model.embed_tokens.weight", (config.vocab_size, dim)
    yield "model.norm.weight", (dim,)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        yield from ((f"{layer}{name}.weight", (dim,)) for name in ("input_layernorm", "post_attention_layernorm"))
        yield from ((f"{layer}self_attn.{name}_proj.weight", (dim, dim)) for name in "qkvo")
        yield from ((f"{layer}mlp.{name}_proj.weight", (hidden, dim)) for name in ("gate", "up"))
        yield f"{layer}mlp.down_proj.weight", (dim, hidden)


@pytest.mark.parametrize("segments", [None, ()])
def test_loading_holds_one_copy(tmp_path, segments):
    small = LlamaConfig(vocab_size=64, num_layers=4, model_dim=64, num_heads=8, mlp_dim=64, tied_embedding=True)
    for name, config in (("small", small), ("large", CONFIG)):
        tensors = ((name, np.ones(shape, np.float32)) for name, shape in shapes(config))
        write_folder(tmp_path / name, tensors, config=config_to_hf(config))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), repr(segments)]
    # glibc's threshold moves up when a large block is freed, and later ones stay with the process: chance, not loading.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes(CONFIG)}
    # A few of the largest tensor (as stored, turned, on the device); a stack is filled in place.
    allowed = sum(sizes.values()) + 4 * max(sizes.values()) + 2**24
    assert sum(sizes.values()) * 0.9 < int(done.stdout) < allowed < 1.3 * sum(sizes.values())
