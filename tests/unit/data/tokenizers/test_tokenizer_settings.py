"""What stands beside a tokenizer is used, known to change no id, or named; what contradicts itself is refused."""

import json

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.settings import NO_ID, read_settings


def byte_level(**parts):
    """GPT-2's, of a few letters."""
    tokens = ["<s>", "</s>", *"abc12", "Ġ", "ab"]
    library = Library(models.BPE({t: i for i, t in enumerate(tokens)}, merges=[("a", "b")]))
    library.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    library.normalizer, library.decoder = parts.get("normalizer"), decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    return library


def load(path, library, settings=None, **files):
    library.save(str(path / "tokenizer.json"))
    for stem, content in {**({} if settings is None else {"tokenizer_config": settings}), **files}.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return load_tokenizer(FileTokenizer(path=str(path)))


VALUES = {
    "model_max_length": 2, "max_length": 2, "max_len": 2, "stride": 1, "truncation_side": "left", "padding": True,
    "padding_side": "left", "pad_to_multiple_of": 8, "truncation_strategy": "only_first", "do_basic_tokenize": False,
    "clean_up_tokenization_spaces": True, "errors": "strict", "spaces_between_special_tokens": True,
    "sp_model_kwargs": {"enable_sampling": True, "alpha": 0.5}, "never_split": ["ab"],
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(NO_ID))
def test_keys_that_change_no_id(key, tmp_path):
    assert NO_ID[key], "each with its reason"
    tokenizer = load(tmp_path, byte_level(), {"eos_token": "</s>", key: VALUES.get(key, "x")})
    assert tokenizer.encode("ab abc a12") == [8, 7, 8, 4, 7, 2, 5, 6]
    assert tokenizer.decode(tokenizer.encode(" ab  , n't . a")) == tokenizer.decode(
        byte_level().encode(" ab  , n't . a").ids
    )


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    library = byte_level()
    library.enable_truncation(1)
    library.enable_padding(length=9)
    tokenizer = load(tmp_path, library)
    assert tokenizer.encode("abc") == [8, 4] and tokenizer.encode_rendered("abc") == [8, 4]


