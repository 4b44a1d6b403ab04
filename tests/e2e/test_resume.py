"""Stopped anywhere and resumed, a run gives what it would have given: kills, damage, another mesh, other data."""

import json
import random
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from e2e_runs import (
    CACHE,
    HALF,
    STEPS,
    checkpoints,
    close_to,
    curve,
    interrupted,
    outcome,
    rows,
    rubbish,
    started,
    train,
    write_config,
)

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.cli.main import main
from tests.helpers import parsed

KILLS = 10
HERE = ["--set", "mesh.cpu_devices=0"]  # in pytest's own process the devices are there already


def newest_tensors(run: Path) -> dict[str, np.ndarray]:
    """Every tensor of the newest checkpoint: parameters, their average, moments, key, step."""
    store = CheckpointStore(run / "checkpoints", CheckpointConfig())
    step = store.latest_good(pytest.fail)
    assert step is not None
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    key = jax.eval_shape(lambda: jax.random.key(0)).dtype
    described = json.loads((store.directory / f"step_{step:08d}" / "tensors.json").read_text())
    abstract = {
        name: jax.ShapeDtypeStruct(shape, key if dtype.startswith("key") else dtype, sharding=one)
        for name, (shape, dtype) in described.items()
    }
    found = store.restore(step, abstract)
    found["key"] = jax.random.key_data(found["key"])
    return {name: np.asarray(value) for name, value in found.items()}


def draw_killing(chance: random.Random, number: int) -> dict:
    """How to kill a life: while it imports, before its n-th change of a file, some time after its start or a row."""
    kind = ["import", *["file", "time", "rows"] * KILLS][number] if number < KILLS - 1 else "end"
    if kind == "import":
        return {"command": True, "seconds": chance.uniform(0.1, 2.0)}
    if kind == "file":
        return {"die": ["/run/", chance.randint(1, 40)]}
    if kind == "time":
        return {"rows": 1, "seconds": chance.uniform(0.0, 3.0)}
    if kind == "rows":
        return {"rows": chance.randint(1, 5), "after": chance.uniform(0.0, 0.3)}
    last = [{"die": ["summary.json", 1]}, {"die": ["loss.png", 2]}, {"rows": STEPS, "after": 0.2}]
    return chance.choice(last)


def kill_once(zygote, run: Path, config: Path, plan: dict) -> int:
    """Start or resume the run and kill it as planned; the code it ended with."""
    arguments = [config, "--run-dir", run, "--resume-if-any"]
    if plan.get("command"):
        with started([sys.executable, "-m", "dsjax", "train", *arguments]) as process:
            time.sleep(plan["seconds"])
            process.kill()
            return process.wait()
    life = zygote.train(*arguments, **({"die": plan["die"]} if "die" in plan else {}))
    if "rows" in plan:
        target, late = min(len(rows(run)) + plan["rows"], STEPS), time.monotonic() + plan.get("seconds", 1000)
        life.until(lambda: len(rows(run)) >= target or time.monotonic() > late)
        time.sleep(plan.get("after", 0))
        life.kill()
    return life.wait()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_anywhere_and_resumed_gives_the_same_bits(tmp_path, zygote, config, reference, seed):
    run, chance = tmp_path / "run", random.Random(seed)
    plans = [draw_killing(chance, number) for number in range(KILLS)]
    assert [kill_once(zygote, run, config, plan) for plan in plans] == [-9] * KILLS, plans
    train(config, "--run-dir", run, "--resume")
    assert curve(run) == curve(reference)  # each step once, every figure equal to the last bit
    assert outcome(run) == outcome(reference)  # sample, counters, best metric
    assert checkpoints(run) == checkpoints(reference)
    found, wanted = newest_tensors(run), newest_tensors(reference)
    assert found.keys() == wanted.keys()
    assert [name for name in found if not np.array_equal(found[name], wanted[name])] == []
    # What was cut is kept, and was right too.
    by_step = {row["step"]: row["loss"] for row in rows(reference)}
    cut = [json.loads(line) for path in run.glob("metrics.jsonl.bak*") for line in path.read_text().split("\n")[:-1]]
    assert cut and all(row["loss"] == by_step[row["step"]] for row in cut)
    assert rubbish(run) == []


