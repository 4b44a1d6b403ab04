"""`dsjax data build`: what it prints, its JSON, its folder, and its refusals."""

import argparse
import json

import pytest

from dsjax.cli import data
from dsjax.data.config import ByteTokenizer, DataConfig, TokensSource
from dsjax.data.corpus.build import build_corpus


def run(*arguments):
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args(["build", *map(str, arguments)]))


@pytest.fixture
def config(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 5)
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {steps: 1}\n"
        "data:\n"
        f"  sources: [{{kind: text, path: '{tmp_path}'}}]\n"
        "  tokenizer: {kind: byte}\n"
        "  validation_fraction: 0.2\n"
        f"  cache_dir: '{tmp_path}/cache'\n"
    )
    return path


def test_json_and_tokens_folder(config, tmp_path, capsys):
    assert run(config, "--json", "--out", tmp_path / "tokens", "--workers", 2) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == str(tmp_path / "tokens") and result["vocab_size"] == 257
    assert result["train"]["documents"] + result["validation"]["documents"] == 40
    assert result["train"]["tokens"] == result["train"]["bytes"] + result["train"]["documents"]
    source = TokensSource(path=str(tmp_path / "tokens"))
    corpus = build_corpus(DataConfig(sources=(source,), tokenizer=ByteTokenizer()))
    assert corpus.train_tokens == result["train"]["tokens"] and corpus.hash == result["hash"]


def test_text_with_overrides(config, capsys):
    assert run(config, "--set", "data.validation_fraction=0") == 0
    out, err = capsys.readouterr()
    assert "train" in out and "40 documents" in out and "bytes a token" in out and "tokenising" in err


def test_mistakes_are_value_errors(config):
    with pytest.raises(ValueError, match="--workers must be at least 1"):
        run(config, "--workers", 0)
    with pytest.raises(ValueError, match="no file or folder"):
        run(config, "--set", "data.sources=[{kind: text, path: /no/such/place}]")
