"""Several processes as one program: jax.distributed, by the environment that launch/local.py sets, or found by JAX."""

import contextlib
import importlib.util
import os
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils


def start_processes(*, distributed: bool = False) -> int:
    """Join the other processes, if there are any; before the first use of a device. Returns their number.

    Args:
        distributed: let JAX find the cluster (SLURM, OpenMPI, Kubernetes) by itself.

    Raises:
        ValueError: DSJAX_COORDINATOR is set but the two numbers that go with it are not; there is no cluster.
    """
    address = os.environ.get("DSJAX_COORDINATOR")
    if address:
        given = _given_numbers()
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(given["DSJAX_NUM_PROCESSES"]), int(given["DSJAX_PROCESS_ID"]))
    elif distributed:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"JAX finds no cluster (SLURM, OpenMPI, Kubernetes) here: {error} Leave --distributed out for one "
                "process; several on one machine are started by launch/local.py"
            ) from error
    return num_processes()


def num_processes() -> int:
    """The number of processes that were joined, without starting a backend."""
    if os.environ.get("DSJAX_COORDINATOR"):
        return int(_given_numbers()["DSJAX_NUM_PROCESSES"])
    return jax.process_count() if jax.distributed.is_initialized() else 1


def _given_numbers() -> dict[str, str]:
    given = {name: os.environ.get(name, "") for name in ("DSJAX_NUM_PROCESSES", "DSJAX_PROCESS_ID")}
    if not all(value.isdigit() for value in given.values()):
        raise ValueError(f"DSJAX_COORDINATOR is set, so these must be whole numbers: {given}")
    return given


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
    """Keep compiled programs on disk, so that a second start compiles nothing; unless the user set a place.

    With several processes JAX keeps those of the first only; on CPU the others compile at every start.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dsjax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            mend_compilation_cache(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def mend_compilation_cache(folder: Path) -> None:
    """Remove programs that a killed process has written in part.

    JAX would warn of them at every start, and compile again. Only files that are new since the last time are looked at.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "whole-cache").write_bytes(zlib.compress(b"program"))
        >>> _ = (folder / "cut-cache").write_bytes(zlib.compress(b"program")[:-1])
        >>> mend_compilation_cache(folder); sorted(path.name for path in folder.glob("*-cache"))
        ['whole-cache']
    """
    stamp = folder / "looked_at"
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    now = time.time()
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if path.stat().st_mtime >= since - 1 and not _is_whole(path.read_bytes()):
                path.unlink()
    stamp.touch()
    os.utime(stamp, (now, now))


def _is_whole(program: bytes) -> bool:
    """Whether compressed bytes go on to their end. JAX takes Zstandard where there is one, else zlib."""
    if program.startswith(b"\x28\xb5\x2f\xfd"):
        if sys.version_info >= (3, 14):
            from compression import zstd  # pyright: ignore[reportMissingImports]

            decompressor, error = zstd.ZstdDecompressor(), zstd.ZstdError
        elif importlib.util.find_spec("zstandard") is not None:
            import zstandard  # pyright: ignore[reportMissingImports]

            decompressor, error = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
        else:
            return True  # JAX cannot read it either, and makes another
    else:
        decompressor, error = zlib.decompressobj(), zlib.error
    try:
        decompressor.decompress(program)
    except error:
        return False
    return decompressor.eof
