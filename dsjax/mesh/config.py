"""Settings of the devices: their number, and the axes along which the work is split."""

import dataclasses
from typing import Literal

AXES = ("data", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """Sizes of the mesh axes; their product must be the number of devices.

    Raises:
        ValueError: a size below 1 other than -1, more than one -1.

    Example:
        >>> MeshConfig(data=2, fsdp=2, tensor=2, cpu_devices=8).tensor
        2
    """

    data: int = -1
    """Replicas of the model; -1 takes the devices that the other axes leave."""
    fsdp: int = 1
    """Devices over which a replica's rows, and with zero_stage its states, are split (ZeRO)."""
    expert: int = 1
    """Devices over which experts are split; for dense tensors a second fsdp axis."""
    tensor: int = 1
    """Devices over which each matrix product is split."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """State split over fsdp: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to run; auto takes a GPU when JAX sees one."""
    cpu_devices: int = 0
    """Virtual CPU devices over all processes; 0 keeps what the machine has."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if bad := {axis: size for axis, size in sizes.items() if size < 1 and size != -1}:
            raise ValueError(f"axis sizes must be at least 1, or -1 for 'the rest'; got {bad}")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"only one axis may be -1 ('the rest'); got {sizes}")
        if self.cpu_devices < 0:
            raise ValueError(f"cpu_devices must be 0 (keep) or more; got {self.cpu_devices}")
        if self.cpu_devices and self.platform == "gpu":
            raise ValueError("cpu_devices needs platform: cpu or auto; platform is gpu")
