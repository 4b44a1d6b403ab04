"""Random-LTD in float64 numpy: layers over whole rows in which dropped tokens are hidden, and passed over afterwards.

Every layer computes all T positions, with a mask that shows kept tokens only, and what it gives to dropped ones is
thrown away. Gradients are differences of this, along a random direction per tensor.
"""

import math
from collections.abc import Callable

import numpy as np

from dsjax.models.config import ModelConfig
from dsjax.models.families.llama.config import LlamaConfig

Named = dict[str, np.ndarray]
erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "bert": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "llama": lambda x: x / (1 + np.exp(-x)),
    "bloom": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
ACTIVATIONS["gpt2"] = ACTIVATIONS["bloom"]


def norm(p: Named, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    if f"{name}.bias" not in p:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{name}.scale"]
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{name}.scale"] + p[f"{name}.bias"]


def linear(p: Named, name: str, x: np.ndarray) -> np.ndarray:
    y = np.tensordot(x, p[f"{name}.kernel"], axes=1)
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def turned(x: np.ndarray, positions: np.ndarray, base: float) -> np.ndarray:
    """RoPE as a product of complex numbers: x_i + i x_{i + K/2}, turned by position * base^(-2 i / K)."""
    half = x.shape[-1] // 2
    angles = positions[:, :, None] * base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def attention(p: Named, name: str, h: np.ndarray, config: ModelConfig, seen: np.ndarray, positions: np.ndarray):
    """What the positions [B, T] gather from those that they see [B, T, T]."""
    heads, size = config.num_heads, config.head_size
    if f"{name}.qkv.kernel" in p:
        q, k, v = (part.reshape(*h.shape[:2], heads, size) for part in np.moveaxis(linear(p, f"{name}.qkv", h), 2, 0))
    else:
        q, k, v = (linear(p, f"{name}.{part}", h) for part in "qkv")
    if isinstance(config, LlamaConfig):
        q, k = turned(q, positions, config.rope_base), turned(k, positions, config.rope_base)
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(size)
    if config.kind == "bloom":
        places = np.arange(h.shape[1])
        slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)  # of a power of two
        scores = scores + slopes[:, None, None] * (places[None, :] - places[:, None])
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)  # of a dropped token it may be 0 / 0
    mixed = np.einsum("bhts,bshk->bthk", weights, v).reshape(*h.shape[:2], -1)
    return linear(p, f"{name}.out", mixed)


def features(named: Named, config: ModelConfig, rows: Named, kept: dict[int, np.ndarray]) -> np.ndarray:
    """Hidden states [B, T, D] after the last block.

    Args:
        named: the tensors by their names in a checkpoint.
        config: the model.
        rows: tokens [B, T], and what else there is of segments, positions and token_types.
        kept: number of a layer that drops -> which tokens it sees, [B, T] bool.
    """
    p = {name: value.astype(np.float64) for name, value in named.items()}
    places = np.broadcast_to(np.arange(rows["tokens"].shape[1]), rows["tokens"].shape)
    positions, segments = rows.get("positions", places), rows.get("segments", 0 * places)
    x = p["embed.table"][rows["tokens"]]
    if "positions.table" in p:
        x = x + p["positions.table"][positions]
    if "token_types.table" in p:
        x = x + p["token_types.table"][rows["token_types"]]
    if "embed_norm.scale" in p:
        x = norm(p, "embed_norm", x, config.norm_eps)
    visible = segments[:, :, None] == segments[:, None, :]
    if config.kind != "bert":
        visible = visible & (places[:, :, None] >= places[:, None, :])
    for number in range(config.num_layers):
        whose = kept.get(number, np.ones_like(places, bool))
        out = layer(p, f"layers.{number}", x, config, visible & whose[:, None, :], positions)
        x = np.where(whose[:, :, None], out, x)
    return norm(p, "final_norm", x, config.norm_eps) if config.kind != "bert" else x


def layer(p: Named, name: str, x: np.ndarray, config: ModelConfig, seen: np.ndarray, positions: np.ndarray):
    """One block over whole rows."""
    act, bert = ACTIVATIONS[config.kind], config.kind == "bert"

    def mlp(h):
        hidden = act(linear(p, f"{name}.mlp.gate", h)) * linear(p, f"{name}.mlp.up", h) if gated else act(up(h))
        return linear(p, f"{name}.mlp.down", hidden)

    gated, up = f"{name}.mlp.gate.kernel" in p, lambda h: linear(p, f"{name}.mlp.up", h)
    of_first = lambda x: norm(p, f"{name}.attention_norm", x, config.norm_eps)
    of_second = lambda x: norm(p, f"{name}.mlp_norm", x, config.norm_eps)
    if bert:
        x = of_first(x + attention(p, f"{name}.attention", x, config, seen, positions))
        return of_second(x + mlp(x))
    x = x + attention(p, f"{name}.attention", of_first(x), config, seen, positions)
    return x + mlp(of_second(x))


def slopes_along(function: Callable[[Named], float], named: Named, directions: Named) -> dict[str, float]:
    """Per tensor the derivative of a function along a direction, by central differences."""
    found = {}
    for name, direction in directions.items():
        ends = [function({**named, name: named[name].astype(np.float64) + h * direction}) for h in (1e-5, -1e-5)]
        found[name] = (ends[0] - ends[1]) / 2e-5
    return found
