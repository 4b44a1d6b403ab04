"""Choosing the next token from logits: greedy, or drawn with temperature, top-k and top-p (arXiv 1904.09751)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 means all.
        top_p: draw from the likeliest tokens that together have this probability, at least one; 1 means all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature and top_k must be 0 or more, top_p in (0, 1]; got "
                f"{self.temperature}, {self.top_k}, {self.top_p}"
            )


def restrict(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits after temperature, with -inf for the tokens that top-k and top-p leave out.

    Example:
        >>> restrict(jnp.array([[0.0, 2.0, 1.0]]), Sampling(temperature=1.0, top_k=2)).tolist()
        [[-inf, 2.0, 1.0]]
    """
    scaled = logits_BV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_BV.shape[-1]:
        smallest = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < smallest, -jnp.inf, scaled)
    if sampling.top_p < 1:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it have less than top_p: the first always does.
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < smallest, -jnp.inf, scaled)
    return scaled


def choose(logits_BV: Float[Array, "B V"], key: Key[Array, ""], sampling: Sampling) -> Int[Array, " B"]:
    """One token per row, int32; rows draw independently."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, restrict(logits_BV, sampling)).astype(jnp.int32)
