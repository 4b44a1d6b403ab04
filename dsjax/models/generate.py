"""Text from a model: one pass over the prompt, then one compiled step per token over a static key-value cache.

Prompts are padded on the left to a bucket, so that all rows end at the same place and few programs are compiled.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from dsjax.models.sampling import Sampling, choose
from dsjax.models.transformer import Cache, Transformer

GREEDY = Sampling()


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "valid", "positions", "place", "key"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Progress:
    """Where generation stands: the cache, which places count, each row's next position, the next place, the key."""

    cache: Cache
    valid: Bool[Array, "B S"]
    positions: Int[Array, " B"]
    place: Int[Array, ""]
    key: Key[Array, ""]


@partial(jax.jit, static_argnames=("graph", "sampling", "room"))
def _prefill(graph, params, tokens, mask, key, *, sampling: Sampling, room: int):
    model: Transformer = nnx.merge(graph, params)
    length = tokens.shape[1]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    features, cache = model.prefill(tokens, mask.astype(bool), positions, length + room)
    valid = jnp.pad(mask.astype(bool), ((0, 0), (0, room)), constant_values=True)
    progress = _Progress(cache, valid, positions[:, -1] + 1, jnp.asarray(length, jnp.int32), key)
    return _next(model, features[:, -1], progress, sampling)


@partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="progress")
def _step(graph, params, tokens, progress: _Progress, *, sampling: Sampling):
    model: Transformer = nnx.merge(graph, params)
    features, cache = model.decode(
        tokens[:, None],
        progress.cache,
        start=progress.place,
        valid=progress.valid,
        positions=progress.positions[:, None],
    )
    moved = _Progress(cache, progress.valid, progress.positions + 1, progress.place + 1, progress.key)
    return _next(model, features[:, -1], moved, sampling)


def _next(model: Transformer, features_BD: Float[Array, "B D"], progress: _Progress, sampling: Sampling):
    logits_BV = model.logits(features_BD[:, None])[:, 0]
    return choose(logits_BV, jax.random.fold_in(progress.key, progress.place), sampling), progress


def stream(
    model: Transformer,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Tokens [B] int32 as they are made, one array per place.

    Args:
        model: the model.
        input_ids: prompts [B, T].
        attention_mask: [B, T], 1 for tokens, 0 for padding on either side; None means no padding.
        max_new_tokens: how many arrays to give.
        sampling: how to choose; greedy unless told otherwise.
        seed: of the draws.

    Raises:
        ValueError: an empty prompt, or more positions than the model has.
    """
    ids, mask = _left_padded(np.asarray(input_ids), attention_mask)
    longest = int(mask.sum(1).max())
    limit = model.architecture.max_positions
    if limit and longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need {longest + max_new_tokens} positions, "
            f"but the model has {limit}; shorten the prompt or ask for at most {max(0, limit - longest)} tokens"
        )
    if max_new_tokens < 1:
        return
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    room = bucket(max_new_tokens)
    tokens, progress = _prefill(graph, params, ids, mask, jax.random.key(seed), sampling=sampling, room=room)
    for made in range(1, max_new_tokens + 1):
        # The next step is dispatched before this token is read, so that reading does not hold the device up.
        current = tokens
        if made < max_new_tokens:
            tokens, progress = _step(graph, params, current, progress, sampling=sampling)
        yield np.asarray(current)


def generate(
    model: Transformer,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Int[np.ndarray, "B N"]:
    """The prompts [B, T] and max_new_tokens more: [B, T + N] int32. Arguments as `stream`'s."""
    made = list(stream(model, input_ids, attention_mask, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed))
    return np.concatenate([np.asarray(input_ids, np.int32), *(tokens[:, None] for tokens in made)], axis=1)


def bucket(length: int) -> int:
    """The length that is compiled for: the next power of two, at least 16.

    Example:
        >>> bucket(5), bucket(16), bucket(17)
        (16, 16, 32)
    """
    return max(16, 1 << (length - 1).bit_length())


def _left_padded(ids: np.ndarray, mask: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows moved to the right end of a bucket, int32, with their mask."""
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be [rows, tokens]; got shape {ids.shape}")
    mask = np.ones(ids.shape, np.int32) if mask is None else np.asarray(mask, np.int32)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {ids.shape}; got {mask.shape}")
    lengths = mask.sum(1)
    if ids.shape[1] == 0 or lengths.min() == 0:
        raise ValueError("a prompt is empty; give at least one token, such as the end-of-text token")
    width = bucket(int(lengths.max()))
    out_ids, out_mask = np.zeros((len(ids), width), np.int32), np.zeros((len(ids), width), np.int32)
    for row, (tokens, real) in enumerate(zip(ids, mask.astype(bool), strict=True)):
        out_ids[row, width - lengths[row] :] = tokens[real]
        out_mask[row, width - lengths[row] :] = 1
    return out_ids, out_mask
