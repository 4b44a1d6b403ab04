"""One text, or one pair of texts, as one row of tokens, with the special tokens that its model wants around it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from dsjax.data.tokenizers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Row:
    """A text or a pair of texts as a model reads it."""

    ids: list[int]
    num_second: int
    """Number of the last ids that are of token type 1, the second text of a pair."""
    cut: bool
    """Whether the text was longer."""


def encode_rows(tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str | None], *, length: int) -> list[Row]:
    """Each text, or pair of texts, as one row of at most `length` ids with the tokenizer's special tokens.

    What is too long loses its end, of a pair the longer one first. A tokenizer without special tokens of its own
    gives a text alone, and an end-of-text token between the texts of a pair.

    Raises:
        ValueError: `length` leaves no room for text.

    Example:
        >>> from dsjax.data.tokenizers.tokenizer import byte_tokenizer
        >>> encode_rows(byte_tokenizer(), ["abcd", "a"], [None, "b"], length=3)
        [Row(ids=[97, 98, 99], num_second=0, cut=True), Row(ids=[97, 256, 98], num_second=0, cut=False)]
    """
    firsts = _encodings(tokenizer, texts)
    seconds = _encodings(tokenizer, [pair or "" for pair in pairs])
    rows = []
    for first, second, pair in zip(firsts, seconds, pairs, strict=True):
        added = _num_added(tokenizer, is_pair=pair is not None)
        room = length - added
        if room < 1 + (pair is not None):
            raise ValueError(f"rows of {length} tokens have no room for text beside {added} special tokens")
        of_second = len(second) if pair is not None else 0
        keep = _shares(len(first), of_second, room)
        cut = len(first) + of_second > room  # told before joining, which cuts the encodings themselves
        ids, num_second = _joined(tokenizer, first, second if pair is not None else None, keep)
        rows.append(Row(ids, num_second, cut))
    return rows


def padded(rows: Sequence[Sequence[int]], width: int) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Rows as tokens and mask [B, width], padded on the right with zeros; the mask is 1 for what is real.

    Example:
        >>> [array.tolist() for array in padded([[7, 8], [9]], 3)]
        [[[7, 8, 0], [9, 0, 0]], [[1, 1, 0], [1, 0, 0]]]
    """
    tokens, mask = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask


def _encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list:
    """Encode texts without special tokens; to plain lists of ids if these are bytes."""
    if tokenizer.library is None:
        return [list(text.encode()) for text in texts]
    return tokenizer.library.encode_batch(list(texts), add_special_tokens=False)


def _num_added(tokenizer: Tokenizer, *, is_pair: bool) -> int:
    own = tokenizer.library.num_special_tokens_to_add(is_pair) if tokenizer.library is not None else 0
    return own or int(is_pair)


def _joined(tokenizer: Tokenizer, first, second, keep: tuple[int, int]) -> tuple[list[int], int]:
    """Ids, and how many of them are of token type 1."""
    library = tokenizer.library
    if library is None or not library.num_special_tokens_to_add(second is not None):
        bare = lambda encoding, size: list(encoding if library is None else encoding.ids)[:size]
        rest = [] if second is None else [tokenizer.end_of_text, *bare(second, keep[1])]
        return [*bare(first, keep[0]), *rest], 0
    first.truncate(keep[0])
    if second is not None:
        second.truncate(keep[1])
    whole = library.post_process(first, second, add_special_tokens=True)
    return whole.ids, sum(whole.type_ids)


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Compute how much of two texts fits when the longer one is cut first.

    Example:
        >>> _shares(10, 3, 9), _shares(10, 8, 9), _shares(2, 2, 9)
        ((6, 3), (5, 4), (2, 2))
    """
    if first + second <= room:
        return first, second
    if second <= room // 2:
        return room - second, second
    if first <= room - room // 2:
        return first, room - first
    return room - room // 2, room // 2
