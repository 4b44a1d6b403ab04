"""From MeshConfig to a jax Mesh, and the platform settings that must be made before JAX starts."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from dsjax.mesh.config import AXES, MeshConfig


def resolve_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of every axis, with -1 replaced by the devices that are left.

    Raises:
        ValueError: the product of the sizes is not the number of devices.

    Example:
        >>> resolve_sizes(MeshConfig(data=-1, tensor=2), 8)
        {'data': 4, 'fsdp': 1, 'expert': 1, 'tensor': 2}
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "expert": config.expert, "tensor": config.tensor}
    given = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if -1 in sizes.values():
        if num_devices % given:
            raise ValueError(
                f"mesh {asked}: the {num_devices} devices are not divisible by {given}; "
                f"change a size so that the product divides {num_devices}"
            )
        sizes = {axis: num_devices // given if size == -1 else size for axis, size in sizes.items()}
    elif given != num_devices:
        raise ValueError(
            f"mesh {asked} needs {given} devices, but there are {num_devices}; set one axis to -1 to take the rest, "
            f"or mesh.cpu_devices={given} to try it on virtual CPU devices"
        )
    return sizes


def set_platform(config: MeshConfig, *, num_processes: int = 1) -> None:
    """Choose the platform and the number of virtual CPU devices; must run before the first use of a device.

    Raises:
        ValueError: cpu_devices is not divisible by the number of processes.
    """
    if config.platform == "cpu" or config.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
    elif config.platform == "gpu":
        jax.config.update("jax_platforms", "cuda")
    if config.cpu_devices:
        if config.cpu_devices % num_processes:
            raise ValueError(
                f"mesh.cpu_devices is {config.cpu_devices}, which {num_processes} processes cannot share evenly; "
                f"use a multiple of {num_processes}"
            )
        jax.config.update("jax_num_cpu_devices", config.cpu_devices // num_processes)
        order_cpu_collectives()


def order_cpu_collectives() -> None:
    """Let virtual CPU devices run their collectives in one order; must run before the first use of a device.

    XLA:CPU's default schedule leaves independent collectives unordered in programs that come from the compilation
    cache: one device may wait in one of them and seven in another, without end (measured: on 2 cores within 200 steps,
    in 6 of 6 processes; without this schedule in none of 4, and a third faster). A setting of the user's is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_enable_concurrency_optimized_scheduler" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_enable_concurrency_optimized_scheduler=false".strip()


def make_mesh(config: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices with the axes data, fsdp, expert, tensor (the last varies fastest).

    Raises:
        ValueError: the sizes do not multiply to the number of devices.

    Example:
        >>> make_mesh(MeshConfig(), devices=jax.devices()[:1]).shape["tensor"]
        1
    """
    devices = jax.devices() if devices is None else devices
    sizes = resolve_sizes(config, len(devices))
    # Auto is spelled out: jax.make_mesh's default became Explicit, in which plain layers do not trace.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