WARNED = {
    "unknown key": ({"do_uper_case": True}, "what 'do_uper_case' means is not known"),
    "code": ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map names a tokenizer written in Python"),
    "class": ({"tokenizer_class": "Qwen2Tokenizer"}, "rules of the tokenizer_class 'Qwen2Tokenizer' are not known"),
    "bos": ({"bos_token": "<s>", "add_bos_token": True}, "add_bos_token is True, but the post_processor"),
    "eos": ({"eos_token": "</s>", "add_eos_token": True}, "add_eos_token is True, but the post_processor"),
    "prefix": ({"add_prefix_space": True}, "add_prefix_space is True, but tokenizer.json counts"),
    "pad": ({"pad_token": "[PAD]"}, r"pad_token is '\[PAD\]', which the vocabulary lacks; it gets no id"),
    "a named token": (
        {"image_token": "<i>", "eos_token": "</s>"},
        "image_token '<i>', which .* lacks, gets its next id, 9",
    ),
    "a token": ({"extra_special_tokens": ["<i>"]}, "the special token '<i>', which the vocabulary lacks, gets .* 9"),
    "other id": (
        {"added_tokens_decoder": {"7": {"content": "ab", "special": False}}},
        "'ab' has the id 8 in the vocabulary, which counts, and 7 elsewhere",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_said(name, tmp_path):
    config, said = WARNED[name]
    with pytest.warns(UserWarning, match=said) as caught:
        tokenizer = load(tmp_path, byte_level(), config)
    assert len(caught) == 1 and str(tmp_path) in str(caught[0].message)
    assert tokenizer.encode("ab a") == [8, 7, 2] and tokenizer.vocab_size == (10 if "<i>" in str(config) else 9)


REFUSED = {
    "no switch": ({"do_lower_case": "no"}, "do_lower_case must be true or false; got 'no'"),
    "no token": ({"bos_token": 3}, "bos_token must be a token, or an object with its content; got 3"),
    "no list": ({"additional_special_tokens": "<x>"}, "additional_special_tokens must be a list of tokens"),
    "versions": ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "names other files for other versions"),
    "no ids": ({"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object of ids; got list"),
    "no id": ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "added_tokens_decoder has 'x'"),
    "a gap": ({"added_tokens_decoder": {"40": {"content": "<x>"}}}, "'<x>' has the id 40 in its files, but is .* 9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    config, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        load(tmp_path, byte_level(), config)


def test_what_a_class_changes_without_being_asked_is_said(tmp_path):
    """As in transformers: BERT's class lowercases, GPT-2's puts no space, whatever tokenizer.json says."""
    library = Library(models.WordPiece({"hello": 0, "HELLO": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=False)
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    with pytest.warns(UserWarning, match=r"keeps capitals or accents, but BERT's class does not"):
        tokenizer = load(tmp_path, library, {"eos_token": "[UNK]", "tokenizer_class": "BertTokenizer"})
    assert tokenizer.encode("HELLO") == [0]
    prefixed = byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.warns(UserWarning, match="puts a space before a text, but GPT-2's class not"):
        assert load(tmp_path, prefixed, {"tokenizer_class": "GPT2Tokenizer"}).encode("a") == [2]


def test_a_mask_token_of_another_name(tmp_path):
    assert load(tmp_path, byte_level(), {"eos_token": "</s>", "mask_token": "<s>"}).mask_token == 0


def test_encodings_that_are_random_are_refused(tmp_path):
    library = byte_level()
    content = json.loads(library.to_str())
    content["model"]["dropout"] = 0.1
    with pytest.raises(ValueError, match=r"model.dropout 0.1 in tokenizer.json makes ids random"):
        load(tmp_path, Library.from_str(json.dumps(content)))


def test_parts_that_a_class_does_not_have_stay(tmp_path):
    """SmolLM's folder says it is GPT-2's, but cuts digits apart; the model was trained so."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    both = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    with pytest.warns(UserWarning, match="cuts words otherwise than GPT-2's tokenizer; it counts"):
        tokenizer = load(tmp_path, byte_level(pre_tokenizer=both), {"tokenizer_class": "GPT2Tokenizer"})
    assert tokenizer.hash == load_as_it_is(tmp_path, byte_level(pre_tokenizer=both)).hash
    with pytest.warns(UserWarning, match="cuts words otherwise than GPT-2's tokenizer; it counts"):
        load(tmp_path, byte_level(normalizer=normalizers.NFC()), {"tokenizer_class": "GPT2Tokenizer"})


def load_as_it_is(path, library):
    (path / "plain").mkdir()
    return load(path / "plain", library, {"tokenizer_class": "PreTrainedTokenizerFast"})


def test_a_lowercasing_file_beside_a_setting_that_says_no(tmp_path):
    library = Library(models.WordPiece({"hello": 0, "HELLO": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    library.add_special_tokens(["[UNK]"])
    load_with = lambda **settings: load(tmp_path, library, {"eos_token": "[UNK]", **settings})
    for named in ({}, {"tokenizer_class": "BertTokenizer"}):
        assert load_with(**named, do_lower_case=False).encode("HELLO") == [1]
        assert load_with(**named, do_lower_case=True).encode("HELLO") == [0]
    assert load_with().encode("HELLO") == [0]


def test_the_end_that_only_generation_config_names(tmp_path):
    library = byte_level()
    content = json.loads(library.to_str().replace("</s>", "<end>"))
    for file, ids in (("config", 1), ("generation_config", [0, 1])):
        tokenizer = load(tmp_path, Library.from_str(json.dumps(content)), {}, **{file: {"eos_token_id": ids}})
        assert tokenizer.end_of_text == (ids if isinstance(ids, int) else ids[0])


def test_chat_templates_that_are_files(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (tmp_path / "chat_template.jinja").write_text("new")
    assert read_settings(tmp_path).values["chat_template"] == "new"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    named = [{"name": "default", "template": "new"}, {"name": "tool_use", "template": "tools"}]
    assert read_settings(tmp_path).values["chat_template"] == named


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vocab.json": '{"a": 0}'}, "has no merges.txt"),
        ({"vocab.json": '{"a": "x"}', "merges.txt": ""}, "the token 'a' has the id 'x'"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "merges.txt: damaged: merge 0"),
        ({"vocab.json": '{"a": 0}', "tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}'},
         "not read by the rules of tokenizer_class 'RobertaTokenizer'"),
        ({"vocab.txt": "[UNK]\n[CLS]\n[SEP]\n", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
         "not read by the rules of tokenizer_class 'GPT2Tokenizer'"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "added_tokens.json": '{"<x>": "1"}'}, "'<x>' has the id '1'"),
    ],
)  # fmt: skip
def test_vocabularies_that_are_none(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(FileTokenizer(path=str(tmp_path)))


def test_marks_that_only_the_post_processor_has(tmp_path):
    """<s> is put before a text although no file calls it bos_token."""
    library = byte_level()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = load(tmp_path, library)
    assert tokenizer.text_frame == ([0], [1]) and tokenizer.begin == [0]
