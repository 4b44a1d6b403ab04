"""Settings of a tokenizer in the files beside it, with the order of precedence of transformers 5.

    tokenizer_config.json        the first word
    special_tokens_map.json      over it, null too; not read where tokenizer_config.json has added_tokens_decoder
    added_tokens.json            tokens and their ids, in place of added_tokens_decoder; likewise
    chat_template.jinja          over chat_template in tokenizer_config.json, as are additional_chat_templates/*.jinja
    config.json                  model_type: the class of a tokenizer whose files do not name one; eos_token_id
    generation_config.json       eos_token_id

Each key is used, or known to change no id (`NO_ID`), or refused; one that is not known warns.
"""

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken

from dsjax.checkpoint.manifest import read_json
from dsjax.checkpoint.settings import Settings

SETTINGS_FILE = "tokenizer_config.json"
_MAP_FILE, _ADDED_FILE = "special_tokens_map.json", "added_tokens.json"
_TEMPLATE_FILE, _TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEXT_FRAME = "dsjax_text_frame"
"""In what `Tokenizer.save` writes: the tokens before and after each text, where these are not just its end."""

KNOWN_CLASSES = "BertTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast"
Style = Literal["bert", "gpt2", "llama", "file"]
"""Rules that make ids of the vocabulary: those of a class of transformers, or tokenizer.json as it is."""
_STYLES: dict[str, Style] = {
    **dict.fromkeys(("Bert", "DistilBert", "Electra", "MobileBert", "LayoutLM", "ConvBert", "SqueezeBert"), "bert"),
    "GPT2": "gpt2",
    "Llama": "llama",
    **dict.fromkeys(("PreTrained", "Bloom"), "file"),
}
"""tokenizer_class without its ending -> style."""
_STYLE_OF_MODEL: dict[object, Style] = {"bert": "bert", "gpt2": "gpt2"}

_USED = frozenset(
    (
        *ROLES, *_LISTS, "model_specific_special_tokens", "added_tokens_decoder", "add_bos_token", "add_eos_token",
        "add_prefix_space", "auto_map", "chat_template", "do_lower_case", "fast_tokenizer_files", "legacy",
        "split_special_tokens", "strip_accents", "tokenize_chinese_chars", "tokenizer_class", TEXT_FRAME,
    )
)  # fmt: skip
_LENGTH = "rows are cut and filled by data.sequence_length and by the model's positions"
_SLOW = "of tokenizers written in Python alone"
_ORIGIN = "where it came from or what made it"
_PICTURE = "of how text is shown, and here it is given back as it was"
NO_ID = {
    **dict.fromkeys(("model_max_length", "max_length", "max_len", "truncation_side", "truncation_strategy"), _LENGTH),
    **dict.fromkeys(("stride", "padding_side", "pad_to_multiple_of", "padding", "pad_token_type_id"), _LENGTH),
    **dict.fromkeys(("do_basic_tokenize", "never_split", "sp_model_kwargs", "from_slow", "use_fast"), _SLOW),
    **dict.fromkeys(
        ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"), _ORIGIN
    ),
    **dict.fromkeys(
        ("init_inputs", "backend", "is_local", "local_files_only", "trust_remote_code", "device_map"), _ORIGIN
    ),
    **dict.fromkeys(("transformers_version", "_commit_hash", "verbose", "vocab_size", "unk_id", "dtype"), _ORIGIN),
    **dict.fromkeys(("clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors"), _PICTURE),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": _PICTURE,
    **dict.fromkeys(("model_input_names", "processor_class", "return_token_type_ids"), "of what goes with the ids"),
    **dict.fromkeys(("response_schema", "response_template", "chat_control_tokens"), "of reading answers"),
    "use_default_system_prompt": "of a chat template that transformers no longer has",
    "fix_mistral_regex": "of the models of Mistral",
}
"""Keys of tokenizer_config.json that change no id -> why."""
_SWITCHES = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy", "split_special_tokens",
    "strip_accents", "tokenize_chinese_chars",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """Settings in the files beside a tokenizer.

    Attributes:
        origin: the folder.
        values: of tokenizer_config.json and what goes over it.
        added: tokens that are to be in the vocabulary, with their ids, in the order of these.
        style: the rules that make the ids; None for a class whose rules are not known.
        class_name: the class that a file names, or ''.
        end_ids: eos_token_id of generation_config.json, or of config.json.
    """

    origin: Path
    values: Mapping[str, Any]
    added: tuple[tuple[int, AddedToken], ...] = ()
    style: Style | None = "file"
    class_name: str = ""
    end_ids: tuple[int, ...] = ()


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the settings in a folder's files; of a folder without any of them there are none.

    Raises:
        ValueError: a file that is damaged, or a value that has no meaning.
    """
    values = dict(_object(folder / SETTINGS_FILE))
    if "added_tokens_decoder" not in values:
        values |= _checked_map(folder / _MAP_FILE)
    _check(folder / SETTINGS_FILE, values)
    if "added_tokens_decoder" in values:
        added = _added(folder / SETTINGS_FILE, values["added_tokens_decoder"])
    else:
        added = _legacy_added(folder / _ADDED_FILE, special=special_tokens(values))
    model = _object(folder / "config.json")
    written = values.get("tokenizer_class") or model.get("tokenizer_class")
    class_name = written if isinstance(written, str) else ""
    style = _style(class_name) if class_name else _STYLE_OF_MODEL.get(model.get("model_type"), "file")
    templates = _templates(folder)
    if templates:
        values["chat_template"] = templates
    ends = _object(folder / "generation_config.json").get("eos_token_id", model.get("eos_token_id"))
    end_ids = tuple(item for item in (ends if isinstance(ends, list) else [ends]) if type(item) is int)
    return TokenizerSettings(folder, values, added, style, class_name, end_ids)


def content_of(token: object) -> str:
    """A special token, which is a string or an object with `content`; '' if there is none.

    Example:
        >>> content_of("</s>"), content_of({"content": "</s>", "lstrip": True}), content_of(None)
        ('</s>', '</s>', '')
    """
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def special_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that settings name, in the order in which transformers adds those that it does not find.

    Returns:
        What it is called (bos_token, ..., or a number for those without a name) -> the token.

    Example:
        >>> special_tokens({"image_token": "<i>", "eos_token": "</s>", "additional_special_tokens": ["<x>"]})
        {'eos_token': '</s>', 'image_token': '<i>', '0': '<x>'}
    """
    more = {key: value for key, value in values.items() if key.endswith("_token") and key not in ROLES}
    lists = next((found for key in _LISTS if (found := values.get(key))), [])
    if isinstance(lists, dict):
        more, lists = {**more, **lists}, []
    more |= values.get("model_specific_special_tokens") or {}
    named = {role: content_of(values.get(role)) for role in ROLES} | {key: content_of(more[key]) for key in more}
    named |= {str(number): content_of(token) for number, token in enumerate(lists)}
    return {key: token for key, token in named.items() if token}


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _style(class_name: str) -> Style | None:
    if class_name == "TokenizersBackend":
        return "file"
    return _STYLES.get(class_name.removesuffix("Fast").removesuffix("Tokenizer"))


