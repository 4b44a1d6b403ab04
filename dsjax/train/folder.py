"""A run's folder: what was asked, with what it ran, what came of it. Nothing in it is ever overwritten by another run.

config.yaml     the resolved config          versions.json   packages, devices, flags
data.json       hash and size of the data    tokenizer/      what the tokens mean
metrics.jsonl   one row a step               loss.png        its picture
checkpoints/    see checkpoint/store.py      summary.json    the outcome, each figure with how it was obtained
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What may differ when a run is resumed: where and how it runs, how long, and what is looked at meanwhile.
RESUMABLE = (
    "name",
    "mesh.",
    "checkpoint.",
    "observe.",
    "evaluate.",
    "sample.",
    "train.steps",
    "train.tokens",
    "train.accumulation",
    "train.max_nonfinite_steps",
    "model.remat",
    "model.segments",
    "data.cache_dir",
    "data.read_threads",
    "data.prefetch",
)


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.txt"); write_atomically(path, "whole"); path.read_text()
        'whole'
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    os.replace(part, path)


def new_folder(root: Path, name: str) -> Path:
    """The first free one of root/name, root/name-2, root/name-3 ...; not made yet."""
    candidate, number = root / name, 2
    while candidate.exists():
        candidate, number = root / f"{name}-{number}", number + 1
    return candidate


def newest_folder(root: Path, name: str) -> Path | None:
    """The last that `new_folder` gave, if any."""
    newest, number = None, 2
    candidate = root / name
    while candidate.exists():
        newest, candidate, number = candidate, root / f"{name}-{number}", number + 1
    return newest


def refuse_changes(folder: Path, differences: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Lines naming what differs, harmlessly, from the folder's config.

    Raises:
        ValueError: something differs that would make the resumed run another run.
    """
    harmless, harmful = [], []
    for path, before, now in differences:
        line = f"{path}: {before!r} -> {now!r}"
        (harmless if path.startswith(RESUMABLE) else harmful).append(line)
    if harmful:
        raise ValueError(
            f"{folder} holds a run with another config; these may not change on --resume:\n  "
            + "\n  ".join(harmful)
            + "\nset them back, or start a new run with another --run-dir"
        )
    return harmless


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the run folder."""
    return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")
