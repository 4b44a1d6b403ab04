"""Tokenizers inside GGUF files and vocab.txt, against plain Python."""

import itertools
import json
import re
import string

import pytest
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.data.config import BPETokenizer, FileTokenizer
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.data.tokenizers.train import train_bpe

TEXTS = [
    "It's 1234567 apples, isn't it?\n\n  They'll   cost 99.50 or 1000!\n" * 3,
    "It's IT'S the 123 1234 thé\r\n" * 4,
]
# The expressions of llama.cpp for each pre-tokenizer, for ASCII.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
WORDS = {
    "gpt-2": lambda text: re.findall(GPT_2, text),
    "smollm": lambda text: [word for part in re.split("([0-9])", text) for word in re.findall(GPT_2, part)],
    "llama-bpe": lambda text: re.findall(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        text,
    ),
}
ASCII = st.text(st.sampled_from(string.ascii_letters + string.digits + "'!?.- \n\r\t"), max_size=60) | st.lists(
    st.sampled_from(["It's", " isn't", " 1234567", "\n\n  ", "  ", " cost", "99.50", "!?", "'LL", "\r\n"]), max_size=12
).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE, as tokens and merges."""
    tokenizer = train_bpe(TEXTS, BPETokenizer(vocab_size=340), tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("trained")
    tokenizer.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokenizer, tokens, [" ".join(pair) for pair in model["merges"]]


def metadata_of(trained, pre="gpt-2", **changes):
    _, tokens, merges = trained
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<|start|>", "<tool>"],
        "token_type": [3, *[1] * (len(tokens) - 1), 3, 4],
        "merges": merges,
        "eos_token_id": 0,
        "bos_token_id": len(tokens),
    }
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"tokenizer.chat_template": "{{ x }}"}


@pytest.fixture(scope="module")
def by_pre(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {
        pre: load_tokenizer(FileTokenizer(path=str(write_gguf(folder / f"{pre}.gguf", metadata_of(trained, pre), {}))))
        for pre in WORDS
    }


def merged(word: str, ranks: dict[str, int]) -> list[str]:
    """BPE by its definition: the pair that was learnt first, leftmost first, until none is left."""
    visible = {" ": "Ġ", "\n": "Ċ", "\r": "č", "\t": "ĉ"}
    parts = [visible.get(character, character) for character in word]
    while True:
        pairs = [(ranks.get(f"{a} {b}", len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, at = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return parts
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(deadline=None, max_examples=150)
@given(text=ASCII, pre=st.sampled_from(sorted(WORDS)))
def test_ids_are_those_of_the_definition(trained, by_pre, text, pre):
    _, tokens, merges = trained
    ids, ranks = {token: i for i, token in enumerate(tokens)}, {merge: i for i, merge in enumerate(merges)}
    words = WORDS[pre](text)
    assert "".join(words) == text
    assert by_pre[pre].encode(text) == [ids[part] for word in words for part in merged(word, ranks)]


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(trained, by_pre, text):
    assert by_pre["gpt-2"].encode(text) == trained[0].encode(text)
    for tokenizer in by_pre.values():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_and_settings(trained, by_pre, tmp_path):
    tokenizer, start = by_pre["llama-bpe"], len(trained[1])
    assert tokenizer.end_of_text == 0 and tokenizer.vocab_size == start + 2
    assert tokenizer.settings["chat_template"] == "{{ x }}" and tokenizer.settings["bos_token"] == "<|start|>"
    assert start not in tokenizer.encode("<|start|>"), "text is no special token"
    assert tokenizer.encode("a<tool>")[-1] == start + 1 and tokenizer.decode([start + 1, start]) == "<tool>"
    # Llama 3's texts begin with a token; of the others only where the file says so.
    assert tokenizer.begin == [start] and tokenizer.encode_marked(["a"]) == [[start, *tokenizer.encode("a")]]
    assert by_pre["smollm"].begin == [] and by_pre["smollm"].encode_marked(["a"]) == [by_pre["smollm"].encode("a")]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == tokenizer.hash and again.begin == [start] and again.settings["chat_template"] == "{{ x }}"
    assert again.encode("It's 12345 <tool>") == tokenizer.encode("It's 12345 <tool>")


def test_bos_as_the_file_says(trained, tmp_path):
    changed = {**metadata_of(trained, "smollm"), "tokenizer.ggml.add_bos_token": True}
    assert load_tokenizer(FileTokenizer(path=str(write_gguf(tmp_path / "a", changed, {})))).begin == [len(trained[1])]
    changed = {**metadata_of(trained, "llama-bpe"), "tokenizer.ggml.add_bos_token": False}
    assert load_tokenizer(FileTokenizer(path=str(write_gguf(tmp_path / "b", changed, {})))).begin == []


def test_an_end_and_switches_as_the_file_says(trained, tmp_path):
    changed = {**metadata_of(trained), "tokenizer.ggml.add_eos_token": True}
    tokenizer = load_tokenizer(FileTokenizer(path=str(write_gguf(tmp_path / "a", changed, {}))))
    assert tokenizer.encode_marked(["a"]) == [[*tokenizer.encode("a"), 0]] and tokenizer.text_frame == ([], [0])
    changed = {**metadata_of(trained), "tokenizer.ggml.add_bos_token": 1}
    with pytest.raises(ValueError, match=r"tokenizer.ggml.add_bos_token must be a boolean; got 1"):
        load_tokenizer(FileTokenizer(path=str(write_gguf(tmp_path / "b", changed, {}))))
    changed = {**metadata_of(trained), "tokenizer.ggml.lowercase": True, "tokenizer.ggml.fim_pre_token_id": 3}
    with pytest.warns(UserWarning, match=r"what tokenizer.ggml.lowercase means is not known"):
        load_tokenizer(FileTokenizer(path=str(write_gguf(tmp_path / "c", changed, {}))))


MISTAKES = {
    "model": (
        {"model": "llama"},
        r"of the model 'llama' .* known are model 'gpt2' with 'gpt-2', 'smollm', 'llama-bpe'",
    ),
    "pre-tokenizer": ({"pre": "qwen2"}, "with the pre-tokenizer 'qwen2'"),
    "none": ({"model": None}, "of the model None"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens must be a list of str, not empty"),
    "tokens": ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be a list of str, not empty"),
    "twice": ({"tokens": ["a", "a"], "token_type": [1, 1]}, "2 tokens, 1 of them different"),
    "types": ({"token_type": [1]}, "and 1 types"),
    "merge": ({"merges": ["a b", "a"]}, "merge 0 of the tokenizer, 'a b', is not of tokens to a token"),
    "eos": ({"eos_token_id": 9999}, "eos_token_id is 9999, but there are 308 tokens"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_tokenizers_that_cannot_be_used(mistake, trained, tmp_path):
    changes, said = MISTAKES[mistake]
    file = write_gguf(tmp_path / "x.gguf", metadata_of(trained, **changes), {})
    with pytest.raises(ValueError, match=said):
        load_tokenizer(FileTokenizer(path=str(file)))


VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "un",
    "##aff",
    "##able",
    "a",
    "##a",
    "##b",
    "é",
    "E",
    "e",
    "!",
]


def wordpiece_ids(word: str) -> list[int]:
    """The longest token that the rest begins with, again and again; [UNK] for the word if there is none."""
    ids, rest = [], word
    while rest:
        prefix = "##" if ids else ""
        length = next((n for n in range(len(rest), 0, -1) if prefix + rest[:n] in VOCABULARY), 0)
        if not length:
            return [1]
        ids.append(VOCABULARY.index(prefix + rest[:length]))
        rest = rest[length:]
    return ids


def folder_with(path, lines=VOCABULARY, **settings):
    (path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if settings:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(FileTokenizer(path=str(path)))


def test_wordpiece_ids_are_those_of_the_definition(tmp_path):
    tokenizer = folder_with(tmp_path)

    @settings(deadline=None, max_examples=100)
    @given(
        st.lists(st.sampled_from(["un", "aff", "able", "a", "b", "ab", "x", "!", "é", "E"]), max_size=5),
        st.integers(1, 3),
    )
    def check(parts, count):
        text = " ".join(["".join(parts)] * count)
        plain = text.lower().replace("é", "e")
        words = re.findall(r"!|[^\s!]+", plain)
        assert tokenizer.encode(text) == [i for word in words for i in wordpiece_ids(word)]

    check()
    assert tokenizer.end_of_text == 3 and tokenizer.vocab_size == len(VOCABULARY)
    assert tokenizer.encode_marked(["a a", ""]) == [[2, 8, 8, 3], [2, 3]] and tokenizer.begin == [2]


def test_wordpiece_with_capitals(tmp_path):
    tokenizer = folder_with(tmp_path, do_lower_case=False, sep_token="[SEP]")
    assert [tokenizer.encode(text) for text in ("E", "e", "é")] == [[12], [13], [11]]
    tokenizer.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode("unaffable Eé!") == tokenizer.encode("unaffable Eé!") and again.hash == tokenizer.hash


def test_vocabularies_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"vocab.txt is no vocabulary of WordPiece: it lacks \[UNK\], \[SEP\]"):
        folder_with(tmp_path, ["a", "[CLS]"])
    (tmp_path / "vocab.txt").write_bytes(b"a\n\xff")
    with pytest.raises(ValueError, match="is not UTF-8: byte 2"):
        load_tokenizer(FileTokenizer(path=str(tmp_path)))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(
        ValueError, match=r"no tokenizer at .*: give a tokenizer.json .*, a vocab.txt .* or a GGUF file"
    ):
        load_tokenizer(FileTokenizer(path=str(tmp_path)))


def test_settings_that_are_damaged(tmp_path):
    folder_with(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON .*: it is nested too deeply"):
        load_tokenizer(FileTokenizer(path=str(tmp_path)))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not UTF-8: byte 1"):
        load_tokenizer(FileTokenizer(path=str(tmp_path)))


def test_an_id_far_beyond_the_others(trained, tmp_path):
    """The library would make a list as long as the id; it aborts the process when there is no memory for it."""
    trained[0].save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 2**31
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a tokenizer of 306 tokens cannot have ids up to 2147483648"):
        load_tokenizer(FileTokenizer(path=str(tmp_path)))
