"""One vector of a text from the features of its tokens, in the ways that sentence encoders have (arXiv 1908.10084).

Shapes: B texts, T positions, D features.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pooling = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


def pooled(x_BTD: Float[Array, "B T D"], mask: Bool[Array, "B T"], kind: Pooling) -> Float[Array, "B D"]:
    """The vector of each text, float32.

    Args:
        x_BTD: features.
        mask: positions that count; there is one at least.
        kind: `cls` is the first position, whether it counts or not, `lasttoken` the last that counts, `max` the largest
            of each feature; of the means one divides by the root of the number of positions, and one weighs position i,
            from 1 on, by i.

    Example:
        >>> x, mask = jnp.array([[[1.0, 0.0], [4.0, 3.0], [9.0, 9.0]]]), jnp.array([[True, True, False]])
        >>> {kind: pooled(x, mask, kind)[0].tolist() for kind in ("cls", "max", "mean", "weightedmean", "lasttoken")}
        {'cls': [1.0, 0.0], 'max': [4.0, 3.0], 'mean': [2.5, 1.5], 'weightedmean': [3.0, 2.0], 'lasttoken': [4.0, 3.0]}
    """
    x_BTD, real = x_BTD.astype(jnp.float32), mask[..., None].astype(jnp.float32)
    if kind == "cls":
        return x_BTD[:, 0]
    if kind == "max":
        return jnp.where(mask[..., None], x_BTD, -jnp.inf).max(1)
    if kind == "lasttoken":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(x_BTD, last[:, None, None], axis=1)[:, 0]
    if kind == "weightedmean":
        real = real * jnp.arange(1, mask.shape[1] + 1, dtype=jnp.float32)[:, None]
    total, count = (x_BTD * real).sum(1), jnp.maximum(real.sum(1), 1e-9)
    return total / (jnp.sqrt(count) if kind == "mean_sqrt_len_tokens" else count)
