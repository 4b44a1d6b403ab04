"""dsjax convert: the same bits in both directions, and a run that can be used and trained on."""

import errno
import json
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_models import CONFIGS, make_params, write_run

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.cli.main import main
from dsjax.data.tokenizers.tokenizer import Tokenizer, byte_tokenizer
from dsjax.inference import convert
from dsjax.inference.convert import byte_tokenizer_file
from dsjax.inference.open import open_model
from dsjax.models.families.bert.config import BertConfig

RUN = """\
name: tuned
mesh: {data: 8}
data:
  sources: [{kind: text, path: TEXT}]
  sequence_length: 16
  validation_fraction: 0
  cache_dir: CACHE
train: {steps: 2, batch_size: 8, ema_decay: 0.5}
checkpoint: {every: 1}
"""


@pytest.fixture
def run_file(tmp_path):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    text = RUN.replace("TEXT", str(tmp_path / "text.txt")).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "tuned.yaml").write_text(text)
    return tmp_path / "tuned.yaml"


def converted(source, destination, *more):
    assert main(["convert", str(source), str(destination), *map(str, more)]) == 0
    return destination


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    assert all((left[name].view(np.uint32) == right[name].view(np.uint32)).all() for name in left)


@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back_and_there(kind, params, run_file, tmp_path, capsys):
    run = write_run(tmp_path / "run", CONFIGS[kind], {7: {"params": params[kind]}})
    first = converted(run, tmp_path / "first")
    again = converted(first, tmp_path / "again", "--config", run_file)
    second = converted(again, tmp_path / "deep" / "second")
    assert_same_bits(tensors_of(first), tensors_of(second))
    table = {"gpt2": "transformer.wte.weight", "bloom": "transformer.word_embeddings.weight"}[kind]
    assert (tensors_of(first)[table] == np.asarray(params[kind]["embed"]["table"])).all()
    assert len(tensors_of(first)) == 24 + {"gpt2": 4, "bloom": 5}[kind]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} >= {"run", "first", "again", "deep"}
    assert not [path for path in tmp_path.rglob("*partial*")]
    out = capsys.readouterr().out
    assert f"from step 7 of the run {run}" in out and f"--run-dir {again} --resume" in out


