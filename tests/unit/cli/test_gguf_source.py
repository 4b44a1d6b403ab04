"""A GGUF file as the source of generate, evaluate and convert."""

import json

import numpy as np
import pytest
from gguf_files import write_gguf

from dsjax.cli.main import main
from dsjax.inference.convert import byte_tokenizer_file

WIDTH, HIDDEN, VOCABULARY, POSITIONS = 16, 24, 264, 64


def write_model(path, *, vocab_size=VOCABULARY):
    """One layer of a Llama with a tokenizer of the bytes, an end of text and "he", and a chat template."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.4, shape).astype(np.float32)
    byte_tokenizer_file().save(path.parent / "bytes")
    vocabulary = json.loads((path.parent / "bytes" / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {
        "llama.block_count": 1, "llama.context_length": POSITIONS, "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.tokens": [*tokens, "<|end|>", "he"], "tokenizer.ggml.token_type": [*[1] * 256, 3, 1],
        "tokenizer.ggml.merges": ["h e"], "tokenizer.chat_template": "[{{ messages[0]['content'] }}]",
    }  # fmt: skip
    tensors = {
        "token_embd.weight": draw(vocab_size, WIDTH), "output_norm.weight": 1 + draw(WIDTH),
        "blk.0.attn_norm.weight": 1 + draw(WIDTH), "blk.0.attn_q.weight": draw(WIDTH, WIDTH),
        "blk.0.attn_k.weight": draw(WIDTH // 2, WIDTH), "blk.0.attn_v.weight": draw(WIDTH // 2, WIDTH),
        "blk.0.attn_output.weight": draw(WIDTH, WIDTH), "blk.0.ffn_norm.weight": 1 + draw(WIDTH),
        "blk.0.ffn_gate.weight": draw(HIDDEN, WIDTH), "blk.0.ffn_up.weight": draw(HIDDEN, WIDTH),
        "blk.0.ffn_down.weight": draw(WIDTH, HIDDEN),
    }  # fmt: skip
    return write_gguf(path, metadata, tensors)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("gguf") / "model.bin")  # known by its bytes, whatever its name


def said_by(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_converted_it_says_the_same(model, tmp_path, capsys):
    folder = tmp_path / "hf"
    assert said_by(capsys, "convert", model, folder, "--json")["kind"] == "hugging_face"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>" and settings["chat_template"] == "[{{ messages[0]['content'] }}]"
    question = ("--prompt", "hello", "--max-new-tokens", "12", "--json")
    for more in ((), ("--chat",)):
        one, other = (said_by(capsys, "generate", path, *question, *more) for path in (model, folder))
        assert (one.pop("source"), other.pop("source")) == (
            f"the GGUF file {model}",
            f"the Hugging Face folder {folder}",
        )
        assert one == other and one["new_tokens"] > 0
    # "hello" is he l l o; the template puts a bracket on either side.
    assert one["prompt_tokens"] == 6


def test_perplexity(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello there")
    found = said_by(capsys, "evaluate", model, "--data", tmp_path / "a.txt", "--length", "32", "--json")
    assert found["tokens"]["value"] == 8 and 0 < found["nats_per_token"]["value"] < 30


def test_it_becomes_a_run_where_a_run_file_is_given(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello there\n" * 40)
    config = f"""
data:
  sources: [{{kind: text, path: {tmp_path}, glob: a.txt}}]
  sequence_length: 16
  validation_fraction: 0
  cache_dir: {tmp_path / "cache"}
train: {{steps: 5}}
"""
    (tmp_path / "run.yaml").write_text(config)
    result = said_by(capsys, "convert", model, tmp_path / "run", "--config", tmp_path / "run.yaml", "--json")
    assert result["kind"] == "run"
    question = ("--prompt", "hello", "--max-new-tokens", "5", "--json")
    one, other = (said_by(capsys, "generate", path, *question) for path in (model, tmp_path / "run"))
    assert one["text"] == other["text"]


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, refused):
    file = write_model(tmp_path / "x.gguf", vocab_size=200)
    refused(["generate", file, "--prompt", "x"], ["ids go up to 257", "only 200 embeddings"])


def test_damaged_files(model, tmp_path, refused):
    (tmp_path / "x.gguf").write_bytes(model.read_bytes()[:-100])
    for verb in (["generate", "--prompt", "x"], ["evaluate", "--data", "x"], ["embed", "--text", "x"]):
        refused([verb[0], tmp_path / "x.gguf", *verb[1:]], ["x.gguf: truncated: ", "offset", "but the file ends at"])
    refused(["convert", tmp_path / "x.gguf", tmp_path / "out"], ["x.gguf: truncated: "])
    assert not (tmp_path / "out").exists()
