"""A decoding step writes to its cache where it lies: the compiled program has no room for a second one.

That the pointers stay (tests/unit/models/test_generate.py) does not say so: a copy that is copied back keeps them too.
"""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.collectives.hlo_text import parse_module
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import abstract
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.generate import GREEDY, _prefill, _step

SMALL = {"vocab_size": 40, "num_layers": 2, "model_dim": 48, "num_heads": 6, "segments": (1, 1)}
CONFIGS = {
    "rope, fewer heads of keys": LlamaConfig(num_kv_heads=3, **SMALL),
    "alibi": BloomConfig(**SMALL),
    "learned positions": GPT2Config(max_positions=4096, **SMALL),
}


@pytest.mark.parametrize("rows", ["together", "apart"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_copies_no_cache(name, rows):
    """Where all rows write to the same slot, and where each has a slot of its own."""
    graph, state = nnx.split(abstract(CONFIGS[name]), nnx.Param)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
    ids = jax.ShapeDtypeStruct((2, 16), np.int32)
    prefill = lambda *arrays: _prefill(graph, *arrays, sampling=GREEDY, room=2032)
    tokens, progress = jax.eval_shape(prefill, params, ids, ids, jax.eval_shape(lambda: jax.random.key(0)))
    if rows == "apart":
        progress = dataclasses.replace(progress, slot=jax.ShapeDtypeStruct((2,), np.int32))
    compiled = _step.lower(graph, params, tokens, progress, sampling=GREEDY).compile()

    cache = jax.tree.leaves(progress.cache)
    # Slots are many enough for one layer's keys to be larger than all else that a step needs, the scores above all.
    assert compiled.memory_analysis().temp_size_in_bytes < min(4 * leaf.size for leaf in cache)

    # XLA leaves a copy of each donated argument to where its result goes, which is the same buffer; there is no other.
    of_cache = tuple(f"f32[{','.join(map(str, leaf.shape[first:]))}]" for leaf in cache for first in (0, 1))
    module = parse_module(compiled.as_text())
    instructions = module.computations[module.entry].instructions
    copied = [i for i in instructions.values() if i.opcode == "copy" and i.shape.startswith(of_cache)]
    sources = [instructions[i.operands[0]] for i in copied]
    assert [source.name for source in sources if source.opcode != "parameter"] == []
    assert len({source.name for source in sources}) == len(sources) <= len(cache)
