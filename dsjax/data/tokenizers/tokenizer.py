"""Tokenizers: bytes, or one of the `tokenizers` library; text to ids and exactly back.

A tokenizer is a list of pieces, the bytes that each id stands for. Decoding joins pieces and reads the result as
UTF-8, so ids that end inside a character, as a model's output may, give U+FFFD there and nothing else is changed. Text
is never turned into special tokens: a document that contains the characters "<|endoftext|>" does not end there.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int64

from dsjax.checkpoint.manifest import read_json
from dsjax.data.tokenizers.files import TOKENIZER_FILE, read_library
from dsjax.data.tokenizers.pieces import Pieces, StreamDecoder, library_pieces
from dsjax.data.tokenizers.settings import SETTINGS_FILE, TEXT_FRAME, content_of, special_tokens

END_OF_TEXT = "<|endoftext|>"
_MASK_TOKENS = ("[MASK]", "<mask>")
_BYTE_FILE = "byte_tokenizer.json"
_BYTE_CONTENT = {"kind": "byte", "vocab_size": 257, "end_of_text": 256}


class Tokenizer:
    """Text to ids and back; made by `byte_tokenizer`, `Tokenizer.load`, `train_bpe` (train.py) or load.py.

    Nothing changes it once it is made: several threads may use it at the same time.

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
    """Content of tokenizer_config.json: special tokens, chat_template; kept, and written again by `save`."""

    def __init__(
        self,
        library: tokenizers.Tokenizer | None,
        *,
        end_of_text: str = END_OF_TEXT,
        settings: Mapping[str, Any] | None = None,
        only_ended: bool = False,
    ) -> None:
        """Wrap a tokenizer.

        Args:
            library: of the `tokenizers` library; None for bytes.
            end_of_text: a token of `library`.
            settings: the content of tokenizer_config.json.
            only_ended: a text that is read from left to right has nothing before it, whatever `library` would put
                there; of what was made before that counted.

        Raises:
            ValueError: no such token, or a decoder that is not known.
        """
        self._library, self._only_ended = library, only_ended
        self.settings = {} if settings is None else settings
        if library is None:
            self.end_of_text = 256
            self._spelling = Pieces([bytes([value]) for value in range(256)] + [b""])
        else:
            library.encode_special_tokens = True
            library.no_truncation()
            library.no_padding()
            self.end_of_text = _end_id(library, end_of_text)
            self._spelling = library_pieces(library)
            for token in self._unmarked:
                self._spelling.pieces[_end_id(library, token)] = b""
        self.pieces = self._spelling.pieces
        self.vocab_size = len(self.pieces)

    @functools.cached_property
    def _unmarked(self) -> list[str]:
        """Tokens that the settings call special, but the vocabulary has as ordinary ones."""
        assert self._library is not None, "bytes have no settings"
        added = {token.content for token in self._library.get_added_tokens_decoder().values()}
        named = dict.fromkeys(special_tokens(self.settings).values())
        return [token for token in named if token not in added and self._library.token_to_id(token) is not None]

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for text of chat templates, in which the names of special tokens are found.

        A second object, since the library keeps this choice in the tokenizer: changing it there around a call would
        change what another thread encodes. It takes as much memory again and is made when it is first needed; the first
        one stays as its file is, and with it the hash.
        """
        assert self._library is not None, "bytes have no special tokens with names"
        splits = self.settings.get("split_special_tokens") is True
        if splits and not self._unmarked:
            return self._library
        library = tokenizers.Tokenizer.from_str(self._library.to_str())
        library.add_special_tokens(self._unmarked)
        library.encode_special_tokens = splits
        return library

    def encode(self, text: str) -> list[int]:
        """Encode `text`, without an end-of-text token."""
        return self.encode_batch([text])[0]

    def encode_rendered(self, text: str) -> list[int]:
        """Encode text that a chat template has written: here the names of special tokens mean these tokens."""
        if self._library is None:
            return self.encode(text)
        return self._parsing.encode(text, add_special_tokens=False).ids

    def token_id(self, name: str) -> int | None:
        """Find the id of a token by its name; None if there is none."""
        return None if self._library is None else self._library.token_to_id(name)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, without end-of-text tokens."""
        if self._library is None:
            return [list(text.encode()) for text in texts]
        return [item.ids for item in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text with the special tokens that the model wants around it, such as [CLS] and [SEP]."""
        if self._library is None:
            return self.encode_batch(texts)
        return [item.ids for item in self._library.encode_batch_fast(list(texts), add_special_tokens=True)]

    def encode_arrays(self, texts: Sequence[str], dtype: np.dtype) -> list[np.ndarray]:
        """Encode each text as `encode_batch` does, to arrays of `dtype`."""
        if self._library is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in texts]
        return [np.array(ids, dtype) for ids in self.encode_batch(texts)]

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text that is read both ways, such as [CLS] and
        [SEP]; without any, nothing and an end-of-text token."""
        if self._library is None or not self._library.num_special_tokens_to_add(False):
            return [], [self.end_of_text]
        # Any text that has tokens.
        for text in ("a", *(piece.decode("utf-8", "replace") for piece in self.pieces if piece)):
            framed = self._library.encode(text, add_special_tokens=True)
            inside = [at for at, special in enumerate(framed.special_tokens_mask) if not special]
            if inside:
                return framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]
        raise ValueError("the tokenizer gives no text any token; it is damaged")

    @functools.cached_property
    def text_frame(self) -> tuple[list[int], list[int]]:
        """The ids before and after a text that is read from left to right, in training, scoring and prompts alike:
        the tokenizer's own, such as Llama's <s>, and an end-of-text token in any case."""
        before, after = ([], []) if self._only_ended else self.frame
        return before, after if self.end_of_text in after else [*after, self.end_of_text]

    @property
    def missing_tokens(self) -> str:
        """The tokens that the tokenizer would put around a text and that it does not have here; '' if there are none.

        So it is with what was made before these tokens counted.
        """
        if not self._only_ended or self._library is None or self.frame == self.text_frame:
            return ""
        before, after = self.frame
        missing = [*before, *(token for token in after if token != self.end_of_text)]
        return " ".join(self._library.id_to_token(token) or str(token) for token in missing)

    @functools.cached_property
    def mask_token(self) -> int | None:
        """The id that stands for a hidden token: mask_token, [MASK] or <mask>; None if there is none."""
        names = (content_of(self.settings.get("mask_token")), *_MASK_TOKENS)
        return next((token for name in names if (token := self.token_id(name)) is not None), None)

    @property
    def library(self) -> tokenizers.Tokenizer | None:
        """The `tokenizers` library's own; None for bytes."""
        return self._library

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._spelling.join(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> "StreamDecoder":
        """Make a decoder for ids that arrive one at a time."""
        return StreamDecoder(self._spelling)

    def special_id(self, role: str) -> int | None:
        """Find the id of the token that the settings name for a role, such as "bos_token"; None if there is none."""
        name = content_of(self.settings.get(role))
        return self.token_id(name) if name else None

    @property
    def begin(self) -> list[int]:
        """Ids before every text that a model goes on with, such as [<s>] of Llama's, or []."""
        return self.text_frame[0]

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
        names.pop(TEXT_FRAME, None)
        if self.text_frame != ([], [self.end_of_text]):
            names[TEXT_FRAME] = [[self._library.id_to_token(token) for token in ids] for ids in self.text_frame]
        (path / SETTINGS_FILE).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read what `save` wrote, as it is; for the folder of a model see load.py.

        Raises:
            ValueError: no tokenizer there, or one that cannot be used.
        """
        path = Path(folder)
        if (path / _BYTE_FILE).is_file():
            content = read_json(path / _BYTE_FILE)
            if content != _BYTE_CONTENT:
                raise ValueError(f"{path / _BYTE_FILE} is not the byte tokenizer of this version: {content}")
            return cls(None)
        file = path / TOKENIZER_FILE
        if not file.is_file():
            raise ValueError(f"no tokenizer at {path}: it has neither {TOKENIZER_FILE} nor {_BYTE_FILE}")
        settings = read_json(path / SETTINGS_FILE) if (path / SETTINGS_FILE).is_file() else {}
        end = content_of(settings.get("eos_token")) or END_OF_TEXT
        try:
            # What was saved before texts had a frame has none.
            return cls(read_library(file), end_of_text=end, settings=settings, only_ended=TEXT_FRAME not in settings)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and an end-of-text token, id 256."""
    return Tokenizer(None)


def _end_id(library: tokenizers.Tokenizer, name: str) -> int:
    token = library.token_to_id(name)
    if token is None:
        raise ValueError(f"end_of_text {name!r} is not one of the tokenizer's tokens")
    return token
