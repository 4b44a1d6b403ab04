"""One weight that is no number: every verb refuses the folder, the GGUF file or the run, naming the tensor."""

import json

import numpy as np
import pytest
from gguf_files import write_gguf
from safetensors.numpy import load_file, save_file
from test_gguf_source import write_model
from tiny_models import CONFIGS, write_run

from dsjax.checkpoint.gguf_file import open_gguf
from dsjax.cli.main import main

SAID = "holds 1 of {} values that are NaN or infinite"


@pytest.fixture(scope="module", params=["folder", "GGUF file", "run"])
def source(request, tmp_path_factory, hf_folders, params):
    """A source with one bad value, and what must be said of it."""
    place = tmp_path_factory.mktemp("bad")
    if request.param == "folder":
        path, name = place / "model", "transformer.h.1.ln_1.bias"
        path.mkdir()
        for file in hf_folders["gpt2"].iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(path / "model.safetensors")
        tensors[name][3] = np.nan
        save_file(tensors, path / "model.safetensors")
        return path, [f"{path}: {name} {SAID.format(16)}"]
    if request.param == "GGUF file":
        whole = write_model(place / "whole.gguf")
        file = open_gguf(whole)
        tensors = {name: file.read(name) for name in file.names()}
        tensors["blk.0.ffn_norm.weight"][0] = np.inf
        own = {key: value for key, value in file.metadata.items() if not key.startswith("general.")}
        path = write_gguf(place / "bad.gguf", own, tensors)
        return path, [f"{path}: model.layers.0.post_attention_layernorm.weight {SAID.format(16)}"]
    bad = {**params["gpt2"]}
    bad["final_norm"] = {**bad["final_norm"], "bias": bad["final_norm"]["bias"].at[2].set(-np.inf)}
    path = write_run(place / "run", CONFIGS["gpt2"], {7: {"params": bad}})
    return path, ["step 7 in", f"final_norm.bias {SAID.format(16)}"]


@pytest.mark.parametrize("verb", ["generate", "embed", "evaluate", "convert", "train"])
def test_every_verb_refuses(verb, source, tmp_path, refused, capsys):
    path, said = source
    (tmp_path / "text.txt").write_text("some text " * 40)
    arguments = {
        "generate": ["--prompt", "a"],
        "embed": ["--text", "a"],
        "evaluate": ["--data", tmp_path / "text.txt"],
        "convert": [tmp_path / "out"],
    }
    if verb != "train":
        refused([verb, path, *arguments[verb]], said)
        assert not (tmp_path / "out").exists()
        return
    if (path / "config.yaml").is_file():
        return  # a run is no init_from
    settings = {
        "model": {"kind": "pretrained", "init_from": str(path), "dropout": 0.0, "attention_dropout": 0.0},
        "data": {"sources": [{"kind": "text", "path": str(tmp_path / "text.txt")}], "sequence_length": 16,
                 "tokenizer": {"kind": "file", "path": str(path)}, "validation_fraction": 0,
                 "cache_dir": str(tmp_path / "cache")},
        "train": {"steps": 1, "batch_size": 8},
        "mesh": {"data": -1},
        "sample": {"prompt": ""},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    run_dir = tmp_path / "run"
    assert main(["train", str(tmp_path / "run.yaml"), "--run-dir", str(run_dir)]) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in said), err
    assert not (run_dir / "config.yaml").exists()