def test_a_second_start_compiles_nothing(tmp_path, zygote, config, reference):
    for run in (tmp_path / "again", interrupted(reference, tmp_path / "resumed")):
        life = zygote.train(config, "--run-dir", run, "--resume-if-any", count=str(tmp_path / "count.json"))
        assert life.wait() == 0, life.said
        counted = json.loads((tmp_path / "count.json").read_text())
        assert counted["cache_misses"] == 0 and counted["cache_hits"] > 5
        assert curve(run) == curve(reference) and outcome(run) == outcome(reference)
        assert "Warning" not in life.said


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"mesh": {"data": 2, "fsdp": 2, "tensor": 2, "zero_stage": 1}, "model": {"segments": [1, 1]}},
            marks=pytest.mark.slow,
        ),
        {"mesh": {"data": 4, "fsdp": 1, "expert": 2, "zero_stage": 0}, "train": {"accumulation": 2}},
    ],
    ids=["tensor", "expert"],
)
def test_on_another_mesh(tmp_path, zygote, texts, reference, changes):
    run = interrupted(reference, tmp_path / "run")
    changed = write_config(tmp_path / "changed.yaml", texts, **changes)
    life = zygote.train(changed, "--run-dir", run, "--resume")
    assert life.wait() == 0, life.said
    assert f"resumed from step {HALF}" in life.said and "changed on resume: mesh.fsdp: 4 -> " in life.said
    close_to(run, reference)
    assert curve(run)[:HALF] == curve(reference)[:HALF]
    # The folder says how the run goes on, and how it was.
    assert f"zero_stage: {changes['mesh']['zero_stage']}" in (run / "config.yaml").read_text()
    assert (run / "config.yaml.bak").read_text() == (reference / "config.yaml").read_text()


def test_longer_than_first_asked_for(tmp_path, zygote, config, reference):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    life = zygote.train(config, "--run-dir", run, "--resume", "--set", f"train.steps={STEPS + 2}")
    assert life.wait() == 0, life.said
    assert [row["step"] for row in rows(run)] == [*range(1, STEPS + 3)]
    assert curve(run)[:STEPS] == curve(reference)
    assert outcome(run)["steps"] == STEPS + 2
    # What the folder holds is the longer run, which is done.
    life = zygote.train(run / "config.yaml", "--run-dir", run, "--resume")
    assert life.wait() == 0 and f"is finished: {STEPS + 2} steps are done" in life.said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_is_left_alone(tmp_path, reference, config, capsys):
    run = tmp_path / "my run"
    shutil.copytree(reference, run)
    assert main(["train", str(config), "--run-dir", str(run), "--resume", *HERE]) == 0
    said = capsys.readouterr().out
    assert f"{run} is finished: {STEPS} steps are done, {run}/summary.json says how it went" in said
    longer = parsed(said.partition("To train longer, such as twice as long: ")[2])
    assert (longer.config, longer.run_dir, longer.resume) == (f"{run}/config.yaml", str(run), True)
    assert longer.sets == [f"train.steps={2 * STEPS}"]
    assert contents(run) == contents(reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "holds a run already; go on with it by --resume, or give another --run-dir"),
        (["--set", "seed=7"], "holds a run already"),
        (
            ["--resume", "--set", "model.num_layers=3", "--set", "model.segments=[]", "--set", "model.model_dim=24"],
            "holds a run with another config; these may not change on --resume:\n    model.num_layers: 2 -> 3\n"
            "    model.model_dim: 16 -> 24\n  set them back, or start a new run with another --run-dir",
        ),
        (
            ["--resume", "--set", "data.sources.0.weight=2", "--set", "seed=1"],
            "    seed: 0 -> 1\n    data.sources.0.weight: 1.0 -> 2.0\n",
        ),
        (["--resume", "--set", "train.steps=6"], f"has done {STEPS} steps, but the config now ends after 6; give at"),
    ],
    ids=["taken", "taken by another", "model", "several", "shorter"],
)  # fmt: skip
def test_what_a_folder_refuses(tmp_path, reference, config, capsys, arguments, message):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    assert main(["train", str(config), "--run-dir", str(run), *HERE, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert contents(run) == contents(reference)


def test_other_data_in_the_same_place_is_refused(tmp_path, reference, texts, capsys):
    other = tmp_path / "texts"
    shutil.copytree(texts, other)
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    moved = write_config(tmp_path / "moved.yaml", other)
    assert main(["train", str(moved), "--run-dir", str(run), "--resume", *HERE]) == 0  # moved, but the same
    assert "is finished" in capsys.readouterr().out
    with (other / "07.txt").open("a") as file:
        file.write("one more")
    assert main(["train", str(moved), "--run-dir", str(run), "--resume", *HERE]) == 2
    before = json.loads((reference / "data.json").read_text())["hash"]
    error = capsys.readouterr().err
    assert f"the data has changed since {run} was started (hash {before[:12]}, now " in error
    assert contents(run) == contents(reference)


def test_nothing_to_resume(tmp_path, config, capsys):
    assert main(["train", str(config), "--run-dir", str(tmp_path / "none"), "--resume", *HERE]) == 2
    assert f"nothing to resume: {tmp_path / 'none'} holds no run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for resume in ([], ["--resume-if-any"]):
        assert main(["train", str(config), "--run-dir", str(tmp_path / "mine"), *resume, *HERE]) == 2
        assert "is not empty and holds no run; nothing is overwritten" in capsys.readouterr().err
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}


def flip(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def lose(file: Path, chance: random.Random) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate])
def test_twenty_damages_of_a_real_checkpoint(tmp_path, reference, damage):
    """The files of a run, among them large ones, and where a byte lies decides which file is hit."""
    wanted, before = checkpoints(reference)[-1], checkpoints(reference)[-2]
    for seed in range(20):
        chance, directory = random.Random(seed), tmp_path / str(seed)
        for step in (before, wanted):
            name = f"step_{step:08d}"
            shutil.copytree(reference / "checkpoints" / name, directory / name)
        newest = directory / f"step_{wanted:08d}"
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
        (file,) = chance.choices(files, weights=[path.stat().st_size for path in files])
        damage(file, chance)
        told: list[str] = []
        assert CheckpointStore(directory, CheckpointConfig()).latest_good(told.append) == before
        (line,) = told
        assert line.startswith(f"{newest.name} is not used: {file.relative_to(newest).as_posix()}: ")


