"""Where order comes from: ALiBi and RoPE.

ALiBi (arXiv 2108.12409): attention scores get a penalty linear in the distance.

score_h(q, k) += slope_h * (k - q).  With n heads and p the largest power of two not above n:
  slope_i = 2^(-8 i / p)           i = 1 .. p
  and for the n - p heads that are left the odd entries of the sequence for 2 p: 2^(-4 (2 j + 1) / p), j = 0 ..

RoPE (arXiv 2104.09864): queries and keys are turned by an angle proportional to their position, so that their product
depends on the distance alone. The pair (x_i, x_{i + K/2}) of a head of size K turns by position * base^(-2 i / K).
(Some files pair x_{2i} with x_{2i+1}; their rows are put into this order when they are read.)
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes [H] float32, one per head.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4 * (2 * j + 1) / power) for j in range(num_heads - power)]
    return np.asarray(slopes, np.float32)


def alibi_bias(
    num_heads: int, query_positions: Int[Array, "*#B T"], key_positions: Int[Array, "*#B S"]
) -> Float[Array, "*#B H T S"]:
    """The penalty, in float32; only differences of positions matter.

    The difference is taken first, in integers: a bias that depends on the key alone gives the same softmax, but at
    2,048 tokens its large values cost digits (all of them in bfloat16).
    """
    distance = key_positions[..., None, None, :] - query_positions[..., None, :, None]
    return jnp.asarray(alibi_slopes(num_heads))[:, None, None] * distance.astype(jnp.float32)


def rope_frequencies(
    head_dim: int,
    base: float,
    *,
    factor: float = 1.0,
    original_positions: int = 0,
    low: float = 1.0,
    high: float = 4.0,
) -> np.ndarray:
    """Radians per position of each pair, [K / 2] float32.

    Args:
        head_dim: K, even.
        base: of the geometric series.
        factor: frequencies are divided by it, which stretches the range of positions.
        original_positions: 0 divides all frequencies. Else it is the context before stretching, and Llama 3.1's rule
            holds: what turns more than `high` times in it stays, what turns less than `low` times is divided, and what
            lies between is blended.
        low: see above.
        high: see above.

    Example:
        >>> rope_frequencies(4, 100.0).tolist()
        [1.0, 0.10000000149011612]
    """
    frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kept = np.zeros_like(frequencies)  # how much of the undivided frequency stays
    if original_positions:
        turns = original_positions * frequencies / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
    return (frequencies * (kept + (1 - kept) / factor)).astype(np.float32)


Rotation = tuple[Float[Array, "#B T half"], Float[Array, "#B T half"]]
"""Cosines and sines of the angles by which positions turn."""


def rotation(positions_BT: Int[Array, "B T"], frequencies: np.ndarray | tuple[float, ...]) -> Rotation:
    """The turn of each position, float32."""
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHK: Float[Array, "B T H K"], by: Rotation) -> Float[Array, "B T H K"]:
    """Queries or keys turned, in float32; the result in x's dtype.

    Example:
        >>> x = jnp.ones((1, 2, 1, 2))
        >>> rotate(x, rotation(jnp.array([[0, 1]]), (np.pi / 2,)))[0, :, 0].round(3).tolist()
        [[1.0, 1.0], [-1.0, 1.0]]
    """
    cos, sin = (part[:, :, None] for part in by)
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHK.dtype)
