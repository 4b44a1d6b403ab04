"""The folder of checkpoints: their names, which are kept, and removing one so that no half of it looks whole."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from dsjax.checkpoint.config import CheckpointConfig

_STEP = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"saving_\d+_step_(\d{8,})(\..*)?")  # orbax adds .orbax-checkpoint-tmp until its commit
_TRASH = re.compile(r"trash_\d+_(step|saving)_.*")


def step_folder(directory: Path, step: int) -> Path:
    """Path of the checkpoint of one step.

    Example:
        >>> step_folder(Path("run"), 100).as_posix()
        'run/step_00000100'
    """
    return directory / f"step_{step:08d}"


def unfinished_name(step: int, attempt: int) -> str:
    """Name under which a checkpoint is written until it is whole.

    Example:
        >>> unfinished_name(100, 1)
        'saving_1_step_00000100'
    """
    return f"saving_{attempt}_step_{step:08d}"


def committed(directory: Path) -> list[int]:
    """Steps with a folder of their final name, in order; they may still be damaged or incomplete."""
    return _matching(directory, _STEP)


def unfinished(directory: Path) -> list[int]:
    """Steps whose writing began and did not end, in order."""
    return _matching(directory, _UNFINISHED)


def kept(metrics: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """Which of the good checkpoints stay.

    Args:
        metrics: step -> validation loss (None: not measured) of every good checkpoint.
        config: keep_last, keep_best and keep_every.

    Example:
        >>> losses = {100: 3.0, 200: 1.0, 300: 2.0, 400: None}
        >>> sorted(kept(losses, CheckpointConfig(keep_last=1, keep_best=1)))
        [200, 400]
        >>> sorted(kept(losses, CheckpointConfig(keep_last=1, keep_best=0, keep_every=150)))
        [300, 400]
    """
    newest = sorted(metrics)[-config.keep_last :]
    measured = sorted((metric, -step) for step, metric in metrics.items() if metric is not None)
    best = [-step for _, step in measured[: config.keep_best]]  # of equal losses the newer one
    multiples = [step for step in metrics if config.keep_every and step % config.keep_every == 0]
    return {*newest, *best, *multiples}


def remove(directory: Path, name: str) -> None:
    """Removes one entry of `directory`, under another name first: a removal cut short leaves only rubbish.

    Raises:
        OSError: it cannot be renamed or deleted.
    """
    trash = directory / name
    if not _TRASH.fullmatch(name):
        attempt = 0
        while (trash := directory / f"trash_{attempt}_{name}").exists():
            attempt += 1
        os.rename(directory / name, trash)
    if trash.is_dir():
        shutil.rmtree(trash)
    else:
        trash.unlink()


def remove_rubbish(directory: Path) -> None:
    """Removes unfinished saves and removals that were cut short; for the one process that writes here, between saves.

    Raises:
        OSError: something cannot be removed.
    """
    for name in sorted(os.listdir(directory)):
        if _UNFINISHED.fullmatch(name) or _TRASH.fullmatch(name):
            remove(directory, name)


def _matching(directory: Path, pattern: re.Pattern[str]) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted({int(match[1]) for name in os.listdir(directory) if (match := pattern.fullmatch(name))})
