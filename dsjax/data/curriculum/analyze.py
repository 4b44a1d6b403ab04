"""The difficulty of every training row, measured once and kept: an index for each metric.

    <cache>/difficulty/<hash>/values.npy       int64 [N], rows in the order of `dsjax.data.rows.mixture.Rows`
    <cache>/difficulty/<hash>/manifest.json    what was measured, and the hash of values.npy
    <cache>/difficulty/<hash>.partial/         blocks of rows, each under its name when complete

The hash is of the corpus, of what decides its rows and of the metric, a user's own function's code with it. A killed
measurement goes on with the blocks that are missing; the folder is renamed into place in one step. Of several processes
that want the same index one builds it and the others wait for it.

Threads, not processes: a process that has started JAX must not be forked, and what reads and sums rows is numpy.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dsjax.checkpoint.manifest import read_json
from dsjax.data.config import CurriculumConfig, DataConfig
from dsjax.data.corpus.build import Corpus
from dsjax.data.corpus.lock import full_disk_as_message, locked
from dsjax.data.corpus.progress import ByteProgress, in_threads
from dsjax.data.curriculum.metrics import Metric, WrongValue, code_of, metric_of
from dsjax.data.rows.formats import task_of
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.pack import VERSION as PACK_VERSION

_FORMAT = 1
_MANIFEST, _VALUES = "manifest.json", "values.npy"
_BLOCK_POSITIONS, _READ_POSITIONS = 1 << 22, 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The difficulty of every training row by some metrics."""

    values: dict[str, Int64[np.ndarray, " N"]]
    """By each metric, of each row."""
    folders: dict[str, Path]
    """Folder of each of them."""


def metrics_of(config: CurriculumConfig) -> tuple[str, ...]:
    """The metrics that a curriculum needs an index of.

    Example:
        >>> metrics_of(CurriculumConfig(cut_to_longest=True))
        ('length',)
    """
    named = [one.metric for one in config.difficulty]
    return tuple(dict.fromkeys(named + (["length"] if config.cut_to_longest else [])))


def open_index(
    corpus: Corpus,
    rows: Rows,
    *,
    config: DataConfig,
    metrics: Sequence[str],
    progress: bool = False,
    workers: int | None = None,
) -> Index:
    """Open the difficulties of the training rows; they are measured if that was not done before.

    Args:
        corpus: the data.
        rows: its training rows.
        config: by which they were packed.
        metrics: names, see `dsjax.data.curriculum.metrics`.
        progress: show a bar or lines on stderr.
        workers: threads that measure; None takes the number of CPUs.

    Raises:
        ValueError: no such metric, a function of the user's own that gives no whole number, an index that is damaged
            or of other data, a full disk.

    Example:
        >>> import tempfile
        >>> from dsjax.data.corpus.build import build_corpus
        >>> from dsjax.data.config import ByteTokenizer, TextSource
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("abc"), Path(folder, "b.txt").write_text("abcde")
        ...     config = DataConfig(sources=(TextSource(path=folder),), tokenizer=ByteTokenizer(), sequence_length=8,
        ...                         pack="none", validation_fraction=0, cache_dir=folder + "/cache")
        ...     corpus = build_corpus(config)
        ...     rows = Rows.of(corpus, config, split="train")
        ...     open_index(corpus, rows, config=config, metrics=["length"]).values["length"].tolist()
        [3, 5]
    """
    values, folders = {}, {}
    for metric in dict.fromkeys(metrics):
        about = _about(corpus, rows, config, metric)
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        folder = corpus.cache_dir / "difficulty" / key[:32]
        partial = folder.with_name(folder.name + ".partial")
        while not folder.is_dir():
            with locked(partial, progress=progress) as held:
                if held:
                    if not folder.is_dir():
                        with full_disk_as_message(folder):
                            measure = metric_of(
                                metric,
                                corpus.train,
                                vocab_size=corpus.tokenizer.vocab_size,
                                sequence_length=rows.sequence_length,
                            )
                            _measure(rows, metric, measure, partial, progress, workers or os.cpu_count() or 1)
                            _finish(folder, partial, about, key)
                    shutil.rmtree(partial, ignore_errors=True)
        values[metric], folders[metric] = _opened(folder, key, rows.num_rows), folder
    return Index(values=values, folders=folders)


