"""Fine-tuning from a folder: the first weights are the folder's, a resumed run is the run, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.cli.main import main
from dsjax.config.load import to_yaml
from dsjax.config.run import RunConfig
from dsjax.data.config import BPETokenizer, DataConfig, FileTokenizer, JsonlSource
from dsjax.data.rows.labels import CLASS
from dsjax.evaluate.config import EvaluateConfig
from dsjax.inference.config import SampleConfig
from dsjax.inference.open import open_model
from dsjax.mesh.build import make_mesh
from dsjax.mesh.config import MeshConfig
from dsjax.mesh.layout import Layout
from dsjax.models.config import PretrainedConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.build import abstract, create, segments_of
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.pretrained import initial_weights, load_params, open_weights, resolve, save_pretrained
from dsjax.models.naming import to_named
from dsjax.models.tree import ModelTree
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.plan.plan import plan
from dsjax.runs.begun import as_begun, class_numbers, with_class_names
from dsjax.runs.corpus import open_corpus
from dsjax.runs.folder import begun_folder, read_config
from dsjax.setup.config import TrainConfig
from dsjax.setup.resolve import resolved
from dsjax.train.loop import run
from tests.wordpiece import BERT, write_folder

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny BERT in bert/ and good.jsonl, of which the word decides the label."""
    place = tmp_path_factory.mktemp("fine-tune")
    write_folder(place / "bert")
    rng = np.random.default_rng(0)
    kinds = {"neg": ["bad", "awful", "poor"], "pos": ["good", "fine", "great"]}
    with (place / "good.jsonl").open("w") as file:
        for _ in range(400):
            label = str(rng.choice(list(kinds)))
            text = f"the film {rng.integers(100)} was {rng.choice(kinds[label])}"
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    return place


def make_config(place, *, steps=2, **changes):
    """A run that trains a classifier."""
    config = RunConfig(
        name="tuned",
        mesh=MeshConfig(data=4, fsdp=2, zero_stage=3),
        model=PretrainedConfig(init_from=str(place / "bert"), task="classification", segments=(2,)),
        data=DataConfig(
            sources=(JsonlSource(path=str(place / "good.jsonl"), label="label"),),
            tokenizer=FileTokenizer(path=str(place / "bert")),
            sequence_length=12,
            validation_fraction=0.2,
            cache_dir=str(place / "cache"),
        ),
        optimizer=AdamWConfig(learning_rate=3e-3),
        train=TrainConfig(steps=steps, batch_size=16, accumulation=2),
        evaluate=EvaluateConfig(every=0, rows=0, batch_size=16),
        checkpoint=CheckpointConfig(every=0),
    )
    return dataclasses.replace(config, **changes)


def test_a_run_learns_is_evaluated_and_resumes(place, tmp_path, capsys):
    folder = tmp_path / "run"
    first = run(make_config(place, steps=20), run_dir=folder, console=QUIET)
    assert first.summary["validation_accuracy"]["value"] >= 0.95
    assert first.summary["validation_loss"]["value"] < 0.4
    assert 0.4 < first.summary["majority_accuracy"]["value"] < 0.65
    assert not [name for name in first.summary if "gram" in name or "per_byte" in name]
    assert first.summary["real_tokens"]["value"] == 20 * 16
    assert json.loads((folder / "data.json").read_text())["labels"] == ["neg", "pos"]
    kept = read_config(folder)
    assert isinstance(kept.model, BertConfig) and kept.data.task == "classification"

    # A checkpoint wins over init_from: the run's own config goes on where the weights are gone.
    moved = dataclasses.replace(kept, model=dataclasses.replace(kept.model, init_from="/gone"),
                                train=dataclasses.replace(kept.train, steps=21))  # fmt: skip
    assert run(moved, run_dir=folder, resume="must", console=QUIET).summary["steps"]["value"] == 21

    capsys.readouterr()
    data = str(place / "good.jsonl")
    assert main(["evaluate", str(folder), "--task", "classification", "--data", data, "--json"]) == 0
    found = {name: item["value"] for name, item in json.loads(capsys.readouterr().out).items() if name != "source"}
    assert found["rows"] == 400 and found["accuracy"] >= 0.95 and found["f1"] >= 0.95 and found["matthews"] >= 0.9
    assert open_model(folder, report=print).labels == ("neg", "pos")
    assert main(["convert", str(folder), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "hf"), "--data", data, "--json"]) == 0
    again = {name: item["value"] for name, item in json.loads(capsys.readouterr().out).items() if name != "source"}
    assert again == {**found, "nats_per_row": pytest.approx(found["nats_per_row"], rel=1e-5)}
    assert main(["evaluate", str(folder), "--task", "masked", "--data", data]) == 2
    assert "was made for the task classification" in capsys.readouterr().err


