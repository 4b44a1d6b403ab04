"""Two real processes save and verify together; one process reads what they wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_process import VALUE

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = Path(__file__).with_name("checkpoint_process.py")
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(tmp_path / "checkpoints"), address, str(process), "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"XLA_FLAGS": ""},
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)

    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    assert store.latest_good(pytest.fail) == 5 and store.steps() == [3, 5]
    newest = store.directory / "step_00000005"
    parts = sorted(newest.glob("manifest_*"))
    assert [part.name for part in parts] == ["manifest_00000_of_00002.txt", "manifest_00001_of_00002.txt"]
    assert all(len(part.read_text().splitlines()) > 2 for part in parts)
    assert json.loads((newest / "clocks.json").read_text())["clocks"] == {"step": 5}
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {name: jax.ShapeDtypeStruct(VALUE.shape, np.float32, sharding=one) for name in ("rows", "columns")}
    restored = store.restore(3, abstract | {"step": jax.ShapeDtypeStruct((), np.int32, sharding=one)})
    for name in ("rows", "columns"):
        np.testing.assert_array_equal(restored[name], VALUE + 2)
    assert restored["step"] == 2

    parts[1].unlink()
    told = []
    assert store.latest_good(told.append) == 3
    assert "manifest_00001_of_00002.txt: expected 2 parts, this is missing" in told[0]