def test_the_hugging_face_folder(run_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["convert", str(run_folder), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "source": f"step 3 of the run {run_folder}",
        "destination": str(folder),
        "kind": "hugging_face",
        "parameters": sum(array.size for array in tensors_of(folder).values()),
        "next": [f"dsjax generate {folder} --prompt TEXT"],
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["model_type"]) == (264, 48, "gpt2")
    for content in (config, json.loads((folder / "generation_config.json").read_text())):
        assert {content[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")} == {256}
    assert Tokenizer.load(folder).encode("é") == [195, 169]
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def next_commands(capsys, *arguments):
    """What `convert` recommends, each taken apart as a shell does."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments), "--json"]) == 0
    commands = [shlex.split(line) for line in json.loads(capsys.readouterr().out)["next"]]
    assert all(words[0] == "dsjax" for words in commands)
    return [words[1:] for words in commands]


def test_what_is_recommended_next_works(run_folder, run_file, tmp_path, capsys, monkeypatch):
    """In folders whose names a shell would take apart, and one that looks like an option."""
    monkeypatch.chdir(tmp_path)
    (generate,) = next_commands(capsys, run_folder, tmp_path / "my model's $HOME")
    assert generate[:2] == ["generate", str(tmp_path / "my model's $HOME")]
    assert main([*generate, "--max-new-tokens", "2"]) == 0
    generate, train = next_commands(capsys, tmp_path / "my model's $HOME", "./-my run", "--config", run_file)
    assert main([*generate, "--max-new-tokens", "2"]) == 0
    assert main(train) == 0
    assert json.loads((tmp_path / "-my run" / "summary.json").read_text())["steps"]["value"] == 2


@pytest.mark.parametrize(
    ("changes", "recommended"),
    [
        ({}, ["embed", "DST", "--text", "TEXT"]),
        ({"task": "classification", "num_labels": 3}, ["evaluate", "DST", "--data", "FILE.jsonl"]),
    ],
)
def test_an_encoder_is_not_recommended_to_write(changes, recommended, tmp_path, capsys):
    config = BertConfig(vocab_size=264, num_layers=1, model_dim=16, num_heads=2, max_positions=32, **changes)
    run = write_run(tmp_path / "run", config, {1: {"params": make_params(config)}})
    folder = str(tmp_path / "a model")
    assert next_commands(capsys, run, folder) == [[folder if word == "DST" else word for word in recommended]]


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(run_folder, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("dsjax.inference.open.open_model", lambda *arguments, **options: pytest.fail("read"))
    (tmp_path / "file").write_text("mine")
    refused(["convert", run_folder, tmp_path / "file" / "out"], [f"{tmp_path / 'file'} is not a folder"])
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(["convert", run_folder, tmp_path / "out"], [f"no permission to write to {tmp_path}"])


def test_the_average_is_what_is_converted(params, tmp_path):
    average = jax.tree.map(lambda p: p / 2, params["gpt2"])
    both = {"params": params["gpt2"], "ema": average}
    run = write_run(tmp_path / "run", CONFIGS["gpt2"], {1: both}, ema_decay=0.9)
    table = tensors_of(converted(run, tmp_path / "model"))["transformer.wte.weight"]
    assert (table == np.asarray(average["embed"]["table"])).all()


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=60)
def test_the_byte_tokenizer_as_a_file_gives_the_same_ids(text):
    ours, theirs = byte_tokenizer(), byte_tokenizer_file()
    assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert (theirs.pieces, theirs.end_of_text) == (ours.pieces, ours.end_of_text)


def test_a_converted_run_is_trained_on(hf_folders, run_file, tmp_path, capsys):
    run = converted(hf_folders["gpt2"], tmp_path / "run", "--config", run_file, "--set", "train.batch_size=16")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["tokenizer"] == {"kind": "file", "path": str(run / "tokenizer"), "end_of_text": ""}
    assert (config["model"]["vocab_size"], config["train"]["batch_size"]) == (264, 16)
    # Whole: the average begins at the parameters, the optimizer's moments at zero.
    saved = everything_in(run / "checkpoints")
    assert {name.split(".")[0] for name in saved} == {"step", "params", "opt_state", "ema", "key"}
    assert not any(array.any() for name, array in saved.items() if name.startswith(("step", "opt_state")))
    average = {name.removeprefix("ema."): array for name, array in saved.items() if name.startswith("ema.")}
    assert len(average) == 28 and all((array == saved[f"params.{name}"]).all() for name, array in average.items())
    capsys.readouterr()

    assert main(["train", str(run / "config.yaml"), "--run-dir", str(run), "--resume", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "resumed from step 0" in err and "changed on resume" not in err
    assert json.loads(out)["steps"]["value"] == 2
    assert open_model(run, report=print).step == 2
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def everything_in(checkpoints):
    """Name -> array of the checkpoint at step 0, the run's key as its data."""
    store = CheckpointStore(checkpoints, CheckpointConfig())
    assert store.steps() == [0] and store.verify(0) == []
    described = json.loads((checkpoints / "step_00000000" / "tensors.json").read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    abstract = {
        name: jax.ShapeDtypeStruct(shape, key if dtype == str(key) else dtype, sharding=device)
        for name, (shape, dtype) in described.items()
    }
    saved = store.restore(0, abstract)
    return {name: np.asarray(jax.random.key_data(x) if name == "key" else x) for name, x in saved.items()}


def test_what_the_run_file_says_of_the_model(hf_folders, run_file, tmp_path):
    run_file.write_text(run_file.read_text() + "model: {kind: bloom, num_layers: 9, dropout: 0.25, remat: full}\n")
    run = converted(hf_folders["gpt2"], tmp_path / "run", "--config", run_file)
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    shown = {name: model[name] for name in ("kind", "num_layers", "dropout", "attention_dropout", "remat")}
    assert shown == {"kind": "gpt2", "num_layers": 2, "dropout": 0.25, "attention_dropout": 0.0, "remat": "full"}


def test_rates_of_dropout_that_differ_are_refused_unless_the_run_says_one(hf_folders, run_file, tmp_path, refused):
    shutil.copytree(hf_folders["gpt2"], tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(stored | {"embd_pdrop": 0.3}))
    command = ["convert", tmp_path / "model", tmp_path / "out", "--config", run_file]
    refused(command, ["embd_pdrop 0.3 and resid_pdrop 0.0", "set model.dropout"])
    assert main([*map(str, command), "--set", "model.dropout=0.2"]) == 0
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["dropout"] == 0.2


def test_defaults_without_a_run_file(hf_folders, tmp_path, monkeypatch):
    """Data that is not named is the standard library; here a stand-in for its corpus, which takes long to make."""
    monkeypatch.setattr("dsjax.data.corpus.build.build_corpus", lambda config, progress: FakeCorpus())
    run = converted(hf_folders["bloom"], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["name"], config["train"]["steps"], config["data"]["sources"][0]["kind"]) == ("run", 1000, "stdlib")
    assert config["data"]["sequence_length"] == 1024
    assert json.loads((run / "data.json").read_text()) == {"hash": "stand-in"}
    run = converted(hf_folders["gpt2"], tmp_path / "short")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["sequence_length"] == 48


class FakeCorpus:
    hash, note, tokenizer = "stand-in", "", byte_tokenizer_file()


def test_nothing_is_overwritten(run_folder, hf_folders, run_file, tmp_path, refused):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    for source, more in ((run_folder, []), (hf_folders["gpt2"], ["--config", run_file])):
        refused(["convert", source, taken, *more], ["is not an empty folder", "nothing is overwritten"])
        refused(["convert", source, taken / "mine.txt", *more], ["nothing is overwritten"])
        refused(["convert", source, source, *more], ["nothing is overwritten"])
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    converted(run_folder, tmp_path / "empty")


def test_a_full_disk_leaves_nothing(run_folder, hf_folders, run_file, tmp_path, monkeypatch, refused):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "write_json", full)
    monkeypatch.setattr("dsjax.runs.folder.write_json", full)
    out = tmp_path / "out"
    out.mkdir()
    refused(["convert", run_folder, out / "model"], [f"cannot write {out}/model", "No space left on device"])
    refused(["convert", hf_folders["gpt2"], out / "run", "--config", run_file], ["No space left on device"])
    assert not list(out.iterdir())


def test_folders_that_do_not_fit(spoiled_folder, tmp_path, refused):
    path, said = spoiled_folder
    refused(["convert", path, tmp_path / "out"], said)
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none(no_source, tmp_path, refused):
    path, said = no_source
    refused(["convert", path, tmp_path / "out"], said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "train.steps=5"], ["give one with --config"]),
        (["--config", "nowhere.yaml"], ["no such config file: nowhere.yaml"]),
        (["--config", "RUN", "--set", "train.stepz=5"], ["train.stepz: unknown key"]),
        (["--config", "RUN", "--set", "data.sequence_length=64"], ["64, but the model has 48 positions"]),
        (["--config", "RUN", "--set", "sample.prompt=a"], ["need 101 positions, but the model has 48"]),
        (["--config", "RUN", "--set", "data.sources.0.path=/nowhere"], ["there is no file or folder '/nowhere'"]),
    ],
)
def test_mistakes(more, said, hf_folders, run_file, tmp_path, refused):
    more = [run_file if item == "RUN" else item for item in more]
    refused(["convert", hf_folders["gpt2"], tmp_path / "out", *more], said)
    assert not (tmp_path / "out").exists()


def test_a_run_takes_no_run_file(run_folder, run_file, tmp_path, refused):
    refused(["convert", run_folder, tmp_path / "out", "--config", run_file], ["describe a new run"])


def test_into_the_current_folder(run_folder, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    converted(run_folder, ".")
    assert (Path(tmp_path) / "here" / "model.safetensors").is_file()
