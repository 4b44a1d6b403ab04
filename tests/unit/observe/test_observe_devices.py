"""The table of accelerators, the FLOPs formula, traces and the environment."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsjax.observe.devices import SPECS, from_jax_device_kind, lookup
from dsjax.observe.environment import environment_report, versions
from dsjax.observe.flops import mfu, model_flops_per_token
from dsjax.observe.profile import TraceWindow


def test_the_table_is_consistent() -> None:
    names = [spec.name for spec in SPECS]
    kinds = [kind for spec in SPECS for kind in spec.kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)
    for spec in SPECS:
        assert lookup(spec.name) is spec
        assert all(from_jax_device_kind(kind) is spec for kind in spec.kinds)
        assert spec.source
        if spec.peak_bf16_tflops is not None and spec.peak_tf32_tflops is not None:
            # bfloat16 units do twice the products of TF32 ones on every generation
            assert spec.peak_bf16_tflops == pytest.approx(2 * spec.peak_tf32_tflops, rel=0.02)
            assert spec.peak_f32_tflops <= 1.6 * spec.peak_tf32_tflops


def test_lookup_helps() -> None:
    assert lookup("H200").peak_bf16_tflops == 989.0
    with pytest.raises(ValueError, match=r"'a100-80'; did you mean a100-80g\? Known: b200, h200"):
        lookup("a100-80")
    with pytest.raises(ValueError, match="'toaster' Known: "):
        lookup("toaster")
    assert from_jax_device_kind("NVIDIA H200 MIG 1g.18gb") is None


def test_flops_of_a_small_decoder_counted_by_xla() -> None:
    """One layer of attention scores and values plus matrices, forward and backward, as XLA counts the products."""
    T, D, F, V = 64, 32, 128, 256
    shapes = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, F), "down": (F, D), "head": (D, V)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def loss(params, x):
        q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
        x = (q @ k.T) @ v @ params["out"]
        return ((x @ params["up"]) @ params["down"] @ params["head"]).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, jnp.ones((T, D)))
    counted = gradient.cost_analysis()
    assert counted is not None
    num_parameters = sum(rows * columns for rows, columns in shapes.values())
    formula = T * model_flops_per_token(num_parameters, num_layers=1, model_dim=D, sequence_length=T)
    # XLA adds the sum and a few broadcasts
    assert counted["flops"] == pytest.approx(formula, rel=0.03)
    causal = model_flops_per_token(num_parameters, num_layers=1, model_dim=D, sequence_length=T, causal=True)
    assert formula / T - causal == 6 * D * T


def test_mfu() -> None:
    # 55% of four devices
    assert mfu(0.55 * 4 * 989e12 / 7e9, 7e9, peak_flops=989e12, num_devices=4) == pytest.approx(0.55)
    with pytest.raises(ValueError, match="must be positive"):
        mfu(1.0, 1.0, peak_flops=0.0)


@pytest.mark.parametrize(("spec", "first"), [("3:5", 1), ("1:4", 3)], ids=["inside", "resumed_inside"])
def test_a_trace_of_the_window(tmp_path: Path, monkeypatch, spec: str, first: int) -> None:
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(f"start {Path(folder).name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    window = TraceWindow(spec, tmp_path / "trace")
    for step in range(first, 8):
        window.step(step, pending=jnp.ones(2))
        calls.append(str(step))
    window.close()
    window.close()
    expected = "1 2 start trace 3 4 stop 5 6 7" if first == 1 else "start trace 3 stop 4 5 6 7"
    assert " ".join(calls) == expected


def test_a_run_that_ends_inside_the_window_closes_the_trace(tmp_path: Path) -> None:
    window = TraceWindow("1:100", tmp_path / "trace")
    window.step(1)
    window.close(pending={"loss": jnp.sin(jnp.ones(4))})
    assert any(file.name.endswith(".xplane.pb") for file in (tmp_path / "trace").rglob("*"))


@pytest.mark.parametrize("spec", ["3", "5:3", "3:3", "a:b", "-1:4", ":"])
def test_a_bad_window_is_refused(tmp_path: Path, spec: str) -> None:
    with pytest.raises(ValueError, match="profile must be START:STOP"):
        TraceWindow(spec, tmp_path)


def test_the_environment_is_json_and_complete(monkeypatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = json.loads(json.dumps(versions()))
    assert found["packages"]["jax"] == jax.__version__
    assert {"dsjax", "flax", "jaxlib", "numpy", "optax"} <= set(found["packages"])
    assert found["device_kind"] == jax.devices()[0].device_kind and found["num_devices"] == jax.device_count()
    assert found["environment"]["JAX_TRACEBACK_FILTERING"] == "off" and "XLA_FLAGS" in found["environment"]
    assert "HF_TOKEN" not in found["environment"]
    report = json.loads(json.dumps(environment_report()))
    assert found.keys() < report.keys() and report["available_memory_bytes"] > 0
    assert len(report["device_memory"]) == jax.local_device_count()


def test_planning_tools_do_not_import_jax() -> None:
    names = "devices flops memory trackers progress plots profile environment"
    imports = "; ".join(f"import dsjax.observe.{name}" for name in names.split())
    code = f"import sys, dsjax.collectives.hlo; {imports}; print({{'jax', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
