"""A tokenizer's vocabulary under the rules that its other files ask for: what transformers' classes make of both.

transformers builds the tokenizers of BERT, GPT-2 and Llama anew from the vocabulary and the settings, so that
tokenizer_config.json counts where tokenizer.json says something else. So it does here, as long as tokenizer.json has
the parts that such a tokenizer has. Where it has other ones (SmolLM's cuts digits apart, and calls itself GPT-2's) the
model was trained with these: they stay, and a warning says so. What is equal in effect is left as it is, so that the
hash of a tokenizer changes only with its ids.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from dsjax.data.tokenizers.settings import Style, TokenizerSettings, content_of, special_tokens

_DEFAULTS: dict[Style, dict[str, str]] = {
    "bert": {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    | {"mask_token": "[MASK]"},
    "gpt2": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "file": {},
}
"""The special tokens of a class, where no file names one."""
_ADDS = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}
_UNUSED_ROLES = ("unk_token", "pad_token", "mask_token")


def styled(library: tokenizers.Tokenizer, settings: TokenizerSettings, *, has_frame: bool = True) -> dict[str, Any]:
    """Change `library`, in place, to what its files together say.

    Args:
        library: as tokenizer.json or a vocabulary says.
        settings: what stands beside it.
        has_frame: whether what is put around a text is in `library` already, as in a tokenizer.json.

    Returns:
        The settings with the special tokens of its class.

    Raises:
        ValueError: tokens that cannot have the ids that a file gives them, or encodings that are random.
    """
    if isinstance(library.model, models.BPE) and library.model.dropout:
        raise ValueError(
            f"{settings.origin}: model.dropout {library.model.dropout:g} in tokenizer.json makes ids random; set it to "
            "null"
        )
    _add_tokens(library, settings)
    style = _effective_style(library, settings)
    # A token that the vocabulary lacks has no id of the model's.
    defaults = {role: token for role, token in _DEFAULTS[style].items() if library.token_to_id(token) is not None}
    values = {**defaults, **settings.values}
    _RULES[style](library, values, settings)
    if not has_frame:
        framed(library, values)
        return values
    marks = library.encode("").ids
    for adds, role in _ADDS.items():
        number = library.token_to_id(content_of(values.get(role)))
        if values.get(adds) not in (None, number is not None and number in marks):
            _warn(settings, f"{adds} is {values[adds]}, but the post_processor of tokenizer.json counts")
    return values


def framed(library: tokenizers.Tokenizer, values: Mapping[str, Any]) -> None:
    """Let `library` put bos_token before and eos_token after each text, as add_bos_token and add_eos_token say."""
    begin, end = (content_of(values.get(role)) if values.get(adds) else "" for adds, role in _ADDS.items())
    before, after = [begin] if begin else [], [end] if end else []
    if before or after:
        library.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, library.token_to_id(token)) for token in dict.fromkeys((*before, *after))],
        )


def _effective_style(library: tokenizers.Tokenizer, settings: TokenizerSettings) -> Style:
    is_wordpiece, is_bpe = (isinstance(library.model, kind) for kind in (models.WordPiece, models.BPE))
    style, named = settings.style or "file", bool(settings.class_name)
    if style == "file" and not named and is_wordpiece and settings.values.get("do_lower_case") is not None:
        return "bert"  # nothing says whose it is, and somebody wrote down what only BERT's has
    fits = {"bert": is_wordpiece, "gpt2": is_bpe, "llama": is_bpe and "ByteLevel" not in _kinds(library), "file": True}
    return style if fits[style] else "file"


def _kinds(library: tokenizers.Tokenizer) -> set[str]:
    return {part["type"] for part in (*parts(library.pre_tokenizer), *parts(library.decoder))}


def parts(component: Any) -> list[dict[str, Any]]:
    """List the parts of a component of the library, in order, each as its JSON; [] of None.

    Example:
        >>> [part["type"] for part in parts(decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]))]
        ['Fuse', 'ByteLevel']
    """

    def flat(state: dict[str, Any]) -> list[dict[str, Any]]:
        inside = next((state[key] for key in ("normalizers", "pretokenizers", "decoders") if key in state), None)
        return [state] if inside is None else [part for one in inside for part in flat(one)]

    return [] if component is None else flat(json.loads(component.__getstate__()))


def _add_tokens(library: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
    """The tokens that the files name and the vocabulary lacks, each with the id that a file gives it, else the next."""
    present = {token.content: repr(token) for token in library.get_added_tokens_decoder().values()}
    for index, token in settings.added:
        if present.get(token.content) == repr(token):
            continue
        before = library.token_to_id(token.content)
        library.add_tokens([token])
        got = library.token_to_id(token.content)
        if got == index:
            continue
        if before is None:
            raise ValueError(
                f"{settings.origin}: the token {token.content!r} has the id {index} in its files, but is the "
                f"vocabulary's next one, {got}: tokenizer.json lacks the tokens between; take it from where the model "
                "is from"
            )
        _warn(settings, f"{token.content!r} has the id {before} in the vocabulary, which counts, and {index} elsewhere")
    named = special_tokens(settings.values)
    lacking = [(name, token) for name, token in named.items() if library.token_to_id(token) is None]
    while lacking and lacking[-1][0] in _UNUSED_ROLES:
        # No text has such a token: a model without a row for it is none the worse.
        name, token = lacking.pop()
        _warn(settings, f"{name} is {token!r}, which the vocabulary lacks; it gets no id")
    for name, token in lacking:
        library.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        called = f"the special token {token!r}" if name.isdecimal() else f"{name} {token!r}"
        _warn(settings, f"{called}, which the vocabulary lacks, gets its next id, {library.token_to_id(token)}")


def _as_bert(library: tokenizers.Tokenizer, values: Mapping[str, Any], settings: TokenizerSettings) -> None:
    asked = {key: values.get(key) for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    lower, accents, chinese = asked.values()
    wanted = {
        "clean_text": True,
        "handle_chinese_chars": chinese is not False,
        "strip_accents": accents,  # null: as lowercase says
        "lowercase": lower is not False,
    }
    stages = parts(library.normalizer)
    is_plain = [stage["type"] for stage in stages] == ["BertNormalizer"]
    effect = lambda state: {
        **{key: state[key] for key in wanted},
        "strip_accents": state["lowercase"] if state["strip_accents"] is None else state["strip_accents"],
    }
    if is_plain and effect(stages[0]) == effect(wanted):
        pass
    elif is_plain or any(value is not None for value in asked.values()):
        library.normalizer = normalizers.BertNormalizer(**wanted)
        if all(value is None for value in asked.values()):
            _warn(
                settings,
                "tokenizer.json keeps capitals or accents, but BERT's class does not without do_lower_case: false",
            )
    else:
        _warn(settings, "tokenizer.json changes text otherwise than BERT's tokenizer; it counts")
    if [stage["type"] for stage in parts(library.pre_tokenizer)] != ["BertPreTokenizer"]:
        _warn(settings, "tokenizer.json cuts words otherwise than BERT's tokenizer; it counts")
    first, last = (library.token_to_id(content_of(values.get(role))) for role in ("cls_token", "sep_token"))
    if first is not None and last is not None:
        cls, sep = (content_of(values[role]) for role in ("cls_token", "sep_token"))
        if (library.encode("").ids, library.encode("", "").ids) != ([first, last], [first, last, last]):
            library.post_processor = bert_frame(cls, first, sep, last)


def bert_frame(cls: str, cls_id: int, sep: str, sep_id: int) -> processors.PostProcessor:
    """[CLS] text [SEP], and [CLS] text [SEP] text [SEP]."""
    return processors.TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(cls, cls_id), (sep, sep_id)],
    )


def _as_gpt2(library: tokenizers.Tokenizer, values: Mapping[str, Any], settings: TokenizerSettings) -> None:
    stages, wanted = parts(library.pre_tokenizer), values.get("add_prefix_space") is True
    if [stage["type"] for stage in stages] != ["ByteLevel"] or library.normalizer is not None:
        _warn(settings, "tokenizer.json cuts words otherwise than GPT-2's tokenizer; it counts")
    elif stages[0]["add_prefix_space"] != wanted:
        state = {key: stages[0].get(key, True) for key in ("trim_offsets", "use_regex")}
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=wanted, **state)
        if values.get("add_prefix_space") is None:
            _warn(settings, "tokenizer.json puts a space before a text, but GPT-2's class not without add_prefix_space")


def _as_llama(library: tokenizers.Tokenizer, values: Mapping[str, Any], settings: TokenizerSettings) -> None:
    stages, before = parts(library.pre_tokenizer), [stage["type"] for stage in parts(library.normalizer)]
    if before not in ([], ["Prepend", "Replace"], ["Replace"]) or [s["type"] for s in stages] not in (
        [],
        ["Metaspace"],
    ):
        _warn(settings, "tokenizer.json cuts words otherwise than Llama's tokenizer; it counts")
        return
    prefix = values.get("add_prefix_space") is not False
    scheme = ("always" if values.get("legacy") else "first") if prefix else "never"
    if not before and stages and (stages[0]["prepend_scheme"], stages[0]["split"]) == (scheme, False):
        return
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _as_file(library: tokenizers.Tokenizer, values: Mapping[str, Any], settings: TokenizerSettings) -> None:
    """Nothing changes; a setting that somebody wrote and that tokenizer.json contradicts is named."""
    for stage in parts(library.normalizer):
        if stage["type"] == "BertNormalizer" and values.get("do_lower_case") not in (None, stage["lowercase"]):
            _warn(settings, f"do_lower_case is {values['do_lower_case']}, but tokenizer.json counts, as the class asks")
    for stage in parts(library.pre_tokenizer):
        given = stage.get("add_prefix_space", stage.get("prepend_scheme", "never") != "never")
        if stage["type"] in ("ByteLevel", "Metaspace") and values.get("add_prefix_space") not in (None, given):
            _warn(settings, f"add_prefix_space is {not given}, but tokenizer.json counts, as the class asks")


def _warn(settings: TokenizerSettings, text: str) -> None:
    warnings.warn(f"{settings.origin}: {text}", stacklevel=6)


_RULES: dict[Style, Callable[[tokenizers.Tokenizer, Mapping[str, Any], TokenizerSettings], None]] = {
    "bert": _as_bert,
    "gpt2": _as_gpt2,
    "llama": _as_llama,
    "file": _as_file,
}
