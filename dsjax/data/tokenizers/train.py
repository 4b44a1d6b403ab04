"""Training a byte-level BPE on documents, kept under a hash of them."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from dsjax.data.config import BPETokenizer
from dsjax.data.corpus.progress import elapsed
from dsjax.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

_LONGEST_WORD = 4096  # in bytes


def train_bpe(
    documents: Iterable[str],
    config: BPETokenizer,
    cache_dir: str | os.PathLike,
    *,
    masked: bool = False,
    progress: bool = False,
) -> Tokenizer:
    """Train a byte-level BPE of at most `config.vocab_size` tokens, end of text (id 0) and the 256 bytes among them.

    With `masked` it has [MASK] (id 1) too, for the task masked.

    The result is kept under `cache_dir`/tokenizers in a folder named by a hash of the documents and the settings, and
    taken from there next time. A text too short for so many merges gives fewer tokens. `progress` says on stderr how
    long it takes.

    Words longer than 4,096 bytes, such as a line of DNA, are learned from in pieces, since the time grows with the
    square of a word's length; they are encoded whole.

    Raises:
        ValueError: there is no text.
    """
    texts = [text for text in documents if text]
    if not texts:
        raise ValueError("cannot train a tokenizer: the training documents contain no text")
    special = [END_OF_TEXT, "[MASK]"] if masked else [END_OF_TEXT]
    digest = hashlib.sha256(f"byte-level bpe 1 {config.vocab_size}{' masked' * masked}".encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    folder = Path(cache_dir) / "tokenizers" / digest.hexdigest()[:32]
    if not folder.is_dir():
        with elapsed("training the tokenizer", enabled=progress):
            _save_atomically(_train(texts, config.vocab_size, special), folder)
    return Tokenizer.load(folder)


def _train(texts: list[str], vocab_size: int, special: list[str]) -> Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.Split(tokenizers.Regex(f".{{{_LONGEST_WORD}}}"), behavior="isolated")
    library = tokenizers.Tokenizer(models.BPE())
    # Where no word is that long nothing would be cut, but everything searched: half as long again.
    long = any(map(_has_long_word, texts))
    library.pre_tokenizer = pre_tokenizers.Sequence([words, pieces]) if long else words
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.pre_tokenizer = words
    return Tokenizer(library)


def _has_long_word(text: str) -> bool:
    """Whether a word may be longer than `_LONGEST_WORD`: some window at an eighth of that has blanks only or none."""
    step = _LONGEST_WORD // 8  # a character has up to four bytes, and a run of two windows holds one whole
    windows = (text[begin : begin + step] for begin in range(0, len(text) - step + 1, step))
    return any(window.isspace() or window.split(None, 1) == [window] for window in windows)


def _save_atomically(tokenizer: Tokenizer, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        tokenizer.save(temporary)
        temporary.rename(folder)
    except OSError:
        # Another process may have put the same tokenizer there first; then ours is not needed.
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise
