"""Unigram and bigram cross-entropy: counting alone, to compare a model's loss on the same targets with.

With c(.) counts over the N training pairs (a, b), a token and the next one of its document, and V tokens,

    P(b | a) = w2 c(a, b) / c(a) + w1 c(b) / N + w0 / V,     w2 + w1 + w0 = 1,

where w2's share goes to c(b) / N for a token a that was never seen. The unigram figure is the same without w2. The
weights are tuned on training text alone: counts of the first nine tenths of every source, weights that make the last
tenth likeliest (expectation-maximisation; the likelihood is concave in them), then counts of everything.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from dsjax.data.corpus.store import TokenStore

_CHUNK = 1 << 22
_TUNING_PAIRS = 1 << 21
_EM_STEPS = 100


class TooLittleText(ValueError):
    """There is nothing to count, or nothing to compare it with."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Cross-entropy of counted models over the evaluated targets."""

    unigram_nats: float
    """Per target token."""
    bigram_nats: float
    """Per target token."""
    unigram_nats_per_byte: float
    """Per UTF-8 byte of the target tokens."""
    bigram_nats_per_byte: float
    """Per UTF-8 byte of the target tokens."""
    unigram_weights: tuple[float, float]
    """w1 (unigram), w0 (uniform) of the unigram model."""
    bigram_weights: tuple[float, float, float]
    """w2 (bigram), w1 (unigram), w0 (uniform) of the bigram model."""
    num_targets: int
    """Target tokens evaluated."""
    num_bytes: int
    """UTF-8 bytes of them; end-of-text has none."""
    num_training_pairs: int
    """Pairs counted."""


