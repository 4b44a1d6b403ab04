"""The three phases in numpy, written from their definition: one worker, one tensor, one element after the other."""

import numpy as np


def sgn(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def keep(shape: tuple[int, int], mask: np.ndarray | None, length: int | None) -> np.ndarray:
    """The elements that count, [S, N] bool."""
    real = np.arange(shape[1]) < (shape[1] if length is None else length)
    return np.broadcast_to(real, shape) & (True if mask is None else mask.astype(bool))


def error(carry: np.ndarray, scale: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """What the last call did not send."""
    carry, scale = carry.astype(np.float64), scale.astype(np.float64)
    return np.where(kept, carry - scale[:, None] * sgn(carry), 0)


def sign_pack(x, carry, scale, *, mask=None, length=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The new carry (float64), its signs (bool) and the sums of its squares."""
    kept = keep(x.shape, mask, length)
    new = np.where(kept, x.astype(np.float64) + error(carry, scale, kept), 0)
    return new, new >= 0, (new**2).sum(axis=1)


def average(bits: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Mean over workers of the signs of [W, S, K // 8] bytes by their scales."""
    signs = np.unpackbits(bits, axis=2) * 2.0 - 1
    return np.mean(signs * scales.astype(np.float64)[:, :, None], axis=0)


def unpack(bits: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[S, W * K]: chunk by chunk."""
    chunks = [scales[w][:, None] * (np.unpackbits(bits[w], axis=1) * 2.0 - 1) for w in range(len(bits))]
    return np.concatenate(chunks, axis=1)
