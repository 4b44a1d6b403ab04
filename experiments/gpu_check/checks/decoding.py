"""A decoding step of GPT-3 1.3B with drawn weights in bfloat16: it reads all of them once."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from item import Context, Outcome

from dsjax.models.families.build import abstract
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.generate import Generation, bucket, stream
from dsjax.models.transformer import Transformer
from dsjax.observe.devices import from_jax_device_kind

BANDWIDTH_SHARE = 0.6
PROMPT = 64
STD = 0.02


def step(context: Context) -> Outcome:
    """Milliseconds a token of one row, and the share of the memory's bandwidth that this is."""
    if context.rehearse:
        sizes, new_tokens = {"vocab_size": 512, "num_layers": 2, "model_dim": 64, "num_heads": 4}, 16
    else:
        sizes, new_tokens = {"vocab_size": 50304, "num_layers": 24, "model_dim": 2048, "num_heads": 16}, 128
    # Every layer apart, as load_pretrained has it: no step has to slice one out of a stack.
    segments = (1,) * sizes["num_layers"]
    config = GPT2Config(**sizes, max_positions=2048, compute_dtype="bfloat16", segments=segments)
    model = drawn(config)
    seconds_per_token(model, new_tokens)  # compiles
    seconds = statistics.median(seconds_per_token(model, new_tokens) for _ in range(3))
    weights, positions = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in parts(model))
    places = bucket(PROMPT) + bucket(new_tokens)
    cache = 2 * 2 * config.num_layers * config.model_dim * places
    read = weights - positions + cache
    context.note(ms_per_token=1e3 * seconds, weight_bytes=weights, cache_bytes=cache, bytes_per_second=read / seconds)
    device = from_jax_device_kind(jax.devices()[0].device_kind)
    if device is None:
        return Outcome(ours=f"{1e3 * seconds:.2f} ms a token", passed=None)
    share = read / seconds / (1e9 * device.memory_bandwidth_gb_s)
    context.note(bandwidth_share=share)
    return Outcome(ours=f"{share:.0%}, {1e3 * seconds:.2f} ms a token", passed=share >= BANDWIDTH_SHARE)


def drawn(config: GPT2Config) -> Transformer:
    """A model whose every tensor is drawn in bfloat16, on the device and tensor by tensor: few, small programs."""
    graph, state = nnx.split(abstract(config), nnx.Param)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(state))
    draw = lambda i, x: STD * jax.random.normal(jax.random.fold_in(jax.random.key(0), i), x.shape, jnp.bfloat16)
    return nnx.merge(graph, jax.tree.unflatten(tree, [draw(i, x) for i, x in enumerate(leaves)]))


def parts(model: Transformer) -> tuple[dict, dict]:
    """All parameters, and those of the table of positions, of which a step reads one row."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return params, params["positions"]


def seconds_per_token(model: Transformer, new_tokens: int) -> float:
    """Mean over all tokens but the first, which waits for the prompt."""
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT))
    began, count = 0.0, 0
    for _ in stream(model, prompt, options=Generation(max_new_tokens=new_tokens)):
        began, count = began or time.perf_counter(), count + 1
    return (time.perf_counter() - began) / (count - 1)
