"""Metrics of a row's difficulty (arXiv 2212.03597, section 3.1; DeepSpeed's analyze_data.py), whole numbers from 0 on.

    length               n, the row's tokens, padding left out
    vocab_rarity         floor(sum over them of -ln p(w)), p(w) = f(w) / sum of f, f the training tokens' counts with 1
                         in place of 0; a sum and no mean, as upstream
    length_then_rarity   n C + vocab_rarity with C = 10^(ceil(log10(T max -ln p)) + 1), above any rarity: by length, and
                         rows of one length by rarity
    a.dotted.path        a function of the user's own, (tokens int32 [B, T], mask bool [B, T]) -> whole numbers [B]

Rows are measured as they are read, before the task masked hides tokens. B rows, T tokens, V vocabulary.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from dsjax.data.corpus.store import TokenStore
from dsjax.data.curriculum.difficulty import imported

Metric = Callable[[Int32[np.ndarray, "B T"], Bool[np.ndarray, "B T"]], Int64[np.ndarray, " B"]]
BUILT_IN = ("vocab_rarity", "length", "length_then_rarity")
_COUNTED = 1 << 24  # tokens at a time


def surprisals(stores: Sequence[TokenStore], vocab_size: int) -> Float64[np.ndarray, " V"]:
    """-ln p of each token, in nats.

    Example:
        >>> store = TokenStore(tokens=np.array([1, 1, 1, 2]), offsets=np.array([0, 4]), hash="x")
        >>> surprisals([store], 3).round(3).tolist()  # counts 1 (in place of 0), 3, 1
        [1.609, 0.511, 1.609]
    """
    counts = np.zeros(vocab_size, np.int64)
    for store in stores:
        for begin in range(0, store.num_tokens, _COUNTED):
            counts += np.bincount(store.tokens[begin : begin + _COUNTED], minlength=vocab_size)
    counts = np.maximum(counts, 1)
    return -np.log(counts / counts.sum())


def metric_of(name: str, stores: Sequence[TokenStore], *, vocab_size: int, sequence_length: int) -> Metric:
    """The metric of a name, or of the dotted path of a function.

    Args:
        name: see the head of this file.
        stores: whose tokens say how rare each is.
        vocab_size: V.
        sequence_length: T.

    Raises:
        ValueError: no such metric or function.

    Example:
        >>> length = metric_of("length", [], vocab_size=9, sequence_length=4)
        >>> length(np.zeros((2, 4), np.int32), np.array([[True] * 4, [True, False, False, False]])).tolist()
        [4, 1]
    """
    if name == "length":
        return lambda tokens, mask: mask.sum(axis=1, dtype=np.int64)
    if name in BUILT_IN:
        nats = surprisals(stores, vocab_size)
        if name == "vocab_rarity":
            return lambda tokens, mask: _rarity(nats, tokens, mask)
        each = 10 ** (math.ceil(math.log10(max(1.0, sequence_length * float(nats.max())))) + 1)
        return lambda tokens, mask: mask.sum(axis=1, dtype=np.int64) * each + _rarity(nats, tokens, mask)
    function = _own(name)
    return lambda tokens, mask: _checked(name, function(tokens, mask), len(tokens))


def _own(name: str) -> Callable[..., object]:
    if "." not in name:
        raise ValueError(
            f"no metric {name!r}; there are {', '.join(BUILT_IN)}, or the dotted path of a function of your own, such "
            "as my_package.my_module.my_function"
        )
    return imported(name)


def _rarity(nats: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, nats[tokens], 0.0).sum(axis=1).astype(np.int64)


class WrongValue(ValueError):
    """A function of the user's own gave what is no difficulty; `place` is the row in what it was given."""

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


def _checked(path: str, found: object, num_rows: int) -> np.ndarray:
    """Check the result of a user's own function; as int64 [B]."""
    fix = "a metric gives one whole number from 0 on for each row, as an integer array [B]"
    if not isinstance(found, np.ndarray):
        raise WrongValue(f"{path} gave a {type(found).__name__} for {num_rows} rows; {fix}: use numpy.asarray(...)")
    if found.shape != (num_rows,):
        raise WrongValue(f"{path} gave an array of shape {list(found.shape)} for {num_rows} rows; {fix}")
    if not np.issubdtype(found.dtype, np.integer):
        place = None
        if np.issubdtype(found.dtype, np.floating):
            place = int(np.flatnonzero(~np.isfinite(found))[0]) if not np.isfinite(found).all() else 0
        shown = f", such as {found[place]}" if place is not None else ""
        raise WrongValue(f"{path} gave {found.dtype}{shown}; {fix}: scale and round it, .astype(numpy.int64)", place)
    wrong = np.flatnonzero((found < 0) | (found > np.iinfo(np.int64).max))
    if len(wrong):
        raise WrongValue(f"{path} gave {found[wrong[0]]}; {fix}: add what makes the least of them 0", int(wrong[0]))
    return found.astype(np.int64)


def code_of(name: str) -> str:
    """Hash of the file that a user's function is in, '' of a metric of ours: what was measured by other code is not
    taken for this. Files that it imports are not looked at.

    Raises:
        ValueError: no such metric or function.

    Example:
        >>> code_of("length"), len(code_of("dsjax.data.curriculum.metrics.code_of"))
        ('', 64)
    """
    if name in BUILT_IN:
        return ""
    _own(name)
    found = importlib.util.find_spec(name.rpartition(".")[0])
    origin = Path(found.origin) if found is not None and found.origin is not None else None
    return hashlib.sha256(origin.read_bytes()).hexdigest() if origin is not None and origin.is_file() else ""