def test_names_of_classes_are_the_models(place, tmp_path, capsys):
    """Two of three classes occur in the rows: they keep their numbers, and the third its name."""
    names = ["positive", "neutral", "negative"]
    base = tmp_path / "bert"
    write_folder(base, dataclasses.replace(BERT, task="classification", num_labels=3))
    settings = json.loads((base / "config.json").read_text())
    settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (base / "config.json").write_text(json.dumps(settings))
    rows = [json.loads(line) for line in (place / "good.jsonl").read_text().splitlines()]
    spelt = {"pos": "positive", "neg": "negative"}
    text = "".join(json.dumps({**row, "label": spelt[row["label"]]}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    config = make_config(
        place,
        steps=50,
        mesh=MeshConfig(data=-1),
        model=PretrainedConfig(init_from=str(base), segments=(2,)),
        train=TrainConfig(steps=50, batch_size=16),
    )
    data = dataclasses.replace(config.data, sources=(JsonlSource(path=str(tmp_path / "rows.jsonl"), label="label"),))
    config = dataclasses.replace(config, data=data)
    folder = tmp_path / "run"
    summary = run(config, run_dir=folder, console=QUIET).summary
    assert summary["validation_accuracy"]["value"] >= 0.9
    assert json.loads((folder / "data.json").read_text())["labels"] == names
    assert main(["convert", str(folder), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["id2label"] == {"0": names[0], "1": names[1],
                                                                                     "2": names[2]}  # fmt: skip
    capsys.readouterr()
    data = ["--data", str(tmp_path / "rows.jsonl"), "--task", "classification", "--json"]
    for source in (folder, tmp_path / "hf"):  # looks numbers up by name
        assert main(["evaluate", str(source), *data]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"]["value"] >= 0.9

    # A run that began with its data's own order, as all did before, goes on with it.
    old = {**json.loads((folder / "data.json").read_text()), "labels": ["negative", "positive"]}
    (folder / "data.json").write_text(json.dumps(old))
    corpus = open_corpus(resolved(config).data, resolved(config).model, console=QUIET)
    first = [store.classes[:, CLASS] for store in corpus.train]
    renamed = with_class_names(corpus, resolved(config).model, None)
    again = with_class_names(corpus, resolved(config).model, folder)
    assert renamed.labels == tuple(names) and again.labels == corpus.labels == ("negative", "positive")
    for before, now, kept in zip(first, renamed.train, again.train, strict=True):
        np.testing.assert_array_equal(now.classes[:, CLASS], np.where(before == 0, 2, 0))
        np.testing.assert_array_equal(kept.classes[:, CLASS], before)


def test_labels_that_are_not_the_models_names():
    names = ("positive", "neutral", "negative")
    with pytest.raises(ValueError, match=r'the data has the labels \["bad"\], which are none of the model\'s classes'):
        class_numbers(("bad", "positive"), names)
    assert class_numbers(("0", "1", "2"), names) == [0, 1, 2] and class_numbers(("0", "2"), ("2", "1", "0")) == [2, 0]
    assert class_numbers(("bad", "good"), names) is None and class_numbers(("a",), ()) is None


def test_a_resumed_run_keeps_its_rates_of_dropout(place, tmp_path):
    """Before, null meant 0; a run file that leaves the rates out still describes the run."""
    shutil.copytree(place / "bert", tmp_path / "bert")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.25}))
    config = make_config(place, model=PretrainedConfig(init_from=str(tmp_path / "bert"), task="classification"))
    assert resolved(config).model.dropout == 0.25
    before = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0, attention_dropout=0.0))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(resolved(before)))
    assert begun_folder("x", run_dir=tmp_path / "run", resume="no") is None
    folder = begun_folder("x", run_dir=tmp_path / "run", resume="must")
    assert as_begun(config.model, None) == config.model
    assert resolve(as_begun(config.model, folder)).dropout == 0.0
    given = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.5))
    assert resolve(as_begun(given.model, folder)).dropout == 0.5


