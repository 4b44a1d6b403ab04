"""Tokenizers as they are kept: a tokenizer.json, the one inside a GGUF file, WordPiece's vocab.txt.

Each becomes one of the `tokenizers` library together with what its tokenizer_config.json says, or would say.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dsjax.checkpoint.gguf_file import GGUFFile
from dsjax.checkpoint.manifest import read_json

VOCAB_FILE = "vocab.txt"
SETTINGS_FILE = "tokenizer_config.json"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit by itself, then GPT-2's words."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _llama_3() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _smollm,
    "llama-bpe": _llama_3,
}
"""tokenizer.ggml.pre -> how text is cut into words."""
_WITH_BOS = ("llama-bpe",)  # a text begins with bos_token unless the file says otherwise


def read_library(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        ValueError: it is none.
    """
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise ValueError(f"{path} is not a tokenizer.json of the `tokenizers` library: {error}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the template of a chat_template.jinja beside it; {} if there is none.

    Raises:
        ValueError: a file that is damaged.
    """
    settings = read_json(path) if path.is_file() else {}
    template = path.with_name("chat_template.jinja")
    try:
        return settings | ({"chat_template": template.read_text(encoding="utf-8")} if template.is_file() else {})
    except UnicodeDecodeError as error:
        raise ValueError(f"{template} is not UTF-8: byte {error.start}") from error


def gguf_tokenizer(file: GGUFFile) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The byte-level BPE inside a GGUF file, and its settings: special tokens, add_bos_token, chat_template.

    Raises:
        ValueError: the file holds none, one of another kind, or a damaged one.
    """
    path, metadata = file.path, file.metadata
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: the tokenizer is of the model {model!r} with the pre-tokenizer {pre!r}; known are model 'gpt2' "
            f"with {', '.join(map(repr, _PRE_TOKENIZERS))}; give the model as a Hugging Face folder instead"
        )
    tokens = _list_of(file, "tokens", str)
    kinds = _list_of(file, "token_type", int, default=[_NORMAL] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise ValueError(
            f"{path}: damaged: {len(tokens)} tokens, {len(vocabulary)} of them different, and {len(kinds)} types"
        )
    library = tokenizers.Tokenizer(
        # Llama 3 takes a word that is a token as that token, whether merges lead to it or not.
        models.BPE(vocab=vocabulary, merges=_merges(file, vocabulary), ignore_merges=pre == "llama-bpe")
    )
    library.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    library.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL and token]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ordinary = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED and token]
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    settings = _settings(file, tokens)
    begin = settings.get("bos_token")
    if settings["add_bos_token"] and begin is not None:
        marked = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", begin, "$B:1"], special_tokens=[(begin, vocabulary[begin])]
        )
        library.post_processor = marked
    return library, settings


def _settings(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """What tokenizer_config.json would say."""
    metadata = file.metadata
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for theirs, ours in _SPECIAL.items():
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(number) is int:
            if not 0 <= number < len(tokens):
                raise ValueError(
                    f"{file.path}: tokenizer.ggml.{theirs}_token_id is {number}, but there are {len(tokens)} tokens"
                )
            settings[ours] = tokens[number]
    by_default = metadata["tokenizer.ggml.pre"] in _WITH_BOS
    settings["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", by_default) is True
    template = metadata.get("tokenizer.chat_template")
    return settings | ({"chat_template": template} if isinstance(template, str) else {})


def _list_of[T](file: GGUFFile, key: str, type_: type[T], default: list[T] | None = None) -> list[T]:
    value = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, list) or not value or any(type(item) is not type_ for item in value):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} must be a list of {type_.__name__}, not empty")
    return value


def _merges(file: GGUFFile, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in order of preference; the library wants both parts and the whole in the vocabulary."""
    merges = []
    for number, merge in enumerate(_list_of(file, "merges", str)):
        first, _, second = merge.partition(" ")
        if first not in vocabulary or second not in vocabulary or first + second not in vocabulary:
            raise ValueError(
                f"{file.path}: damaged: merge {number} of the tokenizer, {merge[:60]!r}, is not of tokens to a token"
            )
        merges.append((first, second))
    return merges


def wordpiece(path: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece from a vocab.txt: one token a line.

    Args:
        path: the file.
        settings: what tokenizer_config.json says: do_lower_case, strip_accents, tokenize_chinese_chars.

    Raises:
        ValueError: not UTF-8, or without [UNK], [CLS] and [SEP].
    """
    try:
        tokens = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start}") from error
    tokens = [token.removesuffix("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if lacking := [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]:
        raise ValueError(f"{path} is no vocabulary of WordPiece: it lacks {', '.join(lacking)}")
    library = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True) is not False,
        strip_accents=settings.get("strip_accents"),  # None: as lowercase says
        lowercase=settings.get("do_lower_case", True) is not False,
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocabulary]
    library.add_special_tokens(names)
    return library
