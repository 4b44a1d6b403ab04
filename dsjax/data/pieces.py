"""What each id of a tokenizer stands for, and text from ids that arrive one at a time."""

import codecs
import functools
import json
import re

import tokenizers

_MOST_UNUSED = 100_000  # ids without a token: some vocabularies are filled up, or their special tokens set apart


class StreamDecoder:
    """Gives text as soon as its bytes are complete UTF-8; the pieces fed so far always join to `decode` of their ids.

    A space at the very beginning is kept, since what is streamed usually continues a prompt.
    """

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that became complete with `token`; often one piece, sometimes ''."""
        return self._decoder.decode(self._pieces[token])

    def finish(self) -> str:
        """What is left: '' or one U+FFFD for a character cut off in the middle."""
        return self._decoder.decode(b"", final=True)


def library_pieces(library: tokenizers.Tokenizer) -> tuple[list[bytes], bool]:
    """The bytes of each id, and whether a text's first space was put there by the tokenizer."""
    vocabulary = library.get_vocab(with_added_tokens=True)
    last = max(vocabulary.values(), default=-1)
    # Before anything else: what is made of it, here and by the library, is as long as the largest id.
    if not 0 <= last < 2 * len(vocabulary) + _MOST_UNUSED:
        raise ValueError(f"a tokenizer of {len(vocabulary)} tokens cannot have ids up to {last}; it is damaged")
    decoder = json.loads(library.to_str())["decoder"]
    kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(decoder)))
    pieces = [b""] * (last + 1)
    for token, index in vocabulary.items():
        if "ByteLevel" in kinds:
            pieces[index] = _byte_level_piece(token)
        elif kinds & {"Metaspace", "ByteFallback"}:
            fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            pieces[index] = bytes.fromhex(fallback[1]) if fallback else token.replace("▁", " ").encode()
        elif "WordPiece" in kinds:
            pieces[index] = token[2:].encode() if token.startswith("##") else f" {token}".encode()
        else:
            allowed = "ByteLevel, Metaspace, ByteFallback or WordPiece"
            raise ValueError(f"cannot decode with a tokenizer whose decoder is {decoder}; allowed is {allowed}")
    for index, added in library.get_added_tokens_decoder().items():
        pieces[index] = b"" if added.special else added.content.encode()
    return pieces, "ByteLevel" not in kinds


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