def test_the_first_weights_are_the_folders_on_every_mesh(place):
    config = resolved(make_config(place)).model
    want = to_named(load_params(open_weights(place / "bert"), config, seed=3), segments_of(config))
    layout = Layout(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()), 3)
    model = ModelTree.of(abstract(config))
    specs = model.specs(layout.parameter)
    shardings = jax.tree.map(layout.named, specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec))
    got = initial_weights(config, shardings=shardings, seed=3)
    for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim) and leaf.dtype == np.float32
    for name, value in to_named(got, segments_of(config)).items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    stored = to_named(load_params(open_weights(place / "bert"), BERT), segments_of(BERT))
    for name in set(stored) & set(want):
        np.testing.assert_array_equal(want[name], stored[name], err_msg=name)
    assert {name for name in want if name not in stored} == {
        "classifier.bias", "classifier.kernel", "pooler.dense.bias", "pooler.dense.kernel"
    }  # fmt: skip


def test_hidden_tokens_are_learnt_and_scored(place, tmp_path, capsys):
    base = make_config(place, steps=2)
    data = dataclasses.replace(base.data, sources=(JsonlSource(path=str(place / "good.jsonl")),))
    config = dataclasses.replace(
        base,
        mesh=MeshConfig(data=-1),
        data=data,
        model=dataclasses.replace(BERT, init_from=str(place / "bert")),
        train=TrainConfig(steps=2, batch_size=16),
    )
    summary = run(config, run_dir=tmp_path / "run", console=QUIET).summary
    assert summary["validation_loss"]["value"] > 0 and "hidden token" in summary["validation_loss"]["how"]
    assert not [name for name in summary if "gram" in name or "accuracy" in name]
    source = str(place / "good.jsonl")
    found = []
    for seed in ("0", "0", "1"):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "run"), "--data", source, "--json", "--seed", seed]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["nats_per_hidden_token"] != found[2]["nats_per_hidden_token"]
    hidden = found[0]["hidden_tokens"]["value"] / (found[0]["tokens"]["value"] - 2 * 400)
    assert abs(hidden - 0.15) < 0.03  # of about 2,500 tokens: four standard deviations


@pytest.mark.parametrize("task", ["classification", "masked"])
def test_plan_knows_the_batch_of_the_task(place, task):
    config = make_config(place)
    if task == "masked":
        config = dataclasses.replace(config, model=BERT, data=dataclasses.replace(config.data, sequence_length=12))
    needs = plan(config, num_devices=8)
    ints, bools = (2 * 12 + 1, 1) if task == "classification" else (4 * 12, 12)
    assert needs.memory.batch == 16 // 8 * (4 * ints + bools)


def refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(config, run_dir=tmp_path / "run", console=QUIET)


def test_settings_that_contradict_each_other(place, tmp_path):
    config = make_config(place)
    model, data = config.model, config.data
    three = place / "three.jsonl"
    three.write_text("".join(json.dumps({"text": f"film {n}", "label": n % 3}) + "\n" for n in range(60)))
    change = dataclasses.replace
    sources = (JsonlSource(path=str(three), label="label"),)
    for changed, message in (
        (change(config, data=change(data, sources=sources)), r"3 labels \(0, 1, 2\), but model.num_labels is 2; set"),
        (change(config, data=change(data, task="masked")), r"data.task is masked, but a bert model of the task class"),
        (
            change(config, data=change(data, tokenizer=BPETokenizer())),
            r"of kind bpe, which is trained anew; set data.token",
        ),
        (change(config, sample=SampleConfig(prompt="a")), r"sample.prompt needs a model that predicts the next token"),
        (change(config, model=change(model, task="embedding")), r"bert model cannot be trained .* = embedding; it can"),
        (change(config, model=change(model, init_from="")), r"kind = pretrained needs model.init_from"),
        (change(config, model=change(model, num_labels=1)), r"classification needs model.num_labels of at least 2"),
        (change(config, data=change(data, sequence_length=99)), r"99 is more than the model's positions"),
    ):
        refused(changed, message, tmp_path)


def test_weights_that_are_of_another_model(place, tmp_path):
    config = make_config(place)
    own = resolved(config).model
    change = dataclasses.replace
    other = change(config, model=change(own, mlp_dim=32, norm_eps=1e-6))
    refused(other, r"(?s)other settings:\n.*model.mlp_dim is 32, theirs 64", tmp_path)
    refused(other, r"(?s)other settings:\n.*model.norm_eps is 1e-06, theirs 1e-12", tmp_path)
    llama = LlamaConfig(vocab_size=40, num_layers=1, model_dim=16, num_heads=8, init_from=str(place / "bert"))
    llama = change(config, model=change(llama, task="classification"))
    refused(llama, r"holds a bert model, but model.kind is llama", tmp_path)
    save_pretrained(create(change(BERT, vocab_size=37), key=jax.random.key(0)), tmp_path / "small")
    small = change(own, init_from=str(tmp_path / "small"))
    refused(change(config, model=small), r"vocab_size is 40, theirs 37", tmp_path)
