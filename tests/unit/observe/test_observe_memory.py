"""Host memory in every kind of container, and honest reports of devices that report nothing."""

import subprocess
import sys
from pathlib import Path

import jax

from dsjax.observe.memory import (
    DeviceMemory,
    available_memory_bytes,
    device_memory_report,
    format_bytes,
    memory_rows,
)

GIB = 1 << 30


def machine(root: Path, available_gib: float, cgroup: str, files: dict[str, str]) -> Path:
    kib = int(available_gib * GIB) // 1024
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {kib} kB\n", "proc/self/cgroup": cgroup} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    root = machine(tmp_path, 6, "0::/user.slice\n", {"sys/fs/cgroup/user.slice/memory.max": "max\n"})
    assert available_memory_bytes(root=root) == 6 * GIB


def test_cgroup_2_limit_of_a_parent_counts_and_its_cache_is_free(tmp_path: Path) -> None:
    above = "sys/fs/cgroup/job"
    files = {
        f"{above}/memory.max": f"{4 * GIB}\n",
        f"{above}/memory.current": f"{3 * GIB}\n",
        f"{above}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        f"{above}/step/memory.max": "max\n",
    }
    root = machine(tmp_path, 6, "0::/job/step\n", files)
    assert available_memory_bytes(root=root) == 2 * GIB


def test_cgroup_2_inside_a_container_sees_only_its_own_root(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": f"{2 * GIB}", "sys/fs/cgroup/memory.current": f"{GIB}"}
    root = machine(tmp_path, 6, "0::/kubepods/pod1/abc\n", files)
    assert available_memory_bytes(root=root) == GIB


def test_cgroup_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/docker/abc"
    files = {
        f"{folder}/memory.limit_in_bytes": f"{3 * GIB}",
        f"{folder}/memory.usage_in_bytes": f"{GIB}",
        f"{folder}/memory.stat": "total_inactive_file 0\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    root = machine(tmp_path, 6, "3:cpu,cpuacct:/x\n2:memory:/docker/abc\n", files)
    assert available_memory_bytes(root=root) == 2 * GIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "10", "sys/fs/cgroup/memory.current": "20"}
    assert available_memory_bytes(root=machine(tmp_path, 6, "0::/\n", files)) == 0


def test_this_machine() -> None:
    assert 0 < available_memory_bytes() < 1 << 50


def test_the_peak_stays_after_the_memory_is_given_back() -> None:
    code = (
        "from dsjax.observe.memory import peak_host_bytes as peak; before = peak(); "
        "block = bytearray(b'x') * (64 << 20); del block; print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 << 20 < int(done.stdout) < 80 << 20


def test_a_cpu_reports_nothing_and_a_gpu_what_its_allocator_says() -> None:
    if jax.default_backend() == "cpu":
        cpu = device_memory_report(jax.devices()[:1])
        assert memory_rows(cpu) == [("cpu:0 cpu", "n/a", "n/a", "n/a")]

    class Gpu:
        platform, id, device_kind = "gpu", 1, "NVIDIA H200"

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": GIB, "peak_bytes_in_use": 2 * GIB, "bytes_limit": 105 * GIB}

    assert device_memory_report([Gpu()]) == [DeviceMemory("gpu:1 NVIDIA H200", GIB, 2 * GIB, 105 * GIB)]


def test_bytes_as_text() -> None:
    sizes = [0, 999, 1000, 1023, 10_240, 12 * GIB, 1023 * GIB, 5000 << 50]
    texts = ["0 B", "999 B", "0.98 KiB", "1.00 KiB", "10.0 KiB", "12.0 GiB", "1.00 TiB", "5000 PiB"]
    assert [format_bytes(size) for size in sizes] == texts
