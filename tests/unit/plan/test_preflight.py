"""What only the end of a run would refuse is refused before its first step, by the planner too; and what is only odd
is said."""

import dataclasses
import shutil
import sys

import jax
import pytest

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.config.load import from_dict
from dsjax.config.run import RunConfig
from dsjax.data.config import CurriculumConfig, DifficultyConfig, FixedDiscrete, FixedLinear, LengthConfig
from dsjax.data.tokenizers.tokenizer import byte_tokenizer
from dsjax.models.config import RandomLTDConfig
from dsjax.observe.config import ObserveConfig
from dsjax.plan import preflight
from dsjax.plan.plan import plan
from dsjax.runs import disk
from dsjax.setup.config import TrainConfig
from dsjax.setup.resolve import resolved, schedule_of
from dsjax.setup.schedule import make_schedule
from tests.unit.plan.plan_configs import config

GROWING = {"kind": "fixed_linear", "steps": 21}
BYTES = {"data": {"tokenizer": {"kind": "byte"}, "sequence_length": 32}}


def run_of(*, kind="gpt2", model=None, **sections) -> RunConfig:
    sizes = {"vocab_size": 264, "num_layers": 2, "model_dim": 16, "num_heads": 2}
    tree = {"model": {"kind": kind, **sizes, **(model or {})}, "train": {"steps": 20, "batch_size": 16}}
    return from_dict(RunConfig, tree | BYTES | sections)


