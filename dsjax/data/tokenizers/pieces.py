"""Bytes of each id of a tokenizer, and text from ids, all of them or one at a time.

Some tokenizers put a space before a text, so that its first word is like the others: Llama's and BERT's, others where
they are asked to. Decoding takes it away again, and only it: a tokenizer that puts none keeps a text's own first space.
Where one puts a space only before a text that has none, both texts have the same ids, and the one without is given.
"""

import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable

import tokenizers

from dsjax.data.tokenizers.styles import parts

_MOST_UNUSED = 100_000  # ids without a token: some vocabularies are filled up, or their special tokens set apart


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The bytes of ids, and where a space among them is none of the text.

    Attributes:
        pieces: the bytes of each id; empty for special tokens.
        leads: whether the tokenizer puts a space before a text.
        repeats: whether it puts one behind each of `added`, too.
        added: ids of tokens that are found in a text before it is cut into words; their own spaces are the text's.

    Example:
        >>> Pieces([b" a", b" b"], leads=True).join([0, 1])
        b'a b'
    """

    pieces: list[bytes]
    leads: bool = False
    repeats: bool = False
    added: frozenset[int] = frozenset()

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a whole text."""
        if not self.leads:
            return b"".join([self.pieces[token] for token in ids])
        spelling = _Spelling(self, begins=True)
        return b"".join([spelling.piece(token) for token in ids])


class _Spelling:
    """The bytes of ids one after another."""

    def __init__(self, pieces: Pieces, *, begins: bool) -> None:
        """`begins`: a space that the first piece has is none of the text."""
        self._pieces, self._begins = pieces, begins

    def piece(self, token: int) -> bytes:
        is_added, piece = token in self._pieces.added, self._pieces.pieces[token]
        if piece:
            if self._begins and not is_added:
                piece = piece.removeprefix(b" ")
            self._begins = is_added and self._pieces.repeats
        return piece


class StreamDecoder:
    """Gives text as soon as its bytes are complete UTF-8; what was fed so far always joins to `decode` of its ids.

    A space at the very beginning is kept, since what is streamed usually continues a prompt.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._spelling = _Spelling(pieces, begins=False)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that became complete with `token`; often one piece, sometimes ''."""
        return self._decoder.decode(self._spelling.piece(token))

    def finish(self) -> str:
        """Return the rest: '' or one U+FFFD for a character cut off in the middle."""
        return self._decoder.decode(b"", final=True)


def library_pieces(library: tokenizers.Tokenizer) -> Pieces:
    """The bytes of each id of a tokenizer.

    Raises:
        ValueError: ids that no vocabulary has, or a decoder that is not known.
    """
    vocabulary = library.get_vocab(with_added_tokens=True)
    last = max(vocabulary.values(), default=-1)
    # Before anything else: what is made of it, here and by the library, is as long as the largest id.
    if not 0 <= last < 2 * len(vocabulary) + _MOST_UNUSED:
        raise ValueError(f"a tokenizer of {len(vocabulary)} tokens cannot have ids up to {last}; it is damaged")
    spell = _speller(library)
    pieces = [b""] * (last + 1)
    for token, index in vocabulary.items():
        pieces[index] = spell(token)
    added = library.get_added_tokens_decoder()
    for index, token in added.items():
        pieces[index] = b"" if token.special else token.content.encode()
    leads, repeats = _leads(library)
    return Pieces(pieces, leads, repeats, frozenset(index for index, token in added.items() if not token.special))


def _speller(library: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """Token -> bytes."""
    stages = {stage["type"]: stage for stage in parts(library.decoder)}
    if "ByteLevel" in stages:
        return _byte_level_piece
    if stages.keys() & {"Metaspace", "ByteFallback"}:
        mark = stages.get("Metaspace", {}).get("replacement", "▁")

        def spell(token: str) -> bytes:
            fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            return bytes.fromhex(fallback[1]) if fallback else token.replace(mark, " ").encode()

        return spell
    if "WordPiece" in stages:
        prefix, attaches = stages["WordPiece"]["prefix"], stages["WordPiece"]["cleanup"]
        glued = _ATTACHED if attaches else ()
        return lambda token: (
            token.removeprefix(prefix).encode()
            if token.startswith(prefix)
            else token.encode()
            if token.startswith(glued)
            else f" {token}".encode()
        )
    raise ValueError(
        f"cannot decode with a tokenizer whose decoder is {library.decoder}; allowed is ByteLevel, Metaspace, "
        "ByteFallback or WordPiece"
    )


_ATTACHED = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")
"""Words that WordPiece's decoder writes without a space before them."""


def _leads(library: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Whether a space is put before a text, and whether one is put behind each added token as well."""
    cutting = parts(library.pre_tokenizer)
    schemes = {stage["prepend_scheme"] for stage in cutting if stage["type"] == "Metaspace"}
    asked = any(stage["type"] == "ByteLevel" and stage["add_prefix_space"] for stage in cutting)
    prepended = any(stage["type"] == "Prepend" for stage in parts(library.normalizer))
    words = any(stage["type"] == "WordPiece" for stage in parts(library.decoder))
    everywhere = asked or prepended or "always" in schemes
    return everywhere or "first" in schemes or words, everywhere


def _byte_level_piece(token: str) -> bytes:
    """GPT-2 writes each byte as one visible character; a token with any other character is meant literally."""
    characters = _byte_characters()
    if all(character in characters for character in token):
        return bytes(characters[character] for character in token)
    return token.encode()


@functools.cache
def _byte_characters() -> dict[str, int]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + n): value for n, value in enumerate(hidden)}