@pytest.mark.parametrize("damages", [(flip, truncate), (lose, "no manifest")], ids=["flip, truncate", "lose, manifest"])
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(tmp_path, zygote, config, reference, damages):
    run, chance = tmp_path / "run", random.Random(3)
    shutil.copytree(reference, run)
    hit = []
    for step, damage in zip(checkpoints(run)[-2:], damages, strict=True):
        folder = run / "checkpoints" / f"step_{step:08d}"
        pattern = "manifest_*" if damage == "no manifest" else "state/**/d/*"
        file = chance.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        (lose if damage == "no manifest" else damage)(file, chance)
        named = "it has no manifest" if damage == "no manifest" else f"{file.relative_to(folder).as_posix()}: expected"
        hit.append((folder.name, named))
    life = zygote.train(config, "--run-dir", run, "--resume")
    assert life.wait() == 0, life.said
    for name, named in hit:
        (line,) = [line for line in life.said.splitlines() if line.startswith(f"passed over: {name} is not used: ")]
        assert named in line
    assert f"resumed from step {HALF} of" in life.said
    assert curve(run) == curve(reference) and outcome(run) == outcome(reference)
    assert checkpoints(run) == checkpoints(reference)
    store = CheckpointStore(run / "checkpoints", CheckpointConfig())
    assert [store.verify(step) for step in checkpoints(run)] == [[]] * len(checkpoints(run))


def test_no_whole_checkpoint_is_an_error_and_nothing_is_thrown_away(tmp_path, reference, config, capsys):
    run = interrupted(reference, tmp_path / "run")
    (run / "checkpoints" / f"step_{HALF:08d}" / "manifest_00000_of_00001.txt").unlink()
    before = contents(run)
    assert main(["train", str(config), "--run-dir", str(run), "--resume", *HERE]) == 1
    out, err = capsys.readouterr()
    assert f"passed over: step_{HALF:08d} is not used: " in out
    assert err == f"dsjax: error: {run}/checkpoints: none of the checkpoints [{HALF}] is whole; see above\n"
    assert contents(run) == before


def test_a_start_that_was_cut_short_is_no_obstacle(tmp_path, zygote, config, reference):
    """Killed after the folder was made and before it was a run."""
    run = tmp_path / "run"
    life = zygote.train(config, "--run-dir", run, die=["/run/config.yaml", 1])
    assert life.wait() == -9
    assert run.is_dir() and not (run / "config.yaml").exists()
    life = zygote.train(config, "--run-dir", run, "--set", "train.steps=2")
    assert life.wait() == 0, life.said
    assert [row["step"] for row in rows(run)] == [1, 2]


@pytest.mark.slow
def test_a_program_cut_short_in_the_cache_is_made_again(tmp_path, zygote, config, reference):
    """JAX would warn at every start from then on, and compile it each time."""
    cache = tmp_path / "cache" / "dsjax" / "xla"
    shutil.copytree(CACHE / "dsjax" / "xla", cache)
    for path in cache.glob("jit_update-*-cache"):
        path.write_bytes(path.read_bytes()[:-100])
    counted, there = [], {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for run in (tmp_path / "first", tmp_path / "second"):
        life = zygote.train(
            config, "--run-dir", run, "--set", "train.steps=2", count=str(tmp_path / "count.json"), environment=there
        )
        assert life.wait() == 0 and "Warning" not in life.said, life.said
        counted.append(json.loads((tmp_path / "count.json").read_text())["cache_misses"])
    assert counted == [1, 0]
