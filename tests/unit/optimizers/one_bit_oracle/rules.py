"""Where the two dialects differ, and what all three optimizers do with a step's gradients before they use them."""

import dataclasses
from typing import Any, Literal

import numpy as np

Kind = Literal["noop", "skipped", "full", "onebit", "local", "sync"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Options of the algorithms. The defaults are dsjax's.

    deepspeed_parity: speak DeepSpeed 0.19.6: a first step that only allocates (t is 1 after it), no bias correction,
        padding to a multiple of W lcm(W, 8) that counts in scales and errors, masks applied to averages only, one
        worker never compressed, no guard against gradients that are not finite. It goes with server_scale "chunk".
    dtype: of all arithmetic.
    granularity: "tensor": every tensor has its own scale. "group": all tensors are raveled into one first.
    scale: "l2": |b| / sqrt(n). "l1": sum |b| / n.
    server_scale: "tensor": one scale for all chunks of a tensor. "chunk": every server has its own.
    bias_correction: Adam's.
    clip: largest norm of a gradient, None for any.
    clip_by: in 1-bit steps, "mean": all workers by sqrt(mean_i |g_i|^2); "local": each by its own norm.
    """

    deepspeed_parity: bool = False
    dtype: Any = np.float64
    granularity: Literal["tensor", "group"] = "tensor"
    scale: Literal["l2", "l1"] = "l2"
    server_scale: Literal["tensor", "chunk"] = "tensor"
    bias_correction: bool = True
    clip: float | None = None
    clip_by: Literal["mean", "local"] = "mean"


OURS = Rules()
PEER = Rules(deepspeed_parity=True, dtype=np.float32, server_scale="chunk", bias_correction=False)


def finite(gradients: list[np.ndarray]) -> np.ndarray:
    """Which workers' gradients [W, ...] are finite throughout, bool [W]."""
    return np.all([np.isfinite(g).reshape(len(g), -1).all(axis=1) for g in gradients], axis=0)


def squares(tensors: list[np.ndarray]) -> np.ndarray:
    """|g_i|^2 of every worker over all tensors [W, ...], [W]."""
    return sum(np.square(g).reshape(len(g), -1).sum(axis=1) for g in tensors)


def clip(gradients: list[np.ndarray], kind: Kind, rules: Rules) -> list[np.ndarray]:
    """Per-worker gradients [W, ...], each scaled by min(1, clip / norm), the norm being that of the kind of step."""
    if rules.clip is None:
        return gradients
    if kind == "full":
        norm = np.sqrt(squares([g.mean(axis=0, keepdims=True) for g in gradients]))
    elif kind == "onebit" and rules.clip_by == "mean":
        norm = np.sqrt(squares(gradients).mean(keepdims=True))
    else:
        norm = np.sqrt(squares(gradients))
    factor = rules.clip / np.maximum(norm, rules.clip)
    return [g * factor.reshape(-1, *[1] * (g.ndim - 1)) for g in gradients]


def correction(decay: float, num_updates: int, rules: Rules) -> float:
    """1 - b^t, by which a moment is divided after t updates; 1 without bias correction or before the first (m is 0)."""
    return 1 - decay**num_updates if rules.bias_correction and num_updates else 1.0
