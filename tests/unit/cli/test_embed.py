"""dsjax embed: the mean of the features, whatever the padding, and what it prints."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from tiny_models import make_model, make_params

from dsjax.cli.main import main
from dsjax.models.config import BertConfig
from dsjax.models.pretrained import load_pretrained, save_pretrained

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "plays", "guitar", "."]
CONFIG = BertConfig(
    vocab_size=12, num_layers=2, model_dim=16, num_heads=2, max_positions=8, segments=(2,), task="embedding"
)
TEXTS = ["A man plays.", "guitar", "man man man guitar"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "model"
    save_pretrained(make_model(CONFIG, make_params(CONFIG)), path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return path


def embed(folder, *texts, more=()):
    return main(["embed", str(folder), *(part for text in texts for part in ("--text", text)), *more])


def test_vectors_are_the_mean_of_the_features_between_the_marks(folder, capsys):
    assert embed(folder, *TEXTS, more=["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == TEXTS and found["num_tokens"] == [6, 3, 6] and found["dimensions"] == 16
    model = load_pretrained(folder, segments=(2,))
    for text, vector in zip(TEXTS, found["vectors"], strict=True):
        words = text.lower().replace(".", " .").split()
        ids = [2, *(WORDS.index(word) for word in words), 3]
        features = np.asarray(model.features(np.array([ids])), np.float64)[0].mean(0)
        np.testing.assert_allclose(vector, features / np.linalg.norm(features), atol=2e-6)  # float32
    np.testing.assert_allclose(found["cosines"], np.array(found["vectors"]) @ np.array(found["vectors"]).T, atol=1e-6)


def test_what_is_printed(folder, capsys, monkeypatch):
    assert embed(folder, *TEXTS[:2]) == 0
    one_pair = capsys.readouterr().out
    assert -1 <= float(one_pair) <= 1
    assert embed(folder, *TEXTS) == 0
    table = capsys.readouterr().out
    assert one_pair.strip() in table and all(text in table for text in TEXTS) and "1.0000" in table
    assert embed(folder, TEXTS[0]) == 0
    vector = [float(value) for value in capsys.readouterr().out.split()]
    assert len(vector) == 16 and abs(np.linalg.norm(vector) - 1) < 1e-4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n\n".join(TEXTS[:2]).encode())))
    assert embed(folder, "-") == 0 and capsys.readouterr().out == one_pair


def test_many_texts_and_a_long_one(folder, capsys):
    """More than a batch; a text that is cut keeps its end mark."""
    texts = [" ".join(["man"] * (1 + number % 5)) for number in range(40)]
    assert embed(folder, *texts, " ".join(["man"] * 20), " ".join(["man"] * 6), more=["--json"]) == 0
    out, err = capsys.readouterr()
    vectors = np.array(json.loads(out)["vectors"])
    np.testing.assert_allclose(vectors[:5], vectors[35:40], atol=1e-6)
    np.testing.assert_allclose(vectors[40], vectors[41], atol=1e-6)
    assert "of 22 tokens the model sees the first 8" in err and err.count("the model sees") == 1


def test_the_length_of_a_sentence_encoder_is_its_own(folder, tmp_path, capsys, refused):
    """Shorter than the model's positions; with all of them, the same folder gives another vector."""
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": false}')
    assert embed(tmp_path / "model", "man a guitar man a", "man a guitar", more=["--json"]) == 0
    out, err = capsys.readouterr()
    vectors = np.array(json.loads(out)["vectors"])
    np.testing.assert_array_equal(vectors[0], vectors[1])
    assert "of 7 tokens the model sees the first 5" in err and err.count("the model sees") == 1
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": "256"}')
    refused(["embed", tmp_path / "model", "--text", "a"], ["sentence_bert_config.json", "'256'"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], ["--text"]), (["--text", "a", "--text", " "], ["text 2 of 2 is empty"]), (["--text", ""], ["text 1 of 1"])],
)
def test_mistakes(arguments, said, folder, refused):
    refused(["embed", folder, *arguments], said)