def _check(path: Path, values: Mapping[str, Any]) -> None:
    """Warn of keys that are not known, and refuse values that have no meaning."""
    _check_known(path, values, _USED, free=NO_ID)
    for key in _SWITCHES:
        if not isinstance(values.get(key), bool | None):
            raise ValueError(f"{path}: {key} must be true or false; got {values[key]!r}")
    for role in ROLES:
        if values.get(role) not in (None, "") and not content_of(values[role]):
            raise ValueError(f"{path}: {role} must be a token, or an object with its content; got {values[role]!r}")
    for key in (*_LISTS, "model_specific_special_tokens"):
        if not isinstance(values.get(key), dict | None if key not in _LISTS else list | dict | None):
            raise ValueError(f"{path}: {key} must be a list of tokens, or tokens by their names; got {values[key]!r}")
    if values.get("fast_tokenizer_files", ["tokenizer.json"]) != ["tokenizer.json"]:
        raise ValueError(
            f"{path}: fast_tokenizer_files names other files for other versions of transformers, which are not read; "
            "remove the key to use tokenizer.json"
        )
    if "auto_map" in values:
        warnings.warn(
            f"{path}: auto_map names a tokenizer written in Python, which is never run; what the other files say is "
            "used",
            stacklevel=4,
        )


def _check_known(
    path: Path, values: Mapping[str, Any], used: Collection[str], *, free: Mapping[str, str] | None = None
) -> list[str]:
    """Warn of keys that are not known: neither used, nor free, nor the name of a token. The used ones."""
    meaning = lambda keys: f"what {', '.join(map(repr, keys))} means is not known; it changes nothing here"
    known = Settings(values, str(path), free=free, unknown=meaning)
    taken = [key for key in values if key in used or key.endswith("_token")]
    for key in taken:
        known.take(key)
    known.check()
    return taken


def _checked_map(path: Path) -> dict[str, Any]:
    values = _object(path)
    return {key: values[key] for key in _check_known(path, values, _LISTS)}


def _added(path: Path, tokens: object) -> tuple[tuple[int, AddedToken], ...]:
    """added_tokens_decoder: id -> token with its flags."""
    if not isinstance(tokens, dict):
        raise ValueError(f"{path}: added_tokens_decoder must be an object of ids; got {type(tokens).__name__}")
    found = []
    for index, token in tokens.items():
        flags = {key: value for key, value in token.items() if key in _FLAGS} if isinstance(token, dict) else {}
        right = all(isinstance(value, bool) for value in flags.values()) and str(index).isdecimal()
        if not right or not isinstance(token, dict) or not content_of(token):
            raise ValueError(f"{path}: added_tokens_decoder has {index!r}: {token!r}; expected an id and its token")
        found.append((int(index), AddedToken(token["content"], **flags)))
    return tuple(sorted(found, key=lambda item: item[0]))


def _legacy_added(path: Path, *, special: Mapping[str, str]) -> tuple[tuple[int, AddedToken], ...]:
    """added_tokens.json: token -> id."""
    tokens = _object(path)
    if wrong := [token for token, index in tokens.items() if type(index) is not int or index < 0 or not token]:
        raise ValueError(f"{path}: the token {wrong[0]!r} has the id {tokens[wrong[0]]!r}; expected a number from 0")
    names = set(special.values())
    made = ((i, AddedToken(t, normalized=t not in names, special=t in names)) for t, i in tokens.items())
    return tuple(sorted(made, key=lambda item: item[0]))


def _templates(folder: Path) -> str | list[dict[str, str]] | None:
    """The chat templates that are files: the default one alone as a string, several as tokenizer_config.json has it."""
    files = {"default": folder / _TEMPLATE_FILE} if (folder / _TEMPLATE_FILE).is_file() else {}
    files |= {path.stem: path for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))}
    texts = {}
    for name, path in files.items():
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: byte {error.start}") from error
    if texts.keys() == {"default"}:
        return texts["default"]
    return [{"name": name, "template": text} for name, text in texts.items()] or None
