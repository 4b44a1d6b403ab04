"""Choosing the next token from logits: greedy, or drawn with temperature, top-k, top-p (arXiv 1904.09751) and min-p
(arXiv 2407.01082); tokens that occurred may be made less likely (arXiv 1909.05858). In transformers' order.

Shapes: B rows, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 means all.
        top_p: draw from the likeliest tokens that together have this probability, at least one; 1 means all.
        min_p: draw from tokens at least this many times as likely as the likeliest; 0 means all.
        repetition_penalty: logits of tokens that occurred, in the prompt or since, are divided by it if positive,
            else multiplied with it; 1 changes nothing. Also when greedy.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature and top_k must be 0 or more, top_p in (0, 1]; got "
                f"{self.temperature}, {self.top_k}, {self.top_p}"
            )
        if not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                "min_p must be in [0, 1], repetition_penalty above 0 (1 changes nothing); got "
                f"{self.min_p}, {self.repetition_penalty}"
            )


def penalise(logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """The logits with those of seen tokens lowered, as the repetition penalty says.

    Example:
        >>> penalise(jnp.array([[4.0, -4.0, 1.0]]), jnp.array([[True, True, False]]), 2.0).tolist()
        [[2.0, -8.0, 1.0]]
    """
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def restrict(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """The logits after temperature, with -inf for the tokens that top-k, top-p and min-p leave out.

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
    if sampling.min_p > 0:
        # p / max p is exp(logit - max logit): no sum over the vocabulary is needed.
        least = jnp.max(scaled, axis=-1, keepdims=True) + math.log(sampling.min_p)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    return scaled


def choose(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, " B"],
    sampling: Sampling,
    *,
    seen_BV: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """One token per row, int32.

    Args:
        logits_BV: of the next token.
        keys_B: one a row, so that a row's draw does not depend on its neighbours.
        sampling: how to choose.
        seen_BV: tokens that occurred in the row; needed when there is a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        assert seen_BV is not None
        logits_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, restrict(logits_BV, sampling)).astype(jnp.int32)
