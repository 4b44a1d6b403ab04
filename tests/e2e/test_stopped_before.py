"""Runs that an older dsjax stopped half way are gone on with by this one, and end where they would have ended.

tests/golden/made_before/stopped is what commit 520233e left behind: see tests/golden/record/record_stopped.py.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsjax.cli.main import main

GOLDEN = Path(__file__).parents[1] / "golden" / "made_before" / "stopped"
HALF, STEPS = 6, 12
KEYS = slice(8, 16)  # of GPT-2's queries, keys and values of width 8


@pytest.mark.parametrize("name", ["adamw", pytest.param("onebit_lamb", marks=pytest.mark.slow), "lora"])
def test_a_run_stopped_by_older_code_ends_where_it_would_have(name, tmp_path, monkeypatch, capsys):
    shutil.copytree(GOLDEN, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    run = Path(name, "run")
    with tarfile.open(Path(name, "run.tar.xz")) as tar:
        tar.extractall(name, filter="data")
    here = ["--set", "mesh.cpu_devices=0"]  # in pytest's own process the devices are there already
    assert main(["train", str(run / "config.yaml"), "--run-dir", str(run), "--resume", "--force", *here]) == 0
    said = capsys.readouterr()
    assert f"resumed from step {HALF} of {run}" in said.out and "begin at zero" not in said.out

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    whole = json.loads(Path(name, "whole.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # Machine code is not optimised here, and processors differ: sums in another order, of which float32 keeps seven
    # digits. Six steps later that had become 2e-7 of a loss, of a norm, and of a tensor's largest value.
    for metric in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[metric] for row in rows], whole[metric], rtol=1e-6)

    assert main(["convert", str(run), "again", *(["--adapter"] if name == "lora" else [])]) == 0
    (file,) = Path(name, "model").glob("*.safetensors")
    wanted, found = load_file(file), load_file(Path("again", file.name))
    assert found.keys() == wanted.keys()
    for tensor, value in wanted.items():
        if tensor.endswith("c_attn.bias"):  # scores do not depend on a bias of keys: its gradient is rounding alone
            found[tensor][KEYS] = value[KEYS] = 0
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=tensor)
