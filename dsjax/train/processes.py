"""Several processes as one program: jax.distributed, told by launch/local.py's environment or found by JAX itself."""

import os

import jax
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
