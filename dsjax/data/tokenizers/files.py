"""Vocabularies as they are kept: a tokenizer.json, WordPiece's vocab.txt, GPT-2's vocab.json with merges.txt.

Each becomes a tokenizer of the `tokenizers` library; styles.py makes of it what the other files say.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from dsjax.checkpoint.manifest import read_json
from dsjax.data.tokenizers.settings import KNOWN_CLASSES, Style, TokenizerSettings, content_of, read_settings
from dsjax.data.tokenizers.styles import bert_frame, styled
from dsjax.observe.untrusted import split_lines

TOKENIZER_FILE, WORDPIECE_FILE, BPE_FILES = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")
VOCABULARIES = (TOKENIZER_FILE, WORDPIECE_FILE, BPE_FILES[0])
"""A folder with one of these has a tokenizer."""
_BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def vocabulary_file(path: Path) -> Path:
    """Choose the file of a folder: tokenizer.json, else the vocabulary; `path` itself if there is none."""
    return next((path / name for name in VOCABULARIES if (path / name).is_file()), path)


def read_files(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], TokenizerSettings]:
    """Read a tokenizer from one of `VOCABULARIES` and all files beside it.

    Returns:
        The tokenizer, its settings with those of its class, and the files' own.

    Raises:
        ValueError: damaged files, or such that contradict each other.
    """
    settings = read_settings(path.parent)
    if path.name == WORDPIECE_FILE:
        settings = _of_style(settings, path, "bert")
        library = wordpiece(path, settings.values)
    elif path.name in BPE_FILES:
        settings = _of_style(settings, path, "gpt2")
        library = byte_level_bpe(path.parent)
    else:
        library = read_library(path)
        if settings.style is None:
            warnings.warn(
                f"{path}: the rules of the tokenizer_class {settings.class_name!r} are not known ({KNOWN_CLASSES} are):"
                " tokenizer.json is used as it is",
                stacklevel=3,
            )
    return library, styled(library, settings, has_frame=path.name not in BPE_FILES), settings


def _of_style(settings: TokenizerSettings, path: Path, style: Style) -> TokenizerSettings:
    """TokenizerSettings of a vocabulary that only one class reads.

    Raises:
        ValueError: the files name another class.
    """
    if settings.class_name and settings.style not in (style, "file"):
        raise ValueError(
            f"{path} is not read by the rules of tokenizer_class {settings.class_name!r}, which its folder names; put "
            "the model's tokenizer.json beside it"
        )
    return dataclasses.replace(settings, style=style)


def read_library(path: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise ValueError(f"{path} is not a tokenizer.json of the `tokenizers` library: {error}") from error


def wordpiece(path: Path, values: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece from a vocab.txt: one token a line.

    Args:
        path: the file.
        values: of tokenizer_config.json: do_lower_case, strip_accents, tokenize_chinese_chars; unk_token,
            cls_token and sep_token if they are others than BERT's.

    Raises:
        ValueError: not UTF-8, or without the three special tokens.
    """
    tokens = _text(path).split("\n")
    tokens = [token.removesuffix("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown, first, last = (content_of(values.get(role)) or default for role, default in _BERT.items())
    if lacking := [token for token in (unknown, first, last) if token not in vocabulary]:
        raise ValueError(f"{path} is no vocabulary of WordPiece: it lacks {', '.join(lacking)}")
    library = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=values.get("tokenize_chinese_chars", True) is not False,
        strip_accents=values.get("strip_accents"),  # None: as lowercase says
        lowercase=values.get("do_lower_case", True) is not False,
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    library.post_processor = bert_frame(first, vocabulary[first], last, vocabulary[last])
    special = dict.fromkeys(("[PAD]", unknown, first, last, "[MASK]"))
    library.add_special_tokens([token for token in special if token in vocabulary])
    return library


def byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE from vocab.json and merges.txt.

    Raises:
        ValueError: a file that is missing or damaged.
    """
    vocabulary_path, merges_path = (folder / name for name in BPE_FILES)
    vocabulary = read_json(vocabulary_path)
    if wrong := [token for token, index in vocabulary.items() if type(index) is not int or index < 0]:
        raise ValueError(f"{vocabulary_path}: the token {wrong[0]!r} has the id {vocabulary[wrong[0]]!r}")
    if not merges_path.is_file():
        raise ValueError(f"{folder} has no {merges_path.name}, without which {vocabulary_path.name} gives no ids")
    lines = [line for line in split_lines(_text(merges_path)) if line and not line.startswith("#version")]
    merges = checked_merges(lines, vocabulary, origin=merges_path)
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def checked_merges(lines: Iterable[str], vocabulary: Mapping[str, int], *, origin: Path) -> list[tuple[str, str]]:
    """Pairs in order of preference; the library wants both parts and the whole in the vocabulary.

    Raises:
        ValueError: a merge that is none.
    """
    merges = []
    for number, merge in enumerate(lines):
        first, _, second = merge.partition(" ")
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise ValueError(
                f"{origin}: damaged: merge {number} of the tokenizer, {merge[:60]!r}, is not of tokens to a token"
            )
        merges.append((first, second))
    return merges


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start}") from error
