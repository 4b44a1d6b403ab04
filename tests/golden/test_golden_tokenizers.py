"""A tokenizer is what all its files say: ids, special tokens and chats as transformers 5 recorded them."""

import json
import warnings
from pathlib import Path

import pytest

from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.chat import chat_template
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.settings import ROLES, content_of
from dsjax.data.tokenizers.tokenizer import Tokenizer

RECORDED = json.loads((Path(__file__).parent / "tokenizers.json").read_text(encoding="utf-8"))
FOLDERS = {case["name"]: case for case in RECORDED["folders"]}
CHATS = RECORDED["chats"]


def load(path, case) -> Tokenizer:
    if case["library"] is not None:
        (path / "tokenizer.json").write_text(json.dumps(RECORDED["libraries"][case["library"]]))
    for name, content in case["files"].items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for warnings: tests/unit/data/tokenizers/test_tokenizer_settings.py
        return load_tokenizer(FileTokenizer(path=str(path)))


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_transformers(name, tmp_path):
    case = FOLDERS[name]
    tokenizer = load(tmp_path, case)
    assert tokenizer.encode_marked(case["texts"]) == case["ids"]
    assert [tokenizer.encode_rendered(text) for text in case["rendered"]] == case["rendered_ids"]
    assert tokenizer.library is not None
    before, after = tokenizer.frame if tokenizer.library.num_special_tokens_to_add(False) else ([], [])
    assert [[*before, *tokenizer.encode(text), *after] for text in case["texts"]] == case["ids"]
    # A class of transformers also has tokens that the vocabulary lacks, and gives them new ids.
    special = {role: token for role, token in case["special"].items() if tokenizer.token_id(token) is not None}
    ours = {role: content_of(tokenizer.settings.get(role)) for role in ROLES}
    assert {role: token for role, token in ours.items() if token and role in case["special"]} == {
        role: token for role, token in special.items() if role in ROLES
    }
    assert not [role for role, token in ours.items() if token and role not in case["special"]]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_saved_is_read_as_the_same_again(name, tmp_path):
    tokenizer = load(tmp_path, FOLDERS[name])
    tokenizer.save(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = [Tokenizer.load(tmp_path / "saved"), load_tokenizer(FileTokenizer(path=str(tmp_path / "saved")))]
    for one in again:
        assert (one.hash, one.text_frame, one.pieces) == (tokenizer.hash, tokenizer.text_frame, tokenizer.pieces)
        assert [one.encode_rendered(text) for text in FOLDERS[name]["rendered"]] == FOLDERS[name]["rendered_ids"]
        assert not one.missing_tokens


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_those_of_transformers(name):
    case = CHATS[name]
    template = chat_template({**case["settings"], "chat_template": case["template"]}, "here")
    assert template is not None and template.render(RECORDED["talk"]) == case["written"]
