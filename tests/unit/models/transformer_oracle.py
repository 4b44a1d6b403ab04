"""Small models to test, and their oracle: a decoder in float64 numpy, one row and one head at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.models.config import ModelConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import abstract, segments_of
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.transformer import Transformer
from tests.helpers import from_flat, make_params

SHAPE = {"vocab_size": 40, "num_layers": 2, "model_dim": 24, "norm_eps": 1e-5}
MODELS = {
    "bloom-4": BloomConfig(num_heads=4, **SHAPE),
    "bloom-6": BloomConfig(num_heads=6, **SHAPE),
    "bloom-after-norm": BloomConfig(num_heads=3, residual_after_norm=True, **SHAPE),
    "gpt2": GPT2Config(num_heads=4, max_positions=32, mlp_dim=40, **SHAPE),
    "gpt2-variant": GPT2Config(
        num_heads=4, max_positions=32, scores_by_layer=True, activation="gelu", tied_embedding=False, **SHAPE
    ),
}


def large_params(config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters of `make_params`, five times as large but for norms: logits of size one, attention not flat."""
    return {name: value if "norm" in name else 5 * value for name, value in make_params(config).items()}


def build(config: ModelConfig) -> Transformer:
    """The model with these parameters."""
    model = abstract(config)
    graph, state = nnx.split(model, nnx.Param)
    flat = from_flat(large_params(config), nnx.to_pure_dict(state), segments_of(config))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, flat))


def make_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 40, shape).astype(np.int32)


def exact_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def slopes(heads: int) -> list[float]:
    power = 2 ** int(np.log2(heads))
    first = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return first + [2 ** (-4 * (2 * j + 1) / power) for j in range(heads - power)]


def row_logits(named, tokens, *, heads: int, num_layers: int, alibi: bool, residual_after_norm=False, by_layer=False,
               act=gelu, eps=1e-5):  # fmt: skip
    """Logits [T, V] of one document of tokens [T], alone in its row."""
    p = {name: np.asarray(value, np.float64) for name, value in named.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p[f"{name}.scale"] + p[f"{name}.bias"]

    x = p["embed.table"][tokens]
    x = norm(x, "embed_norm") if alibi else x + p["positions.table"][: len(tokens)]
    size = x.shape[1] // heads
    for number, layer in enumerate(f"layers.{i}" for i in range(num_layers)):
        h = norm(x, f"{layer}.attention_norm")
        kernel, bias = p[f"{layer}.attention.qkv.kernel"], p[f"{layer}.attention.qkv.bias"]
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            q, k, v = (h @ kernel[:, i, part] + bias[i, part] for i in range(3))
            for t in range(len(tokens)):
                scores = k[: t + 1] @ q[t] / np.sqrt(size) / (number + 1 if by_layer else 1)
                if alibi:
                    scores = scores + slopes(heads)[head] * np.arange(t + 1)
                weights = np.exp(scores - scores.max())
                mixed[t, part] = weights / weights.sum() @ v[: t + 1]
        out = mixed @ p[f"{layer}.attention.out.kernel"] + p[f"{layer}.attention.out.bias"]
        x = (h if residual_after_norm else x) + out
        h = norm(x, f"{layer}.mlp_norm")
        hidden = act(h @ p[f"{layer}.mlp.up.kernel"] + p[f"{layer}.mlp.up.bias"])
        x = (h if residual_after_norm else x) + hidden @ p[f"{layer}.mlp.down.kernel"] + p[f"{layer}.mlp.down.bias"]
    return norm(x, "final_norm") @ p.get("unembed.table", p["embed.table"]).T
