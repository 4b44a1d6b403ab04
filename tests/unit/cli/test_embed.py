"""dsjax embed: the mean of the features, whatever the padding, and what it prints."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import make_model, make_params

from dsjax.cli.main import main
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.formats.pretrained import load_pretrained, save_pretrained

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
        features = np.asarray(model.features(np.array([ids]))[0], np.float64)[0].mean(0)
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_line_of_standard_input_ends_with_a_line_feed_alone(folder, capsys, monkeypatch, encoding):
    lines = ["a man\u2028plays", "guitar\x0ca\x85man\x1c."]
    data = "".join(line + "\r\n" for line in [*lines, " "]).encode(encoding)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert embed(folder, "-", more=["--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["texts"] == lines and err == "dsjax: of 3 lines 1 without text are left out\n"


@pytest.mark.parametrize(
    ("data", "said"), [(b"caf\xe9", "standard input is not UTF-8: byte 0xe9 at 3"), (b"\n \n", "has no text")]
)
def test_standard_input_without_a_text_is_refused(folder, capsys, monkeypatch, data, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert embed(folder, "-") == 2 and said in capsys.readouterr().err


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
    (tmp_path / "model" / "sentence_bert_config.json").unlink()
    (tmp_path / "model" / "modules.json").write_text("[]")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    np.testing.assert_array_equal(vectors_of(capsys, tmp_path / "model", "man a guitar man a")[0], vectors[1])
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": "256"}')
    refused(["embed", tmp_path / "model", "--text", "a"], ["sentence_bert_config.json", "'256'"])


def encoder_of(folder, path, pooling, *, more=(), **files):
    """The folder as sentence-transformers would write it, with pooling and other modules."""
    shutil.copytree(folder, path)
    modules = ["Transformer", "Pooling", *more, "Normalize"]
    listed = [
        {"idx": i, "name": f"{i}", "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def features_of(folder, text):
    """Float64 [T, 16] of a text between its marks."""
    ids = [2, *(WORDS.index(word) for word in text.lower().replace(".", " .").split()), 3]
    return np.asarray(load_pretrained(folder, segments=(2,)).features(np.array([ids]))[0], np.float64)[0]


def vectors_of(capsys, folder, *texts):
    assert embed(folder, *texts, more=["--json"]) == 0
    return np.array(json.loads(capsys.readouterr().out)["vectors"])


OFF = {"pooling_mode_mean_tokens": False}
POOLED = [  # what 1_Pooling/config.json says, and the definition in float64
    ({"pooling_mode_cls_token": True, **OFF}, lambda x: x[0]),
    ({"pooling_mode_mean_tokens": True}, lambda x: x.mean(0)),
    ({}, lambda x: x.mean(0)),
    ({"pooling_mode_max_tokens": True, **OFF}, lambda x: x.max(0)),
    ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda x: np.concatenate([x.mean(0), x.sum(0) / len(x) ** 0.5])),
    ({"pooling_mode_lasttoken": True, **OFF}, lambda x: x[-1]),
    ({"pooling_mode": "weightedmean"}, lambda x: np.average(x, 0, np.arange(1, len(x) + 1))),
]  # fmt: skip


@pytest.mark.parametrize(("pooling", "definition"), POOLED, ids=[str(list(said)) for said, _ in POOLED])
def test_features_are_pooled_as_the_folder_says(pooling, definition, folder, tmp_path, capsys):
    """One program for a batch of texts of several lengths: padding counts nowhere."""
    path = encoder_of(folder, tmp_path / "model", pooling)
    for text, vector in zip(TEXTS, vectors_of(capsys, path, *TEXTS), strict=True):
        want = definition(features_of(folder, text))
        np.testing.assert_allclose(vector, want / np.linalg.norm(want), atol=3e-6)  # float32


def test_prompts_layers_and_lower_case(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((5, 16)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    prompts = {"prompts": {"query": "A man "}, "default_prompt_name": "query", "similarity_fn_name": "dot"}
    path = encoder_of(
        folder,
        tmp_path / "model",
        {"pooling_mode_mean_tokens": True, "include_prompt": False},
        more=["Dense"],
        config_sentence_transformers=prompts,
        sentence_bert_config={"max_seq_length": 8, "do_lower_case": True},
    )
    (path / "2_Dense").mkdir()
    dense = {"in_features": 16, "out_features": 5, "bias": True}
    dense["activation_function"] = "torch.nn.modules.activation.Tanh"
    (path / "2_Dense" / "config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": weight, "linear.bias": bias}, path / "2_Dense" / "model.safetensors")
    features = features_of(folder, "a man plays guitar.")[3:]  # without [CLS], a, man
    want = np.tanh(weight @ features.mean(0) + bias)
    np.testing.assert_allclose(vectors_of(capsys, path, "PLAYS guitar.")[0], want / np.linalg.norm(want), atol=3e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"more": ["LSTM"]}, ["modules.json: a module LSTM", "is not implemented"]),
        ({"pooling": {"pooling_mode": "attention"}}, ["1_Pooling/config.json: no pooling that is known: 'attention'"]),
        ({"config_sentence_transformers": {"truncate_dim": 4}}, ["truncate_dim is 4, which is not implemented"]),
        ({"config_sentence_transformers": {"default_prompt_name": "q"}}, ["default_prompt_name is 'q'"]),
        ({"modules": {"0": 1}}, ["modules.json: expected a list of modules"]),
    ],
)
def test_what_is_not_implemented_is_refused(changes, said, folder, tmp_path, refused):
    path = encoder_of(folder, tmp_path / "model", **({"pooling": {}} | changes))
    refused(["embed", path, "--text", "a"], said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], ["--text"]), (["--text", "a", "--text", " "], ["text 2 of 2 is empty"]), (["--text", ""], ["text 1 of 1"])],
)
def test_mistakes(arguments, said, folder, refused):
    refused(["embed", folder, *arguments], said)