def _about(corpus: Corpus, rows: Rows, config: DataConfig, metric: str) -> dict[str, Any]:
    """All that decides the values."""
    return {
        "format": _FORMAT,
        "corpus": corpus.hash,
        "stores": [store.hash for store in corpus.train],
        "pack": [config.pack, PACK_VERSION, config.isolate_documents, config.sequence_length],
        "task": task_of(config),
        "num_rows": rows.num_rows,
        "metric": metric,
        "code": code_of(metric),
    }


def _measure(rows: Rows, name: str, metric: Metric, partial: Path, progress: bool, workers: int) -> None:
    """Write the blocks that are missing."""
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    length, per_block = rows.sequence_length, max(1, _BLOCK_POSITIONS // rows.sequence_length)
    sizes = {begin: min(per_block, rows.num_rows - begin) for begin in range(0, rows.num_rows, per_block)}
    missing = [begin for begin, size in sizes.items() if not _is_whole(_block_path(partial, begin), size)]

    def measure(begin: int) -> int:
        _write_block(rows, metric, _block_path(partial, begin), begin, sizes[begin])
        return sizes[begin] * length

    with ByteProgress(f"measuring {name}", total=rows.num_rows * length, enabled=progress, unit="M tokens") as bar:
        bar.advance((rows.num_rows - sum(sizes[begin] for begin in missing)) * length)
        in_threads(measure, missing, workers=workers, bar=bar)


def _block_path(partial: Path, begin: int) -> Path:
    return partial / f"rows-{begin:012d}.npy"


def _is_whole(path: Path, size: int) -> bool:
    """Whether a block is there, of the right size; a kill cannot leave another one, a copied folder could."""
    try:
        block = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return block.shape == (size,) and block.dtype == np.int64


def _write_block(rows: Rows, metric: Metric, path: Path, begin: int, size: int) -> None:
    """Measure some rows into a file that appears when it is complete."""
    per_read = max(1, _READ_POSITIONS // rows.sequence_length)
    values = np.empty(size, np.int64)
    for start in range(0, size, per_read):
        numbers = begin + np.arange(start, min(size, start + per_read))
        try:
            values[start : start + per_read] = metric(*rows.plain(numbers))
        except WrongValue as error:
            row = numbers[error.place or 0]
            which = f"row {row}" if error.place is not None else f"rows {numbers[0]} to {numbers[-1]}"
            raise ValueError(f"{which} of {rows.num_rows}: {error}") from error
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _finish(folder: Path, partial: Path, about: dict[str, Any], key: str) -> None:
    """Join the blocks into the index and put it in its place."""
    joined = partial / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    values = np.concatenate([np.load(path, allow_pickle=False) for path in sorted(partial.glob("rows-*.npy"))])
    assert len(values) == about["num_rows"], "a block is missing"
    with (joined / _VALUES).open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    manifest = {"key": key, **about, "sha256": hashlib.sha256((joined / _VALUES).read_bytes()).hexdigest()}
    with (joined / _MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    joined.rename(folder)


def _opened(folder: Path, key: str, num_rows: int) -> np.ndarray:
    try:
        manifest = read_json(folder / _MANIFEST)
        found, digest = manifest["key"], manifest["sha256"]
        values = np.load(folder / _VALUES, allow_pickle=False)
        whole = hashlib.sha256((folder / _VALUES).read_bytes()).hexdigest() == digest
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"the index {folder} is damaged: remove it, it will be built again") from error
    if found != key:
        raise ValueError(f"{folder} is an index of other data, settings or code: remove it, it will be built again")
    if not whole or values.shape != (num_rows,):
        raise ValueError(f"the index {folder} is damaged: remove it, it will be built again")
    return values
