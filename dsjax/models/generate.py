"""Text from a model: one pass over the prompt, then one compiled step per token over a static key-value cache.

Prompts are padded on the left to a bucket, so that all rows end at the same slot and few programs are compiled.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from dsjax.mesh.layout import BATCH_AXES, ONE_DEVICE, Layout
from dsjax.models.sampling import Sampling, choose
from dsjax.models.transformer import Transformer

GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Options of generation: its length and its sampling.

    Attributes:
        max_new_tokens: at most so many tokens for each prompt.
        sampling: how they are chosen; greedy unless told otherwise.
        stop_tokens: tokens that end a row.
        seed: of the draws.
    """

    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_tokens: frozenset[int] = frozenset()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {self.max_new_tokens}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """Where generation stands.

    Attributes:
        cache: keys and values, see `dsjax.models.transformer.Cache`.
        valid: slots of it that count, bool [B, S].
        positions: each row's next position, [B].
        slot: the next slot.
        key: of the draws.
        seen: tokens that occurred, bool [B, V]; None when nothing asks for them.
    """

    # Without jaxtyping's annotations, which the tests check: JAX rebuilds trees with leaves that are no arrays.
    cache: Any
    valid: jax.Array
    positions: jax.Array
    slot: jax.Array
    key: jax.Array
    seen: jax.Array | None


@partial(jax.jit, static_argnames=("graph", "sampling", "room", "layout"))
def _prefill(graph, params, tokens, mask, key, *, sampling: Sampling, room: int, layout: Layout = ONE_DEVICE):
    model: Transformer = nnx.merge(graph, params)
    length = tokens.shape[1]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    features, cache = model.prefill(tokens, mask.astype(bool), positions, num_slots=length + room, layout=layout)
    valid = jnp.pad(mask.astype(bool), ((0, 0), (0, room)), constant_values=True)
    seen = None
    if sampling.repetition_penalty != 1:
        rows = tokens.shape[0]
        seen = jnp.zeros((rows, model.config.vocab_size), bool)
        seen = seen.at[jnp.arange(rows)[:, None], tokens].max(mask.astype(bool))
    progress = _Progress(cache, valid, positions[:, -1] + 1, jnp.asarray(length, jnp.int32), key, seen)
    return _next(model, features[:, -1], progress, sampling, layout)


@partial(jax.jit, static_argnames=("graph", "sampling", "layout"), donate_argnames="progress")
def _step(graph, params, tokens, progress: _Progress, *, sampling: Sampling, layout: Layout = ONE_DEVICE):
    model: Transformer = nnx.merge(graph, params)
    features, cache = model.decode(
        tokens[:, None],
        progress.cache,
        start=progress.slot,
        valid=progress.valid,
        positions=progress.positions[:, None],
        layout=layout,
    )
    moved = dataclasses.replace(progress, cache=cache, positions=progress.positions + 1, slot=progress.slot + 1)
    return _next(model, features[:, -1], moved, sampling, layout)


def _next(
    model: Transformer, features_BD: Float[Array, "B D"], progress: _Progress, sampling: Sampling, layout: Layout
):
    """The tokens after the last ones, and the progress with them among those that occurred."""
    logits_BV = model.logits(features_BD[:, None], layout=layout)[:, 0]
    rows = jnp.arange(features_BD.shape[0])
    # Of the row's number and the token's position in it: not of how long the neighbours are, which moves the slot.
    keys = jax.vmap(lambda row, position: jax.random.fold_in(jax.random.fold_in(progress.key, row), position))(
        rows, progress.positions
    )
    tokens = choose(logits_BV, keys, sampling, seen_BV=progress.seen)
    if progress.seen is not None:
        progress = dataclasses.replace(progress, seen=progress.seen.at[rows, tokens].set(True))
    return tokens, progress


def stream(
    model: Transformer,
    input_ids: ArrayLike,
    *,
    options: Generation,
    attention_mask: ArrayLike | None = None,
    layout: Layout = ONE_DEVICE,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Tokens [B] int32 as they are made, one array per position, until all rows have ended or are long enough.

    Args:
        model: the model.
        input_ids: prompts [B, T].
        options: how much, and how. A row that has ended repeats the token that ended it.
        attention_mask: [B, T], 1 for tokens, 0 for padding on either side; None means no padding.
        layout: where the model's parameters lie. Rows are split over data, fsdp and expert if these divide B.

    Raises:
        ValueError: an empty prompt, more positions than the model has, or a model that writes no text.
    """
    ids, mask = _left_padded(np.asarray(input_ids), attention_mask)
    _check_fits(model, int(mask.sum(1).max()), options.max_new_tokens)
    graph, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    layout = _for_rows(layout, len(ids))
    start = partial(_prefill, sampling=options.sampling, room=bucket(options.max_new_tokens), layout=layout)
    tokens, progress = start(graph, params, ids, mask, jax.random.key(options.seed))
    stop_tokens = np.array(sorted(options.stop_tokens), np.int32)
    last, ended = np.zeros(len(ids), np.int32), np.zeros(len(ids), bool)
    for made in range(1, options.max_new_tokens + 1):
        # The next step is dispatched before this token is read, so that reading does not hold the device up.
        current = tokens
        if made < options.max_new_tokens:
            tokens, progress = _step(graph, params, current, progress, sampling=options.sampling, layout=layout)
        last = np.where(ended, last, np.asarray(current))
        ended |= np.isin(last, stop_tokens)
        yield last
        if ended.all():
            return


def _for_rows(layout: Layout, num_rows: int) -> Layout:
    """The layout for rows that are not divided among workers; where the mesh does not divide them, all have all."""
    axes = ("data", *BATCH_AXES)
    return dataclasses.replace(layout, batch_axes=axes if num_rows % layout.size(axes) == 0 else ())


def _check_fits(model: Transformer, longest: int, max_new_tokens: int) -> None:
    """Refuse a model that does not write, and more positions than it has."""
    if model.config.task != "language_model" or not model.architecture.causal:
        raise ValueError(
            f"a {model.config.kind} model for the task {model.config.task} does not write text from left to right; "
            "give a causal language model"
        )
    check_positions(model.architecture.max_positions, longest, max_new_tokens)


def check_positions(limit: int, longest: int, max_new_tokens: int) -> None:
    """Refuse a text that would be longer than a model's positions.

    Args:
        limit: how many it has; 0 of a model without a bound.
        longest: tokens of the longest prompt.
        max_new_tokens: how many more are asked for.

    Raises:
        ValueError: says all three numbers and what would fit.

    Example:
        >>> check_positions(64, 1, 63)
        >>> check_positions(64, 1, 100)
        Traceback (most recent call last):
        ...
        ValueError: a prompt of 1 tokens and 100 new ones need 101 positions, but the model has 64; shorten the prompt \
or ask for at most 63 tokens
    """
    if limit and longest + max_new_tokens > limit:
        fewer = (
            f" or ask for at most {limit - longest} tokens" if longest < limit else f" to {limit - 1} tokens or fewer"
        )
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones need {longest + max_new_tokens} positions, "
            f"but the model has {limit}; shorten the prompt{fewer}"
        )


def generate(
    model: Transformer,
    input_ids: ArrayLike,
    *,
    options: Generation,
    attention_mask: ArrayLike | None = None,
    layout: Layout = ONE_DEVICE,
) -> Int[np.ndarray, "B N"]:
    """The prompts [B, T] and what was written after them: [B, T + N] int32, N at most max_new_tokens.

    Arguments as `stream`'s.
    """
    made = list(stream(model, input_ids, options=options, attention_mask=attention_mask, layout=layout))
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
