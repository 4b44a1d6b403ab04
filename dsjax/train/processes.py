"""Several processes as one program: jax.distributed, told by launch/local.py's environment or found by JAX itself."""

import os
from functools import partial

import jax
import numpy as np
from jax.experimental import multihost_utils


def start_processes(*, distributed: bool = False) -> int:
    """Join the other processes, if there are any; before the first use of a device. Returns their number.

    Args:
        distributed: let JAX find the cluster (SLURM, OpenMPI, Kubernetes) by itself.

    Raises:
        ValueError: DSJAX_COORDINATOR is set but the two numbers that go with it are not.
    """
    address = os.environ.get("DSJAX_COORDINATOR")
    if address:
        given = {name: os.environ.get(name, "") for name in ("DSJAX_NUM_PROCESSES", "DSJAX_PROCESS_ID")}
        if not all(value.isdigit() for value in given.values()):
            raise ValueError(f"DSJAX_COORDINATOR is set, so these must be whole numbers: {given}")
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(given["DSJAX_NUM_PROCESSES"]), int(given["DSJAX_PROCESS_ID"]))
    elif distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize()
    return num_processes()


def num_processes() -> int:
    """The number of processes that were joined, without starting a backend."""
    state = jax.distributed.is_initialized()
    return int(os.environ.get("DSJAX_NUM_PROCESSES", "0")) or (jax.process_count() if state else 1)


def barrier(name: str) -> None:
    """Wait for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree_any(flag: bool) -> jax.Array | bool:
    """Whether the flag is up on any process; not waited for, so reading it a step later costs nothing."""
    if jax.process_count() == 1:
        return flag
    mesh = jax.sharding.Mesh(jax.devices(), "device")
    flags = jax.make_array_from_callback(
        (jax.device_count(),),
        jax.sharding.NamedSharding(mesh, jax.P("device")),
        lambda _: np.full(1, flag),
    )
    return _any(flags, mesh)


@partial(jax.jit, static_argnames="mesh")
def _any(flags: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(flags.any(), jax.sharding.NamedSharding(mesh, jax.P()))


def from_first(text: str) -> str:
    """The first process' text, on every process."""
    if jax.process_count() == 1:
        return text
    padded = np.zeros(4096, np.uint8)
    encoded = np.frombuffer(text.encode(), np.uint8)
    padded[: len(encoded)] = encoded
    return bytes(multihost_utils.broadcast_one_to_all(padded)).rstrip(b"\0").decode()


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second start compiles nothing; unless the user set a place."""
    if jax.config.jax_compilation_cache_dir is None:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(root), "dsjax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
