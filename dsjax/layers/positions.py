"""ALiBi (arXiv 2108.12409): attention scores get a penalty linear in the distance.

score_h(q, k) += slope_h * (k - q).  With n heads and p the largest power of two not above n:
  slope_i = 2^(-8 i / p)           i = 1 .. p
  and for the n - p heads that are left the odd entries of the sequence for 2 p: 2^(-4 (2 j + 1) / p), j = 0 ..
"""

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
    num_heads: int, query_positions: Int[Array, "*B T"], key_positions: Int[Array, "*B S"]
) -> Float[Array, "*B H T S"]:
    """The penalty, in float32; only differences of positions matter.

    The difference is taken first, in integers: a bias that depends on the key alone gives the same softmax, but at
    2,048 tokens its large values cost digits (all of them in bfloat16).
    """
    distance = key_positions[..., None, None, :] - query_positions[..., None, :, None]
    return jnp.asarray(alibi_slopes(num_heads))[:, None, None] * distance.astype(jnp.float32)
