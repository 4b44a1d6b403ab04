"""Documents to arrays of tokens, in bounded memory."""

import re
from collections.abc import Iterator

import numpy as np

from dsjax.data.tokenizers.tokenizer import Tokenizer

_ENCODE_CHARACTERS = 1 << 20
_LONGEST_CHARACTERS = 1 << 22  # where no such place comes, as in a line without blanks: 0.8 GB for a thread
# Between a letter or digit and a space every tokenizer that splits words first has a boundary. (One that puts a space
# before every text, like Llama 2's, sees one more there: one token in a million characters.)
_SAFE_CUT = re.compile(r"(?<=[^\W_])[ \n]")


def encode_documents(
    texts: list[str], tokenizer: Tokenizer, dtype: np.dtype, *, framed: bool = False
) -> list[np.ndarray]:
    """Encode each text, between those of `Tokenizer.text_frame`; `framed`: of `Tokenizer.frame`, to be read both
    ways.

    Long texts are encoded piece by piece, cut where words end, since an encoding takes a hundred times its text.
    """
    begin, end = (np.array(ids, dtype) for ids in (tokenizer.frame if framed else tokenizer.text_frame))
    result: list[list[np.ndarray]] = []
    batch: list[tuple[int, str]] = []
    held = 0

    def flush() -> None:
        for (owner, _), tokens in zip(batch, tokenizer.encode_arrays([t for _, t in batch], dtype), strict=True):
            result[owner].append(tokens)
        batch.clear()

    for number, text in enumerate(texts):
        result.append([])
        for piece in _cut_text(text):
            if held + len(piece) > _ENCODE_CHARACTERS:
                flush()
                held = 0
            batch.append((number, piece))
            held += len(piece)
    flush()
    return [np.concatenate([begin, *arrays, end]) for arrays in result]


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode a text as `tokenizer.encode` does, in bounded memory."""
    return [token for piece in _cut_text(text) for token in tokenizer.encode(piece)]


def _cut_text(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _ENCODE_CHARACTERS:
        limit = start + _LONGEST_CHARACTERS
        cut = _SAFE_CUT.search(text, start + _ENCODE_CHARACTERS, limit)
        if cut is None and len(text) <= limit:
            break
        stop = limit if cut is None else cut.start()
        yield text[start:stop]
        start = stop
    yield text[start:]
