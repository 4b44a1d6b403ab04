"""Peak rates and memory of accelerators, for the planner and for model FLOPs utilisation.

Peaks are dense (NVIDIA's sheets print twice as much for sparse ones), from the vendor's data sheets. Memory is the
sheet's figure in decimal gigabytes; a real device shows a little more or less (an H100 of 80 GB: 79.6 GiB), so ask the
device itself where there is one.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSpec:
    """An accelerator."""

    name: str
    """As `dsjax plan --device` takes it."""
    memory_bytes: int
    """High-bandwidth memory."""
    peak_bf16_tflops: float | None
    """Dense bfloat16 matrix products with float32 sums, in 1e12 FLOP/s; None if it has no bfloat16 units."""
    peak_tf32_tflops: float | None
    """Float32 products rounded to TF32, JAX's default on NVIDIA GPUs; None if it has no TF32 units."""
    peak_f32_tflops: float
    """Float32 without rounding (`jax_default_matmul_precision=highest`)."""
    memory_bandwidth_gb_s: float
    """1e9 bytes per second between memory and chip."""
    kinds: tuple[str, ...]
    """`device_kind` of jax for it."""
    source: str
    """Where the figures are from."""


def _spec(
    name: str,
    gigabytes: int,
    bf16: float | None,
    tf32: float | None,
    f32: float,
    bandwidth: float,
    kinds: tuple[str, ...],
    source: str,
) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        memory_bytes=gigabytes * 10**9,
        peak_bf16_tflops=bf16,
        peak_tf32_tflops=tf32,
        peak_f32_tflops=f32,
        memory_bandwidth_gb_s=bandwidth,
        kinds=kinds,
        source=source,
    )


# fmt: off
SPECS: tuple[DeviceSpec, ...] = (
    #     name      GB   bf16    tf32   f32   GB/s  device_kind
    _spec("b200", 180, 2250.0, 1125.0, 75.0, 8000.0, ("NVIDIA B200",), "NVIDIA DGX B200 datasheet, one of 8"),
    _spec("h200", 141, 989.0, 494.5, 67.0, 4800.0, ("NVIDIA H200",), "NVIDIA H200 datasheet, SXM"),
    _spec("h100-80g", 80, 989.0, 494.5, 67.0, 3350.0, ("NVIDIA H100 80GB HBM3",), "NVIDIA H100 datasheet, SXM"),
    _spec("h100-pcie", 80, 756.0, 378.0, 51.0, 2000.0, ("NVIDIA H100 PCIe",), "NVIDIA H100 datasheet, PCIe"),
    _spec("h100-nvl", 94, 835.0, 417.5, 60.0, 3900.0, ("NVIDIA H100 NVL",), "NVIDIA H100 datasheet, NVL"),
    _spec("a100-40g", 40, 312.0, 156.0, 19.5, 1555.0, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
          "NVIDIA A100 datasheet"),
    _spec("a100-80g", 80, 312.0, 156.0, 19.5, 2039.0, ("NVIDIA A100-SXM4-80GB",), "NVIDIA A100 datasheet, SXM"),
    _spec("a100-80g-pcie", 80, 312.0, 156.0, 19.5, 1935.0, ("NVIDIA A100 80GB PCIe",), "NVIDIA A100 datasheet, PCIe"),
    _spec("l40s", 48, 362.0, 183.0, 91.6, 864.0, ("NVIDIA L40S",), "NVIDIA L40S datasheet"),
    _spec("l4", 24, 121.0, 60.0, 30.3, 300.0, ("NVIDIA L4",), "NVIDIA L4 datasheet"),
    _spec("v100-32g", 32, None, None, 15.7, 900.0, ("Tesla V100-SXM2-32GB",), "NVIDIA V100 datasheet, SXM2"),
    _spec("rtx4090", 24, 165.2, 82.6, 82.6, 1008.0, ("NVIDIA GeForce RTX 4090",), "NVIDIA Ada architecture whitepaper"),
    _spec("rtx3090", 24, 71.0, 35.6, 35.6, 936.0, ("NVIDIA GeForce RTX 3090",), "NVIDIA GA102 architecture whitepaper"),
)
# fmt: on


def lookup(name: str) -> DeviceSpec:
    """The accelerator of that name.

    Raises:
        ValueError: no such name; it says the closest one and all of them.

    Example:
        >>> lookup("h200").memory_bytes
        141000000000
    """
    specs = {spec.name: spec for spec in SPECS}
    if name.lower() in specs:
        return specs[name.lower()]
    close = difflib.get_close_matches(name.lower(), specs, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"unknown device {name!r}{meant} Known: {', '.join(specs)}")


def from_jax_device_kind(kind: str) -> DeviceSpec | None:
    """The accelerator that jax calls `kind` (`jax.devices()[0].device_kind`), None if it is not in the table.

    Only exact names: a MIG slice or another form factor of a known chip has other figures.

    Example:
        >>> from_jax_device_kind("NVIDIA H200").name
        'h200'
        >>> from_jax_device_kind("cpu") is None
        True
    """
    return next((spec for spec in SPECS if kind in spec.kinds), None)
