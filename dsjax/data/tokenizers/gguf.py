"""The tokenizer inside a GGUF file, as one of the `tokenizers` library and its settings.

Each key of the file's tokenizer is used, or known to change no id (`NO_ID`), or refused; one that is not known warns.
"""

import warnings
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from dsjax.checkpoint.gguf_file import GGUFFile
from dsjax.data.tokenizers.files import checked_merges
from dsjax.data.tokenizers.styles import framed

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_SWITCHES = ("add_bos_token", "add_eos_token")
_USED = ("model", "pre", "tokens", "token_type", "merges", "eot_token_id", "eom_token_id", *_SWITCHES)
_OTHER_MODELS = "of tokenizers that are not a byte-level BPE"
_FILLING = "of filling gaps in code"
NO_ID = {
    **dict.fromkeys(("scores", "add_space_prefix", "remove_extra_whitespaces", "precompiled_charsmap"), _OTHER_MODELS),
    **dict.fromkeys(("token_type_count", "add_sep_token", "seperator_token_id", "separator_token_id"), _OTHER_MODELS),
    **dict.fromkeys(("cls_token_id", "mask_token_id"), _OTHER_MODELS),
    **dict.fromkeys(("prefix_token_id", "suffix_token_id", "middle_token_id"), _FILLING),
    **dict.fromkeys((f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")), _FILLING),
}
"""Keys tokenizer.ggml.KEY that change no id -> why. Other keys under tokenizer. are copies and templates."""
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


def gguf_tokenizer(file: GGUFFile, *, add_end: bool = True) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The byte-level BPE inside a GGUF file, and its settings: special tokens, add_bos_token, chat_template.

    Args:
        file: the open file.
        add_end: let add_eos_token count, which dsjax passed over before.

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
    _check_keys(file)
    merges = checked_merges(_list_of(file, "merges", str), vocabulary, origin=path)
    library = tokenizers.Tokenizer(
        # Llama 3 takes a word that is a token as that token, whether merges lead to it or not.
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    library.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    library.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL and token]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ordinary = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED and token]
    library.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    settings = _settings(file, tokens)
    framed(library, settings if add_end else {**settings, "add_eos_token": False})
    return library, settings


def _check_keys(file: GGUFFile) -> None:
    """Warn of keys that are not known, and refuse switches that are none."""
    known = {*_USED, *NO_ID, *(f"{theirs}_token_id" for theirs in _SPECIAL)}
    keys = [key.removeprefix("tokenizer.ggml.") for key in file.metadata if key.startswith("tokenizer.ggml.")]
    if unknown := [key for key in keys if key not in known]:
        warnings.warn(
            f"{file.path}: what tokenizer.ggml.{', '.join(unknown)} means is not known; it changes nothing here",
            stacklevel=4,
        )
    for key in _SWITCHES:
        if not isinstance(value := file.metadata.get(f"tokenizer.ggml.{key}"), bool | None):
            raise ValueError(f"{file.path}: tokenizer.ggml.{key} must be a boolean; got {value!r}")


def _settings(file: GGUFFile, tokens: list[str]) -> dict[str, Any]:
    """Settings as tokenizer_config.json has them."""
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
    if metadata.get("tokenizer.ggml.add_eos_token"):
        settings["add_eos_token"] = True
    template = metadata.get("tokenizer.chat_template")
    return settings | ({"chat_template": template} if isinstance(template, str) else {})


def _list_of[T](file: GGUFFile, key: str, type_: type[T], default: list[T] | None = None) -> list[T]:
    value = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, list) or not value or any(type(item) is not type_ for item in value):
        raise ValueError(f"{file.path}: tokenizer.ggml.{key} must be a list of {type_.__name__}, not empty")
    return value
