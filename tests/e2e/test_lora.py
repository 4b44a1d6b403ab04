"""A LoRA run from its config to its adapter in PEFT's format: started, stopped, gone on with, merged, converted."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import dsjax.plan.plan as plan_module
import dsjax.train
from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.cli.main import main
from dsjax.config.run import RunConfig
from dsjax.data.config import (
    ByteTokenizer,
    CurriculumConfig,
    DataConfig,
    FixedDiscrete,
    LengthConfig,
    TextSource,
)
from dsjax.evaluate.config import EvaluateConfig
from dsjax.inference.convert import byte_tokenizer_file
from dsjax.inference.open import open_model, with_adapter
from dsjax.mesh.config import MeshConfig
from dsjax.models.config import LoRAConfig, PretrainedConfig
from dsjax.models.families.build import create, segments_of
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.formats.peft import read_adapter
from dsjax.models.formats.pretrained import save_pretrained
from dsjax.models.naming import to_named
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.setup.config import TrainConfig

IDS = np.array([list(b"the cat sat")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder."""
    path = tmp_path_factory.mktemp("base") / "model"
    config = GPT2Config(vocab_size=260, num_layers=2, model_dim=16, num_heads=2, max_positions=32, init_std=0.3)
    save_pretrained(create(config, key=jax.random.key(0)), path)
    byte_tokenizer_file().save(path)
    return path


@pytest.fixture(scope="module")
def config(base, texts, tmp_path_factory):
    return RunConfig(
        mesh=MeshConfig(data=2, fsdp=2, tensor=2, zero_stage=3),
        model=PretrainedConfig(init_from=str(base)),
        lora=LoRAConfig(rank=2, targets=r"(attention\.qkv|mlp\.down)\.kernel"),
        data=DataConfig(
            sources=(TextSource(path=str(texts)),),
            tokenizer=ByteTokenizer(),
            sequence_length=16,
            validation_fraction=0.2,
            cache_dir=str(tmp_path_factory.mktemp("cache")),
        ),
        optimizer=AdamWConfig(learning_rate=1e-2),
        train=TrainConfig(steps=6, batch_size=16, accumulation=2),
        evaluate=EvaluateConfig(every=3, rows=16),
        checkpoint=CheckpointConfig(every=3, keep_every=3),
    )


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """The run."""
    path = tmp_path_factory.mktemp("runs") / "lora"
    dsjax.train.run(config, run_dir=path)
    return path


def logits(trained):
    return np.asarray(trained.model(IDS))


def params_of(trained):
    named = to_named(nnx.to_pure_dict(nnx.state(trained.model, nnx.Param)), segments_of(trained.model.config))
    return {name: np.asarray(value) for name, value in named.items()}


def test_a_checkpoint_holds_adapters_alone(folder, base):
    store = CheckpointStore(folder / "checkpoints", CheckpointConfig())
    tensors = json.loads(next((folder / "checkpoints").glob("step_00000006/**/tensors.json")).read_text())
    store.close()
    trees = {"params", "opt_state"}
    names = {name for name in tensors if name.split("/")[0].split(".")[0] in trees and tensors[name][0]}
    assert names and all(name.endswith(("lora_a", "lora_b")) for name in names)
    said = json.loads((folder / "data.json").read_text())["base"]
    assert said["path"] == str(base) and len(said["sha256"]) == 64


def test_it_learned_and_the_base_is_as_it_was(folder, base):
    before = open_model(base, report=print)
    after = open_model(folder, report=print)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert losses[-1] < losses[0]
    changed = {name for name, value in params_of(after).items() if (value != params_of(before)[name]).any()}
    assert changed == {f"layers.{i}.{part}.kernel" for i in range(2) for part in ("attention.qkv", "mlp.down")}
    assert np.abs(logits(after) - logits(before)).max() > 0.01


def test_it_goes_on_as_if_it_had_not_stopped(folder, config, tmp_path):
    path = tmp_path / "lora"
    shutil.copytree(folder, path)
    shutil.rmtree(path / "checkpoints" / "step_00000006")
    (path / "summary.json").unlink()
    dsjax.train.run(config, run_dir=path, resume="must")
    whole, resumed = (params_of(open_model(place, report=print)) for place in (folder, path))
    assert all((whole[name] == resumed[name]).all() for name in whole)


def test_its_adapter_and_its_merged_folder_give_the_same_logits(folder, base, tmp_path, capsys):
    want = logits(open_model(folder, report=print))
    assert main(["convert", str(folder), str(tmp_path / "merged")]) == 0
    np.testing.assert_array_equal(logits(open_model(tmp_path / "merged", report=print)), want)
    assert main(["convert", str(folder), str(tmp_path / "adapter"), "--adapter"]) == 0
    again = with_adapter(open_model(base, report=print), tmp_path / "adapter")
    # Merged layer by layer here and there: the same sums.
    np.testing.assert_array_equal(logits(again), want)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"].shape == (48, 2)
    assert read_adapter(tmp_path / "adapter", again.model.config).config.rank == 2
    capsys.readouterr()
    arguments = ["--prompt", "the", "--max-new-tokens", "5"]
    assert main(["generate", str(folder), *arguments]) == 0
    text = capsys.readouterr().out
    assert main(["generate", str(base), "--adapter", str(tmp_path / "adapter"), *arguments]) == 0
    assert capsys.readouterr().out == text


def test_its_rows_may_grow(config, folder, tmp_path):
    """Each size is a program of its own, with the frozen weights among its arguments."""
    schedule = FixedDiscrete(difficulties=(8, 16), until=(3,))
    short = dataclasses.replace(
        config,
        curriculum=CurriculumConfig(length=LengthConfig(min=8, schedule=schedule)),
        evaluate=EvaluateConfig(every=0, rows=16),
        checkpoint=CheckpointConfig(every=0),
    )
    dsjax.train.run(short, run_dir=tmp_path / "run")
    read = lambda run: [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["length"] for row in read(tmp_path / "run")] == [8, 8, 8, 16, 16, 16]
    losses = [row["loss"] for row in read(tmp_path / "run")]
    assert losses[-1] < losses[0] != read(folder)[0]["loss"]
    trained, whole = (params_of(open_model(place, report=print)) for place in (tmp_path / "run", folder))
    moved = {name for name, value in trained.items() if (value != whole[name]).any()}
    assert moved == {f"layers.{i}.{part}.kernel" for i in range(2) for part in ("attention.qkv", "mlp.down")}


def test_another_base_is_refused(folder, config, base, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(base, other)
    changed = create(dataclasses.replace(open_model(base, report=print).model.config), key=jax.random.key(9))
    shutil.rmtree(other)
    save_pretrained(changed, other)
    shutil.copytree(folder, tmp_path / "run")
    text = (tmp_path / "run" / "config.yaml").read_text().replace(str(base), str(other))
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"is not the base of the adapters in .*run: its weights have changed"):
        open_model(tmp_path / "run", report=print)


def test_the_summary_says_how_much_was_trained(folder):
    """The base: 260 x 16 + 32 x 16 in tables, 12 D^2 + 13 D a layer, 2 D at the end; of A and B two kernels a layer."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["parameters"]["value"] == 292 * 16 + 2 * (12 * 16**2 + 13 * 16) + 2 * 16
    assert summary["trained_parameters"]["value"] == 2 * 2 * ((16 + 3 * 16) + (4 * 16 + 16))


def test_a_run_that_memory_will_not_hold_is_refused(config, monkeypatch):
    monkeypatch.setattr(plan_module, "available_memory_bytes", lambda: 10_000)
    with pytest.raises(ValueError, match=r"this run needs .* for 8 devices .* largest are .* --force"):
        dsjax.train.run(config)
