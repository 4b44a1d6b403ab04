"""`dsjax.train.run(config) -> RunResult` as somebody's own program calls it, and what a run folder then holds."""

import json
import math

import pytest
import yaml
from e2e_runs import checkpoints, curve, rows, train, write_config

import dsjax.train
from dsjax.config.load import load_run
from dsjax.config.run import RunConfig
from dsjax.data.config import ByteTokenizer, DataConfig, TextSource
from dsjax.evaluate.config import EvaluateConfig
from dsjax.inference.config import SampleConfig
from dsjax.mesh.config import MeshConfig
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.optimizers.kinds.base import ScheduleConfig
from dsjax.optimizers.kinds.lamb import LambConfig
from dsjax.setup.config import TrainConfig

ROW = {
    "step", "loss", "grad_norm", "learning_rate", "tokens", "real_tokens", "step_seconds", "data_seconds",
    "tokens_per_second", "skipped",
}  # fmt: skip
SUMMARY = {
    "parameters", "steps", "skipped_steps", "tokens", "real_tokens", "training_loss", "validation_loss",
    "best_validation_loss", "validation_nats_per_byte", "unigram_nats_per_token", "bigram_nats_per_token",
    "unigram_nats_per_byte", "bigram_nats_per_byte", "step_seconds", "tokens_per_second", "waiting_for_data",
    "training_seconds", "peak_host_bytes", "data_hash", "sample",
}  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory, texts):
    """A small run, written as a user of the library writes it; on the devices that there are."""
    config = RunConfig(
        name="mine",
        seed=3,
        mesh=MeshConfig(data=-1, tensor=2),
        model=GPT2Config(vocab_size=260, num_layers=2, model_dim=16, num_heads=2, max_positions=16, segments=(2,)),
        data=DataConfig(
            sources=(TextSource(path=str(texts)),),
            tokenizer=ByteTokenizer(),
            sequence_length=16,
            validation_fraction=0.2,
            cache_dir=str(tmp_path_factory.mktemp("cache")),
        ),
        optimizer=LambConfig(learning_rate=1e-2, schedule=ScheduleConfig(kind="linear", warmup=2)),
        train=TrainConfig(tokens=16 * 16 * 6 - 1, batch_size=16, accumulation=2),
        evaluate=EvaluateConfig(every=2, rows=16),
        sample=SampleConfig(prompt="the cat", max_new_tokens=4, temperature=0.0),
    )
    return dsjax.train.run(config, run_dir=tmp_path_factory.mktemp("runs") / "mine")


def test_the_result(result):
    assert result.stopped_by == "" and result.folder.name == "mine"
    assert result.summary == json.loads((result.folder / "summary.json").read_text())
    assert result.summary.keys() == {"name"} | SUMMARY
    assert all(
        set(figure) == {"value", "how"} and figure["how"] for name, figure in result.summary.items() if name != "name"
    )
    value = {name: figure["value"] for name, figure in result.summary.items() if name != "name"}
    assert value["steps"] == 6 and value["tokens"] == 6 * 16 * 16  # the first step that reaches the tokens asked for
    assert value["real_tokens"] < value["tokens"] and value["skipped_steps"] == 0
    assert 0 < value["training_loss"] < math.log(260) + 0.5
    assert value["sample"].startswith("the cat")
    # Both count the same targets, so per byte and per token stand in one ratio.
    ratio = value["bigram_nats_per_byte"] / value["bigram_nats_per_token"]
    assert value["validation_nats_per_byte"] / value["validation_loss"] == pytest.approx(ratio)


def test_the_rows(result):
    found = rows(result.folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row in found:
        optional = {"compiled"} if row["step"] == 1 else {"validation_loss"} if row["step"] % 2 == 0 else set()
        assert row.keys() == ROW | optional
    assert [row["tokens"] for row in found] == [256 * step for step in range(1, 7)]
    assert found[-1]["learning_rate"] == pytest.approx(1e-3)  # min_ratio of the peak, at the end
    validation = [row["validation_loss"] for row in found if "validation_loss" in row]
    assert validation[-1] == result.summary["validation_loss"]["value"]
    assert min(validation) == result.summary["best_validation_loss"]["value"]
    timed = sum(row["step_seconds"] for row in found[1:])
    assert timed == pytest.approx(result.summary["training_seconds"]["value"])


def test_the_folder(result):
    run = result.folder
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "versions.json", "data.json", "tokenizer", "metrics.jsonl", "loss.png", "checkpoints",
        "summary.json",
    }  # fmt: skip
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["train"]["accumulation"], config["optimizer"]["weight_decay"]) == (2, 0.1)  # defaults are filled in
    versions = json.loads((run / "versions.json").read_text())
    assert versions["num_devices"] == 8 and {"jax", "flax", "dsjax"} <= versions["packages"].keys()
    assert json.loads((run / "data.json").read_text())["hash"] == result.summary["data_hash"]["value"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resumed_from_a_program(result):
    config = load_run(result.folder / "config.yaml", [])
    with pytest.raises(ValueError, match="holds a run already"):
        dsjax.train.run(config, run_dir=result.folder)
    again = dsjax.train.run(config, run_dir=result.folder, resume="must")
    assert again.summary == result.summary and again.folder == result.folder


def test_the_best_checkpoint_is_kept(tmp_path, result):
    """A learning rate at which the loss soon rises: the best is not the last one."""
    config = load_run(
        result.folder / "config.yaml",
        ["optimizer.learning_rate=20", "checkpoint.every=2", "checkpoint.keep_last=1", "sample.prompt="],
    )
    run = dsjax.train.run(config, run_dir=tmp_path / "run").folder
    measured = {row["step"]: row["validation_loss"] for row in rows(run) if "validation_loss" in row}
    best = min(measured, key=lambda step: measured[step])
    assert best < 6, measured
    assert checkpoints(run) == [best, 6]


def test_the_command_with_json_and_a_trace(tmp_path, config, reference):
    """--json prints the summary and nothing else on stdout; --profile writes a trace of the steps named."""
    done = train(config, "--run-dir", tmp_path / "run", "--json", "--profile", "2:4", "--set", "train.steps=5")
    printed = json.loads(done.stdout)
    assert printed["folder"] == str(tmp_path / "run") and printed["steps"]["value"] == 5
    assert "step 5/5" in done.stderr
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    found = trace.read_bytes()
    assert found.count(b"jit_gradient") > 0


def test_the_default_folder_is_a_free_one(tmp_path, zygote, texts):
    config = write_config(tmp_path / "run.yaml", texts, train={"steps": 1}, sample={"prompt": ""})
    for _ in range(2):
        life = zygote.train(config, environment={"HOME": str(tmp_path)}, cwd=str(tmp_path))
        assert life.wait() == 0, life.said
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    assert curve(tmp_path / "runs" / "tiny") == curve(tmp_path / "runs" / "tiny-2")
    life = zygote.train(config, "--resume", cwd=str(tmp_path))
    assert life.wait() == 0 and "runs/tiny-2 is finished" in life.said
