"""The machine: versions, GPU, clocks. Nothing is set."""

import importlib.metadata
import shutil
import subprocess

import jax
from item import Context, Outcome

from dsjax.observe.environment import versions

OLDEST_JAX = (0, 11, 2)
QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "memory.used", "memory.total", "mig.mode.current", "persistence_mode",
)  # fmt: skip
COMPARED_WITH = ("torch", "transformers", "triton", "pytest")


def look(context: Context) -> Outcome:
    """Versions as a run folder keeps them, the driver's report, and whether JAX sees a GPU."""
    context.note(gpu=driver_report(), others={name: version(name) for name in COMPARED_WITH})
    about = versions()
    context.note(versions=about)
    kind = str(about["device_kind"])
    new_enough = jax.__version_info__[:3] >= OLDEST_JAX
    on_gpu = jax.default_backend() == "gpu"
    return Outcome(ours=f"{kind}, jax {jax.__version__}", passed=new_enough and (on_gpu or context.rehearse))


def driver_report() -> list[dict[str, str]] | str:
    """nvidia-smi's figures, one dict a GPU; its complaint or its absence as text."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no nvidia-smi"
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        return (done.stdout + done.stderr).strip()
    return [dict(zip(QUERY, line.split(", "), strict=False)) for line in done.stdout.splitlines()]


def version(package: str) -> str | None:
    """The version of an installed package, None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
