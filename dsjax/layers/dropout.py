"""Dropout whose mask depends on the sample alone, not on where or in which micro-batch it is computed.

A mask is drawn per row from key(seed, step, global sample id, layer, site), so that mesh, accumulation and resume
cannot change it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample_keys(key: Key[Array, ""], step: Int[Array, ""], sample_ids: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key per row from the run's key, the step and the row's number in the global batch."""
    step_key = jax.random.fold_in(key, step)
    return jax.vmap(lambda sample: jax.random.fold_in(step_key, sample))(sample_ids)


def fold(keys: Key[Array, "B"] | None, number: Int[Array, ""] | int) -> Key[Array, "B"] | None:
    """The keys of one layer or of one site in it; None (no dropout) stays None."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def dropout(x: Float[Array, "B *rest"], keys: Key[Array, "B"] | None, *, rate: float) -> Float[Array, "B *rest"]:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
        x: rows first.
        keys: one key per row, or None to leave x as it is.
        rate: the probability, in [0, 1).

    Example:
        >>> x = jnp.ones((2, 8))
        >>> bool((dropout(x, None, rate=0.5) == x).all())
        True
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
