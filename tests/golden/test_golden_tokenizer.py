"""A BLOOM-style tokenizer.json, with Oniguruma's reading of its nested character class, against recorded encodings."""

import json
from pathlib import Path

import pytest

from dsjax.data.config import FileTokenizer
from dsjax.data.tokenizers.load import load_tokenizer
from dsjax.data.tokenizers.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "bloom" / "tokenizer"
RECORDS = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FileTokenizer(path=str(FOLDER)))


@pytest.mark.parametrize("record", RECORDS, ids=[f"{number}" for number in range(len(RECORDS))])
def test_encoding_is_the_recorded_one(tokenizer, record):
    assert tokenizer.encode(record["text"]) == record["ids"]
    assert tokenizer.decode(record["ids"]) == record["decoded"]


def test_a_stream_of_tokens_gives_the_same_text(tokenizer):
    for record in RECORDS:
        stream = tokenizer.stream_decoder()
        assert "".join([*map(stream.feed, record["ids"]), stream.finish()]) == record["decoded"]