def baseline(
    train_stores: Sequence[TokenStore],
    validation: Iterable[dict[str, np.ndarray]] | Sequence[TokenStore],
    *,
    vocab_size: int,
    byte_lengths: Int64[np.ndarray, " vocab"],
    across_documents: bool = False,
) -> Baseline:
    """Count on the whole training text and evaluate on exactly the targets that a model is evaluated on.

    Args:
        train_stores: the training text; every source counts by its size.
        validation: batches with tokens, targets and loss_mask, such as `pipeline.validation_rows` gives; or stores,
            all of whose pairs are then evaluated.
        vocab_size: V; ids are below it.
        byte_lengths: `Tokenizer.byte_lengths`.
        across_documents: count the pair of a document's end and the next one's beginning too, for rows cut from a
            stream that is not isolated.

    Raises:
        TooLittleText: no pair to count or none to evaluate.

    Example:
        >>> train = TokenStore(tokens=np.array([1, 2] * 500), offsets=np.array([0, 1000]), hash="t")
        >>> result = baseline([train], [train], vocab_size=4, byte_lengths=np.ones(4, np.int64))
        >>> round(result.unigram_nats, 2), round(result.bigram_nats, 2)
        (0.69, 0.0)
    """
    inputs, targets = _evaluated_pairs(validation, across_documents)
    if not len(targets):
        raise TooLittleText("the validation rows hold no target to evaluate")
    ranges = [(store, 0, store.num_tokens) for store in train_stores]
    heads = [(store, 0, store.num_tokens * 9 // 10) for store in train_stores]
    tails = [(store, store.num_tokens * 9 // 10, store.num_tokens) for store in train_stores]
    held = list(_some_pairs(tails, across_documents))
    first = _Counts(_key_chunks(heads, vocab_size, across_documents), vocab_size)
    if not held or not first.total:
        raise TooLittleText("the training documents hold too few pairs of tokens to count")
    tuning = first.probabilities(*(np.concatenate(column) for column in zip(*held, strict=True)))
    bigram_weights = _best_weights(tuning)
    unigram_weights = _best_weights(tuning[1:])
    counts = _Counts(_key_chunks(ranges, vocab_size, across_documents), vocab_size)
    probabilities = counts.probabilities(inputs, targets)
    bigram = float(-np.log(bigram_weights @ probabilities).sum())
    unigram = float(-np.log(unigram_weights @ probabilities[1:]).sum())
    num_bytes = int(byte_lengths[targets].sum())
    return Baseline(
        unigram_nats=unigram / len(targets),
        bigram_nats=bigram / len(targets),
        unigram_nats_per_byte=unigram / max(1, num_bytes),
        bigram_nats_per_byte=bigram / max(1, num_bytes),
        unigram_weights=tuple(unigram_weights.tolist()),
        bigram_weights=tuple(bigram_weights.tolist()),
        num_targets=len(targets),
        num_bytes=num_bytes,
        num_training_pairs=counts.total,
    )


class _Counts:
    """c(a, b) as sorted keys a * V + b with their counts, c(a) and c(b)."""

    def __init__(self, chunks: Iterable[np.ndarray], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._keys = np.zeros(0, np.int64)
        self._numbers = np.zeros(0, np.int64)
        for chunk in chunks:
            keys, numbers = np.unique(chunk, return_counts=True)
            self._keys, self._numbers = _add(self._keys, self._numbers, keys, numbers)
        inputs, targets = np.divmod(self._keys, vocab_size)
        self.total = int(self._numbers.sum())
        self._as_input = np.bincount(inputs, self._numbers, minlength=vocab_size)
        self._as_target = np.bincount(targets, self._numbers, minlength=vocab_size)

    def probabilities(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """[3, pairs] float64: the bigram's, the unigram's and the uniform probability of each target."""
        keys = inputs * self._vocab_size + targets
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        both = np.where(self._keys[at] == keys, self._numbers[at], 0)
        unigram = self._as_target[targets] / self.total
        seen = self._as_input[inputs]
        bigram = np.where(seen > 0, both / np.maximum(seen, 1), unigram)
        return np.stack([bigram, unigram, np.full(len(targets), 1 / self._vocab_size)])


def _add(
    keys: np.ndarray, numbers: np.ndarray, more_keys: np.ndarray, more_numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of two sparse tables with sorted keys."""
    if not len(keys):
        return more_keys, more_numbers
    joined = np.concatenate([keys, more_keys])
    order = np.argsort(joined, kind="stable")
    joined = joined[order]
    begins = np.flatnonzero(np.diff(joined, prepend=joined[0] - 1))
    return joined[begins], np.add.reduceat(np.concatenate([numbers, more_numbers])[order], begins)


def _best_weights(probabilities: np.ndarray) -> np.ndarray:
    """The mixture of the rows of `probabilities` under which the columns are likeliest."""
    weights = np.full(len(probabilities), 1 / len(probabilities))
    for _ in range(_EM_STEPS):
        shares = weights[:, None] * probabilities
        weights, before = (shares / shares.sum(axis=0)).mean(axis=1), weights
        if np.abs(weights - before).max() < 1e-6:
            break
    # The uniform part is never given up: it is what keeps an unseen token's probability above 0.
    weights = np.maximum(weights, [0.0] * (len(weights) - 1) + [1e-6])
    return weights / weights.sum()


def _pairs(
    ranges: Iterable[tuple[TokenStore, int, int]], across_documents: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets, int64, whose inputs lie in the given ranges of tokens, in chunks."""
    for store, begin, end in ranges:
        last = min(end, store.num_tokens - 1)
        for start in range(begin, last, _CHUNK):
            stop = min(start + _CHUNK, last)
            tokens = store.tokens[start : stop + 1].astype(np.int64)
            inputs, targets = tokens[:-1], tokens[1:]
            if not across_documents:
                low, high = np.searchsorted(store.offsets, [start + 1, stop + 1])
                keep = np.ones(stop - start, bool)
                keep[store.offsets[low:high] - 1 - start] = False
                inputs, targets = inputs[keep], targets[keep]
            yield inputs, targets


def _key_chunks(
    ranges: Iterable[tuple[TokenStore, int, int]], vocab_size: int, across_documents: bool
) -> Iterator[np.ndarray]:
    for inputs, targets in _pairs(ranges, across_documents):
        yield inputs * vocab_size + targets


def _some_pairs(
    ranges: Iterable[tuple[TokenStore, int, int]], across_documents: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of pairs up to the number that weights are tuned on."""
    left = _TUNING_PAIRS
    for inputs, targets in _pairs(ranges, across_documents):
        if left <= 0:
            return
        yield inputs[:left], targets[:left]
        left -= len(targets)


def _evaluated_pairs(
    validation: Iterable[dict[str, np.ndarray]] | Sequence[TokenStore], across_documents: bool
) -> tuple[np.ndarray, np.ndarray]:
    chunks: list[tuple[np.ndarray, np.ndarray]] = []
    for item in validation:
        if isinstance(item, TokenStore):
            chunks += _pairs([(item, 0, item.num_tokens)], across_documents)
        else:
            mask = item["loss_mask"]
            chunks.append((item["tokens"][mask].astype(np.int64), item["targets"][mask].astype(np.int64)))
    empty = np.zeros(0, np.int64)
    inputs = np.concatenate([empty, *(pair[0] for pair in chunks)])
    targets = np.concatenate([empty, *(pair[1] for pair in chunks)])
    return inputs, targets
