"""Tokenizers: bytes, a byte-level BPE trained here, or an existing tokenizer.json; text to ids and exactly back.

A tokenizer is a list of pieces, the bytes that each id stands for. Decoding joins pieces and reads the result as
UTF-8, so ids that end inside a character, as a model's output may, give U+FFFD there and nothing else is changed. Text
is never turned into special tokens: a document that contains the characters "<|endoftext|>" does not end there.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int64

from dsjax.checkpoint.gguf_file import is_gguf, open_gguf
from dsjax.data.config import BPETokenizer, FileTokenizer
from dsjax.data.pieces import StreamDecoder, library_pieces
from dsjax.data.tokenizer_files import (
    SETTINGS_FILE,
    VOCAB_FILE,
    gguf_tokenizer,
    read_library,
    read_settings,
    wordpiece,
)

END_OF_TEXT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|im_end|>", "[SEP]")
_MASK_TOKENS = ("[MASK]", "<mask>")
_BYTE_FILE = "byte_tokenizer.json"
_BYTE_CONTENT = {"kind": "byte", "vocab_size": 257, "end_of_text": 256}


class Tokenizer:
    """Text to ids and back; made by `byte_tokenizer`, `train_bpe`, `load_tokenizer` or `Tokenizer.load`.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer.encode("héh"), tokenizer.decode([104, 195, 169])
        ([104, 195, 169, 104], 'hé')
        >>> stream = tokenizer.stream_decoder()
        >>> [stream.feed(token) for token in (104, 195, 169)], stream.finish()
        (['h', '', 'é'], '')
    """

    vocab_size: int
    """Ids are 0..vocab_size - 1."""
    end_of_text: int
    """The id put after each document."""
    pieces: list[bytes]
    """The bytes of each id; empty for special tokens."""
    settings: Mapping[str, Any]
    """What tokenizer_config.json says: special tokens, chat_template; kept, and written again by `save`."""

    def __init__(
        self,
        library: tokenizers.Tokenizer | None,
        *,
        end_of_text: str = END_OF_TEXT,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap `library`, or None for bytes; `end_of_text` is a token of `library`."""
        self._library = library
        self.settings = {} if settings is None else settings
        self._strip = False
        if library is None:
            self.end_of_text = 256
            self.pieces = [bytes([value]) for value in range(256)] + [b""]
        else:
            library.encode_special_tokens = True
            library.no_truncation()
            library.no_padding()
            self.end_of_text = _end_id(library, end_of_text)
            self.pieces, self._strip = library_pieces(library)
        self.vocab_size = len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-text token."""
        return self.encode_batch([text])[0]

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of text that a chat template has written: here the names of special tokens mean these tokens."""
        if self._library is None:
            return self.encode(text)
        self._library.encode_special_tokens = False
        try:
            return self._library.encode(text, add_special_tokens=False).ids
        finally:
            self._library.encode_special_tokens = True

    def token_id(self, name: str) -> int | None:
        """Id of a token by its name; None if there is none."""
        return None if self._library is None else self._library.token_to_id(name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without end-of-text tokens."""
        if self._library is None:
            return [list(text.encode()) for text in texts]
        return [item.ids for item in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with the special tokens that the model wants around it, such as [CLS] and [SEP]."""
        if self._library is None:
            return self.encode_batch(texts)
        return [item.ids for item in self._library.encode_batch_fast(list(texts), add_special_tokens=True)]

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """As `encode_batch`, as arrays of `dtype`; what building a corpus uses."""
        if self._library is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
        return [np.array(ids, dtype) for ids in self.encode_batch(texts)]

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text, such as [CLS] and [SEP]; without any,
        nothing and an end-of-text token."""
        if self._library is None or not self._library.num_special_tokens_to_add(False):
            return [], [self.end_of_text]
        framed = self._library.encode("a", add_special_tokens=True)
        inside = [at for at, special in enumerate(framed.special_tokens_mask) if not special]
        return framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]

    @functools.cached_property
    def mask_token(self) -> int | None:
        """The id that stands for a hidden token, [MASK] or <mask>; None if there is none."""
        ids = [self._library.token_to_id(name) for name in _MASK_TOKENS] if self._library is not None else []
        return next((token for token in ids if token is not None), None)

    @property
    def library(self) -> tokenizers.Tokenizer | None:
        """The `tokenizers` library's own; None for bytes."""
        return self._library

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        text = b"".join([self.pieces[token] for token in ids]).decode("utf-8", "replace")
        return text[1:] if self._strip and text.startswith(" ") else text

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that arrive one at a time."""
        return StreamDecoder(self.pieces)

    def special_id(self, role: str) -> int | None:
        """The id of the token that the settings name for a role, such as "bos_token"; None if there is none."""
        name = _content(self.settings.get(role))
        return self.token_id(name) if name else None

    @functools.cached_property
    def begin(self) -> list[int]:
        """What the tokenizer wants before every text that a model goes on with: [its bos_token], as Llama's, or []."""
        marks, bos = self.encode_marked([""])[0], self.special_id("bos_token")
        return marks[:1] if bos is not None and marks[:1] == [bos] else []

    @functools.cached_property
    def byte_lengths(self) -> Int64[np.ndarray, " vocab"]:
        """UTF-8 bytes of each id; 0 for special tokens."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        content = json.dumps(_BYTE_CONTENT) if self._library is None else self._library.to_str()
        return hashlib.sha256(f"{self.end_of_text}\n{content}".encode()).hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json (its eos_token), or byte_tokenizer.json, into `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if self._library is None:
            (path / _BYTE_FILE).write_text(json.dumps(_BYTE_CONTENT) + "\n", encoding="utf-8")
            return
        (path / "tokenizer.json").write_text(self._library.to_str(pretty=True), encoding="utf-8")
        end = self._library.id_to_token(self.end_of_text)
        names = {**self.settings, "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        (path / SETTINGS_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read what `save` wrote, or a Hugging Face folder with a tokenizer.json.

        Raises:
            ValueError: no tokenizer there, or one that cannot be used.
        """
        path = Path(folder)
        if (path / _BYTE_FILE).is_file():
            content = json.loads((path / _BYTE_FILE).read_text(encoding="utf-8"))
            if content != _BYTE_CONTENT:
                raise ValueError(f"{path / _BYTE_FILE} is not the byte tokenizer of this version: {content}")
            return cls(None)
        return load_tokenizer(FileTokenizer(path=str(path)))


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and an end-of-text token, id 256."""
    return Tokenizer(None)


def train_bpe(
    documents: Iterable[str], config: BPETokenizer, cache_dir: str | os.PathLike, *, masked: bool = False
) -> Tokenizer:
    """A byte-level BPE of at most `config.vocab_size` tokens, end of text (id 0) and the 256 bytes among them.

    With `masked` it has [MASK] (id 1) too, for the task masked.

    The result is kept under `cache_dir`/tokenizers in a folder named by a hash of the documents and the settings, and
    taken from there next time. A text too short for so many merges gives fewer tokens.

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
        _save_atomically(_train(texts, config.vocab_size, special), folder)
    return Tokenizer.load(folder)


def _train(texts: list[str], vocab_size: int, special: list[str]) -> Tokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return Tokenizer(library)


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


def load_tokenizer(config: FileTokenizer) -> Tokenizer:
    """An existing tokenizer: tokenizer.json, WordPiece's vocab.txt, or the one inside a GGUF file.

    Padding and truncation that it asks for are not applied. The end-of-text token is `config.end_of_text`, else the
    eos_token of a tokenizer_config.json beside the file or of the GGUF file, else the first of <|endoftext|>, </s>,
    <|im_end|>, [SEP] that it has.

    Raises:
        ValueError: no such file, not a tokenizer, no end-of-text token, or a decoder that is not supported.
    """
    path = Path(config.path).expanduser()
    if path.is_dir():
        path = next((path / name for name in ("tokenizer.json", VOCAB_FILE) if (path / name).is_file()), path)
    if is_gguf(path):
        library, settings = gguf_tokenizer(open_gguf(path))
    elif path.is_file():
        settings = read_settings(path.with_name(SETTINGS_FILE))
        library = wordpiece(path, settings) if path.name == VOCAB_FILE else read_library(path)
    else:
        raise ValueError(
            f"no tokenizer at {path}: give a tokenizer.json of the `tokenizers` library, a {VOCAB_FILE} of WordPiece, "
            "a folder with one of these, or a GGUF file"
        )
    vocabulary = library.get_vocab(with_added_tokens=True)
    name = config.end_of_text or _content(settings.get("eos_token"))
    if not name:
        name = next((end for end in _KNOWN_ENDS if end in vocabulary), "")
    if not name:
        raise ValueError(f"{path} has none of {', '.join(_KNOWN_ENDS)}: name its last token with tokenizer.end_of_text")
    try:
        return Tokenizer(library, end_of_text=name, settings=settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _content(token: object) -> str:
    """A special token, which is a string or an object with `content`; '' if there is none."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def _end_id(library: tokenizers.Tokenizer, name: str) -> int:
    token = library.token_to_id(name)
    if token is None:
        raise ValueError(f"end_of_text {name!r} is not one of the tokenizer's tokens")
    return token
