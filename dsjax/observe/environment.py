"""The environment of a run: packages, Python, machine, devices, and the settings that change what XLA does."""

import importlib.metadata
import os
import platform
import re
import sys

from dsjax.observe.host import memory_pages, processor
from dsjax.observe.memory import available_memory_bytes, device_memory_report, memory_rows

_PACKAGES = (
    "dsjax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "jaxtyping", "tokenizers", "safetensors",
    "pyyaml", "rich", "matplotlib", "ml-dtypes",
)  # fmt: skip
# jax, jaxlib and their CUDA plugins and libraries, whichever are installed.
_PACKAGE_PREFIXES = ("jax", "nvidia-")
_VARIABLES = re.compile(
    r"(JAX|XLA|NCCL|TF_GPU|TPU|DSJAX_KEEP_MEMORY|SLURM_(JOB_ID|NNODES|NTASKS|PROCID)|CUDA_VISIBLE_DEVICES|OMP_NUM)"
)


def versions() -> dict[str, object]:
    """The content of a run folder's versions.json. Starts the JAX backend.

    Returns:
        packages: {name: version}; python, platform: strings; cpu_cores: those this process may use; processor,
        memory_pages: see host.py; backend: what the driver says of itself; device_kind, num_devices, num_processes;
        environment: variables that JAX, XLA and NCCL read, XLA_FLAGS among them.

    Example:
        >>> sorted(versions())[:4]
        ['backend', 'cpu_cores', 'device_kind', 'environment']
    """
    import jax

    device = jax.devices()[0]
    return {
        "packages": _package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": _cpu_cores(),
        "processor": processor(),
        "memory_pages": memory_pages(),
        "backend": f"{device.platform}: {device.client.platform_version}".replace("\n", " "),
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)},
    }


def environment_report() -> dict[str, object]:
    """`versions()` and what is free right now: what a bug report should hold.

    Returns:
        versions() with executable, available_memory_bytes of the host, and device_memory: rows (device, in use, peak,
        limit) as text.
    """
    import jax

    return versions() | {
        "executable": sys.executable,
        "available_memory_bytes": available_memory_bytes(),
        "device_memory": memory_rows(device_memory_report(jax.local_devices())),
    }


def _package_versions() -> dict[str, str]:
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.name.lower().replace("_", "-")
        if name in _PACKAGES or name.startswith(_PACKAGE_PREFIXES):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
