"""`dsjax plan`: tables, JSON, the verdict, and what it says of a config that cannot be."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[3] / "configs"
BLOOM = str(CONFIGS / "run/bloom-176b.yaml")


def dsjax_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Not in this process: the command chooses the platform, and compiling the number of devices.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-m", "dsjax", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture(scope="module")
def bloom():
    start = time.monotonic()
    done = dsjax_plan(BLOOM, "--json", "--device", "h200", "--compile")
    return done, time.monotonic() - start


@pytest.mark.slow  # test_plan_memory.py and test_plan_traffic.py compare small runs with what was compiled
def test_bloom_176b_compiles_on_384_devices(bloom):
    done, seconds = bloom
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["num_parameters"] == 176_247_271_424
    assert found["axis_sizes"] == {"data": 6, "fsdp": 16, "expert": 1, "tensor": 4}
    # 176.2 G parameters of 4 bytes over 64 shards.
    assert found["memory"]["parameters"] == pytest.approx(found["num_parameters"] / 16, rel=1e-3)
    compiled = found["compiled"]
    assert found["update"]["arguments"] == pytest.approx(compiled["update"]["arguments"], rel=0.02)
    data = [row["bytes"] for row in found["traffic"] if row["axis"] == "data"]
    assert data == [compiled["gradient"]["axes"]["data"] + compiled["update"]["axes"]["data"]]
    # A figure of the machine, generous; on two idle cores it is 12.
    assert seconds < 120


def test_table_and_verdict():
    done = dsjax_plan(BLOOM, "--device", "a100-40g")
    assert done.returncode == 1 and max(map(len, done.stdout.splitlines())) <= 100
    assert "does NOT fit" in done.stdout and "a100-40g" in done.stdout and "optimizer" in done.stdout


def test_shardings_on_a_mesh_that_does_not_exist():
    """The largest tensor of BLOOM-176B's state: 56 layers' kernels of the MLP over tensor 4 x fsdp 16."""
    done = dsjax_plan(BLOOM, "--shardings")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and max(map(len, lines)) <= 100, done.stderr
    largest = next(line for line in lines if "/mlp/" in line)
    assert "14336x57344" in done.stdout.replace("\n", "") or "57344x14336" in done.stdout.replace("\n", "")
    assert "tensor" in largest and "fsdp" in largest and "fits on" in done.stdout


def test_shardings_as_json():
    """One entry a tensor of the state; together they are what the plan says of parameters and optimizer."""
    found = json.loads(dsjax_plan(CONFIGS / "run" / "quickstart.yaml", "--shardings", "--json").stdout)
    of = lambda name: sum(row["bytes_per_device"] for row in found["shardings"] if row["name"].split("/")[0] == name)
    assert of("params") == found["memory"]["parameters"] and of("opt_state") == found["memory"]["optimizer"]


def test_everything_that_does_not_divide_is_said_at_once():
    done = dsjax_plan(BLOOM, "--set", "mesh.tensor=3", "--set", "mesh.data=7")
    assert done.returncode == 2 and not done.stdout
    assert "model.num_heads = 112" in done.stderr and "nearest sizes that divide the model are 1, 2, 4" in done.stderr
    assert "train.batch_size = 2016" in done.stderr and "2352" in done.stderr


def test_a_mesh_without_a_size_asks_for_the_devices():
    done = dsjax_plan(str(CONFIGS / "run/gpt2-124m.yaml"), "--set", "mesh.data=-1")
    assert done.returncode == 2 and "--devices N" in done.stderr


def test_an_unknown_device_is_answered_with_the_known():
    done = dsjax_plan(BLOOM, "--device", "h201")
    assert done.returncode == 2 and "did you mean h200" in done.stderr