REFUSED = {
    "positions": (
        {"model": {"max_positions": 64}, "sample": {"prompt": "a"}},
        ["sample: a prompt of 1 tokens and 100 new ones need 101 positions, but the model has 64", "at most 63 tokens"],
    ),
    "a long prompt": (
        {"model": {"max_positions": 64}, "sample": {"prompt": "é" * 32, "max_new_tokens": 1}},
        ["a prompt of 64 tokens and 1 new ones need 65 positions", "shorten the prompt to 63 tokens or fewer"],
    ),
    "no token": ({"sample": {"prompt": "a", "max_new_tokens": 0}}, ["sample: max_new_tokens must be at least 1"]),
    "temperature": ({"sample": {"prompt": "a", "temperature": -1.0}}, ["sample: temperature and top_k must be 0 or"]),
    "not text": ({"sample": {"prompt": "\udcff"}}, ["sample: the prompt '\\udcff' is not UTF-8"]),
    "an encoder": (
        {"kind": "bert", "sample": {"prompt": "a"}},
        ["sample.prompt needs a model that predicts the next token; this one's task is masked"],
    ),
    "rows of validation": (
        {"evaluate": {"rows": -5, "every": -1}, "observe": {"peak_tflops": -2.0}},
        ["evaluate.every = -1 and evaluate.rows = -5 and observe.peak_tflops = -2.0 must be 0 or more"],
    ),
    "vocabulary": ({"model": {"vocab_size": 200}}, ["the tokenizer has 257 tokens, but model.vocab_size is 200"]),
    "rows that are too long": (
        {"model": {"max_positions": 16}},
        ["data.sequence_length = 32 is more than the model's positions, model.max_positions = 16"],
    ),
    "a metric": (
        {"curriculum": {"difficulty": [{"metric": "rarity", "schedule": {**GROWING, "quantum": 1}}]}},
        ["no metric 'rarity'; there are vocab_rarity"],
    ),
    "several": (
        {"model": {"max_positions": 64, "vocab_size": 200}, "sample": {"prompt": "a"}, "evaluate": {"rows": -1}},
        ["evaluate.rows = -1 must be 0 or more\nsample: a prompt of 1 tokens", "\nthe tokenizer has 257 tokens"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_planner_refuses_what_would_fail_after_the_last_step(name):
    sections, said = REFUSED[name]
    with pytest.raises(ValueError) as error:
        plan(run_of(**sections), num_devices=1)
    assert not [part for part in said if part not in str(error.value)], str(error.value)


def test_what_fits_just_so_is_planned():
    fitting = run_of(model={"max_positions": 64}, sample={"prompt": "é", "max_new_tokens": 62})  # two bytes
    assert plan(fitting, num_devices=1).warnings == ()
    # Without a prompt nothing is drawn, and its settings mean nothing.
    preflight.check_end(resolved(run_of(sample={"max_new_tokens": 0, "temperature": -1.0})))
    # A tokenizer that is trained on the text is not known yet: a prompt then counts as one token at least.
    trained = {"tokenizer": {"kind": "bpe", "vocab_size": 264}, "sequence_length": 32}
    long = resolved(
        run_of(model={"max_positions": 64}, sample={"prompt": "a" * 64, "max_new_tokens": 63}, data=trained)
    )
    preflight.check_end(long)
    with pytest.raises(ValueError, match="a prompt of 64 tokens and 63 new ones"):
        preflight.check_end(long, byte_tokenizer())


def test_a_prompt_of_unknown_words_is_refused(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": "[UNK]"}')
    data = {"tokenizer": {"kind": "file", "path": str(tmp_path)}, "sequence_length": 32}
    preflight.check_end(resolved(run_of(sample={"prompt": "hello world"}, data=data)))
    with pytest.raises(ValueError, match="sample: the tokenizer knows no token of the prompt 'good morning'"):
        preflight.check_end(resolved(run_of(sample={"prompt": "good morning"}, data=data)))
    with pytest.raises(ValueError, match="sample: the tokenizer has no token for the prompt ' '"):
        preflight.check_end(resolved(run_of(sample={"prompt": " "}, data=data)))


def schedule(**values):
    return {"optimizer": {"kind": "adamw", "schedule": values}}


WARNED = {
    "warm-up in steps": (
        schedule(warmup=40),
        "optimizer.schedule.warmup = 40 steps is longer than the run, 20 steps: the learning rate only gets to 50% of",
    ),
    "warm-up in tokens": (
        schedule(warmup=40_960, warmup_by="tokens", warmup_power=2.0),
        "optimizer.schedule.warmup = 40,960 tokens is longer than the run, 10,240 tokens: the learning rate only gets "
        "to 6% of its peak",
    ),
    "decay": (schedule(kind="linear", warmup=10, decay=10), "optimizer.schedule.decay = 10 steps ends within the"),
    "random-LTD": (
        {"random_ltd": {"steps": 21, "min_kept": 16}, "model": {"num_layers": 3}},
        "random_ltd.steps = 21 steps is longer than the run, 20 steps: it never gets to its end",
    ),
    "length": (
        {"curriculum": {"length": {"min": 8, "schedule": GROWING}}},
        "curriculum.length.schedule.steps = 21 steps is longer than the run, 20 steps",
    ),
    "trace": ({"observe": {"profile": "21:23"}}, "observe.profile 21:23 begins after the last step, 20: no trace"),
}  # fmt: skip


@pytest.mark.parametrize("name", WARNED)
def test_what_never_comes_to_its_end_is_said(name):
    sections, said = WARNED[name]
    (line,) = plan(run_of(**sections), num_devices=1).warnings
    assert line.startswith(said)


def test_what_just_comes_to_its_end_is_not_said():
    ending = run_of(
        **schedule(warmup=20, decay=20, decay_by="tokens"),
        random_ltd={"steps": 20, "min_kept": 16},
        model={"num_layers": 3},
        curriculum={
            "length": {"min": 8, "schedule": {"kind": "fixed_discrete", "difficulties": [8, 32], "until": [20]}}
        },
        observe={"profile": "20:23"},
    )
    settled = resolved(ending)
    assert preflight.advise(settled, schedule_of(settled), workers=1) == []
    one = preflight.advise(resolved(run_of(sample={"prompt": "a"})), schedule_of(settled), workers=1, processes=2)
    assert one == ["sample.prompt: no sample is drawn with several processes; `dsjax generate` draws it afterwards"]


def test_a_package_that_is_missing(monkeypatch):
    run = run_of(observe={"tensorboard": True, "wandb_project": "lab"})
    for package, key in (("tensorboardX", "observe.tensorboard"), ("wandb", "observe.wandb_project")):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "tensorboardX", sys)
            without.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=rf"{key} needs the package {package}, which is not installed"):
                preflight.require_tools(run.observe)
            (line,) = plan(run, num_devices=1).warnings
            assert line.startswith(f"on this machine {key} needs the package {package}")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ValueError, match="pictures need matplotlib"):
        preflight.require_tools(ObserveConfig())


@pytest.mark.parametrize(
    ("free", "said", "hopeless"),
    [(400, "", False), (399, "4 checkpoints of 100 B", False), (50, "has 50 B free", False), (49, "has 49 B", True)],
)  # fmt: skip
def test_room_on_the_disk(tmp_path, monkeypatch, free, said, hopeless):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free))
    path, shapes = tmp_path / "new" / "run", {"w": jax.ShapeDtypeStruct((25,), "float32")}
    problem, none = disk.disk_problem(path, disk.tensor_bytes(shapes), 4)
    assert said in problem and bool(problem) == bool(said) and none == hopeless
    told: list[str] = []
    keep = CheckpointConfig(every=10)  # two and the best, and the one that is written
    disk.check_disk(path, keep, shapes, 100, told.append, resumed=True, force=False)
    assert len(told) == (free < 100)  # the others are there already
    disk.check_disk(path, keep, shapes, 100, told.append, resumed=False, force=True)
    assert len(told) == (free < 100) + bool(said)
    if hopeless:
        with pytest.raises(ValueError, match=r"has 49 B free: make room.* or run all the same with --force"):
            disk.check_disk(path, keep, shapes, 100, told.append, resumed=False, force=False)


