"""Memory of the host and of the devices: what may still be taken, what has been taken at most."""

import dataclasses
import os
import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

# A cgroup of version 1 without a limit reports the largest multiple of the page size below 2**63.
_UNLIMITED_V1 = 1 << 60


class Device(Protocol):
    """The part of jax.Device that is used here."""

    platform: str
    id: int
    device_kind: str

    def memory_stats(self) -> dict[str, int] | None:
        """Counters of the backend's allocator, None if it keeps none."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device in bytes; None where the backend does not report it, as on CPU."""

    device: str
    in_use: int | None
    peak: int | None
    limit: int | None


def available_memory_bytes(*, root: Path = Path("/")) -> int:
    """Bytes that this process could still take on the host: the least of what the machine and its cgroups leave.

    Counts memory that the kernel can reclaim (page cache) as available. Containers are limited by cgroups (version 2 or
    1), whose limits /proc/meminfo does not show.

    Args:
        root: where /proc and /sys are, for tests.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = 1024 * _field(meminfo, "MemAvailable:")
    return max(0, min([machine, *_cgroup_headrooms(root)]))


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far, in bytes.

    Example:
        >>> peak_host_bytes() > 1_000_000
        True
    """
    # Not getrusage on Linux: its figure is inherited from the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * _field(status, "VmHWM:")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_memory_report(devices: Iterable[Device]) -> list[DeviceMemory]:
    """Memory of each device, a jax.Device of this process, as its backend reports it: GPUs do, CPUs do not."""
    report = []
    for device in devices:
        stats = device.memory_stats() or {}
        report.append(
            DeviceMemory(
                device=f"{device.platform}:{device.id} {device.device_kind}",
                in_use=stats.get("bytes_in_use"),
                peak=stats.get("peak_bytes_in_use"),
                limit=stats.get("bytes_limit"),
            )
        )
    return report


def memory_rows(report: Sequence[DeviceMemory]) -> list[tuple[str, str, str, str]]:
    """Rows (device, in use, peak, limit) for a table.

    Example:
        >>> memory_rows([DeviceMemory("cpu:0 cpu", None, None, None)])
        [('cpu:0 cpu', 'n/a', 'n/a', 'n/a')]
    """
    return [(d.device, format_bytes(d.in_use), format_bytes(d.peak), format_bytes(d.limit)) for d in report]


def format_bytes(size: int | None) -> str:
    """Binary units, three digits; 'n/a' for None.

    Example:
        >>> format_bytes(1536), format_bytes(143771 << 20), format_bytes(None)
        ('1.50 KiB', '140 GiB', 'n/a')
    """
    if size is None:
        return "n/a"
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1024
        units.pop(0)
    digits = 0 if units[0] == "B" or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[0]}"


def _cgroup_headrooms(root: Path) -> list[int]:
    """Bytes below its limit of each cgroup that holds this process."""
    membership = root / "proc/self/cgroup"
    if not membership.exists():
        return []
    headrooms = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names, reclaimable = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names, reclaimable = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
        else:
            continue
        # A limit anywhere above holds too. Inside a container the path may be the host's and not exist; the mount then
        # is the container's own cgroup.
        folder = mount / path.strip("/")
        folders = [folder, *folder.parents]
        for level in folders[: folders.index(mount) + 1]:
            limit, usage = (level / name for name in names)
            if limit.exists() and (text := limit.read_text().strip()) != "max" and int(text) < _UNLIMITED_V1:
                cache = _field(level / "memory.stat", reclaimable) if (level / "memory.stat").exists() else 0
                headrooms.append(int(text) - (int(usage.read_text()) - cache))
    return headrooms


def _field(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        key, *values = line.split()
        if key == name:
            return int(values[0])
    raise ValueError(f"{file} has no {name}")
