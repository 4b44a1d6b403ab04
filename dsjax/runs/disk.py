"""Whether what a run will write can be written, asked before its first step: permissions, room for checkpoints."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.mesh.processes import from_first
from dsjax.observe.memory import format_bytes

# A checkpoint may be smaller than its tensors: it is compressed, and moments of tokens that never came are zero.
_LEAST_SHARE = 0.5


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there.

    Example:
        >>> existing(Path("/nowhere/at/all")) == Path("/")
        True
    """
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def unwritable(path: Path) -> str:
    """Why nothing can be written to a folder that need not be there yet; '' if something can."""
    places = [existing(path), *(path / name for name in ("checkpoints", "metrics.jsonl") if (path / name).exists())]
    if not places[0].is_dir():
        return f"{places[0]} is not a folder"
    # Of a folder also the right to enter it; a file system that is mounted for reading only gives neither to anyone.
    closed = [p for p in places if not os.access(p, os.W_OK | (os.X_OK if p.is_dir() else 0))]
    return f"no permission to write to {closed[0]}" if closed else ""


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors of a tree of shapes, on all devices together: about the size of a checkpoint of it.

    Example:
        >>> tensor_bytes({"w": jax.ShapeDtypeStruct((3, 5), "float32")})
        60
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def checkpoints_at_once(config: CheckpointConfig, num_steps: int) -> int:
    """Most checkpoints that lie on the disk at a time, the one that is being written among them.

    Example:
        >>> checkpoints_at_once(CheckpointConfig(every=100), 1000), checkpoints_at_once(CheckpointConfig(every=0), 1000)
        (4, 1)
    """
    saves = -(-num_steps // config.every) if config.every else 1
    for_good = num_steps // math.lcm(config.keep_every, config.every) if config.keep_every and config.every else 0
    return min(saves, config.keep_last + config.keep_best + for_good + 1)


def disk_problem(path: Path, size: int, count: int) -> tuple[str, bool]:
    """Whether there is room for checkpoints.

    Args:
        path: the run folder, which need not be there yet.
        size: bytes of a checkpoint.
        count: how many lie there at a time.

    Returns:
        What is wrong, '' if nothing is; and whether not even one checkpoint has room.
    """
    place = existing(path)
    usage = shutil.disk_usage(place)
    if usage.free >= size * count or not usage.total:  # some network file systems do not know
        return "", False
    needed = f"{count} checkpoints of {format_bytes(size)}" if count > 1 else f"a checkpoint of {format_bytes(size)}"
    problem = (
        f"{needed} may lie in {path} at a time, but {place} has {format_bytes(usage.free)} free: make room, keep fewer "
        "(checkpoint.keep_last, keep_best, keep_every), or give another --run-dir"
    )
    return problem, usage.free < _LEAST_SHARE * size


def check_disk(
    path: Path,
    config: CheckpointConfig,
    shapes: Any,
    num_steps: int,
    report: Callable[[str], None],
    *,
    resumed: bool,
    force: bool,
) -> None:
    """Warn where a run's checkpoints may not have room; all processes call it.

    Args:
        path: the run folder, which need not be there yet.
        config: what is kept.
        shapes: tree of what a checkpoint holds.
        num_steps: of the run.
        report: told of the warning.
        resumed: the folder holds the run already.
        force: refuse nothing.

    Raises:
        ValueError: a new run, of which not even one checkpoint has room.
    """
    count = 1 if resumed else checkpoints_at_once(config, num_steps)  # a resumed run's lie there already
    problem, hopeless = disk_problem(path, tensor_bytes(shapes), count)
    refused = hopeless and not resumed and not force
    if message := from_first(problem if refused else ""):
        raise ValueError(f"{message}; or run all the same with --force")
    if problem:
        report(f"warning: {problem}")
