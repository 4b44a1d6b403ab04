"""Tiny trained models as folders, spoiled ones, and how the command refuses them."""

import shutil

import pytest
from tiny_models import CONFIGS, SPOILED, make_model, make_params, write_run

from dsjax.cli.main import main
from dsjax.inference.convert import byte_tokenizer_file
from dsjax.models.formats.pretrained import save_pretrained


@pytest.fixture(scope="session")
def params():
    """Family -> parameters."""
    return {kind: make_params(config) for kind, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def hf_folders(params, tmp_path_factory):
    """Family -> Hugging Face folder."""
    folders = {}
    for kind, config in CONFIGS.items():
        folders[kind] = tmp_path_factory.mktemp("hf") / kind
        save_pretrained(make_model(config, params[kind]), folders[kind])
        byte_tokenizer_file().save(folders[kind])
    return folders


@pytest.fixture(scope="session")
def run_folder(params, tmp_path_factory):
    """The run of the GPT-2 model, with one checkpoint."""
    path = tmp_path_factory.mktemp("runs") / "run"
    return write_run(path, CONFIGS["gpt2"], {3: {"params": params["gpt2"]}})


@pytest.fixture(params=SPOILED)
def spoiled_folder(request, hf_folders, tmp_path):
    """A Hugging Face folder with something wrong in it, and what the message must say."""
    spoil, said = SPOILED[request.param]
    path = tmp_path / "spoiled"
    shutil.copytree(hf_folders["gpt2"], path)
    spoil(path)
    return path, said


@pytest.fixture(params=["missing", "file", "neither", "no checkpoint", "no tokenizer"])
def no_source(request, run_folder, tmp_path):
    """A path that is no source at all, and what the message must say."""
    path = tmp_path / "source"
    if request.param == "missing":
        return path, ["there is no folder", "run folder or a Hugging Face model folder"]
    if request.param == "file":
        path.write_text("")
        return path, ["is a file"]
    if request.param == "neither":
        path.mkdir()
        (path / "notes.txt").write_text("")
        return path, ["no config.yaml", "no config.json", "no model.safetensors", "it holds notes.txt"]
    shutil.copytree(run_folder, path)
    shutil.rmtree(path / {"no checkpoint": "checkpoints", "no tokenizer": "tokenizer"}[request.param])
    return path, ["no whole checkpoint"] if request.param == "no checkpoint" else ["no tokenizer at"]


@pytest.fixture
def refused(capsys):
    """Run the command, which must refuse with exit code 2 and one message that says all of `said`."""

    def refused(arguments, said):
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        message = err[err.index("dsjax: error: ") :]
        assert out == "" and "Traceback" not in err
        assert not [part for part in said if part not in message], message

    return refused