def test_how_many_checkpoints_lie_there():
    keep = CheckpointConfig(every=3, keep_last=2, keep_best=1, keep_every=12)
    assert disk.checkpoints_at_once(keep, 24) == 2 + 1 + 2 + 1
    assert disk.checkpoints_at_once(keep, 5) == 2


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert disk.unwritable(tmp_path / "file" / "run") == f"{tmp_path / 'file'} is not a folder"
    assert disk.unwritable(tmp_path / "new" / "run") == ""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    # The superuser, as whom tests may run, may write anywhere but to what is mounted for reading only.
    closed = lambda path, mode: "checkpoints" not in str(path)
    monkeypatch.setattr(disk.os, "access", closed)
    assert disk.unwritable(tmp_path / "run") == f"no permission to write to {tmp_path / 'run' / 'checkpoints'}"
    monkeypatch.setattr(disk.os, "access", lambda path, mode: False)
    assert disk.unwritable(tmp_path / "new" / "run") == f"no permission to write to {tmp_path}"


def test_schedules_of_all_kinds_are_looked_at():
    """A list's last bound counts; a function of the user's own ends where it likes."""
    growing = CurriculumConfig(
        difficulty=(DifficultyConfig(schedule=FixedDiscrete(difficulties=(10, 50, 100), until=(5, 30))),),
        length=LengthConfig(min=8, schedule=FixedLinear(steps=19)),
    )
    run = resolved(run_of())
    schedule = make_schedule(TrainConfig(steps=20, batch_size=2), None, None, sequence_length=32, num_layers=2)
    both = dataclasses.replace(run, curriculum=growing, random_ltd=RandomLTDConfig(steps=20))
    lines = preflight.advise(both, schedule, workers=1)
    assert lines == [
        "curriculum.difficulty.0.schedule.until = 30 steps is longer than the run, 20 steps: it never gets to its end"
    ]


def test_a_plan_says_how_large_a_checkpoint_is():
    needs = plan(config(ema_decay=0.9), num_devices=1)
    # Parameters, their average and two moments in float32, the step, the moments' count and the key.
    assert needs.checkpoint == 4 * 4 * needs.num_parameters + 4 + 4 + 8
    assert needs.to_dict()["checkpoint"] == needs.checkpoint
