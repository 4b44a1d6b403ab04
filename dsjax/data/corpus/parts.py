"""Parts of the sources, each read, tokenised and written to files of its own.

Threads, not processes: the `tokenizers` library works outside Python's lock. Measured on 12 MB of Python source and 2
cores: 1.6 s with 2 threads (the library's own threads off), 1.9 s with those on, 1.9 s with 2 spawned processes; and
threads are safe in a process that has started JAX and need no importable main module.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsjax.data.config import DataTask, TokenizerConfig
from dsjax.data.corpus.encode import encode_documents
from dsjax.data.corpus.progress import ByteProgress, in_threads
from dsjax.data.rows.labels import encode_labelled
from dsjax.data.text.document import Document, Undecodable
from dsjax.data.text.read import read_part
from dsjax.data.text.skipped import Tally
from dsjax.data.text.source import Part, Source
from dsjax.data.tokenizers.tokenizer import Tokenizer

Role = Literal["split", "train", "validation"]
_PIECE_CHARACTERS = 1 << 24  # of a part that are held at once; only a compressed file makes more than one piece


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """A listed source and the split its documents go to; `split` divides them by hash."""

    source: Source
    role: Role


@dataclasses.dataclass(frozen=True)
class BuildPlan:
    """Everything that `build_folder` needs; `tokenizer` is a config when a BPE is to be trained first."""

    key: str
    sources: list[PlannedSource]
    tokenizer: Tokenizer | TokenizerConfig
    validation_fraction: float
    undecodable: Undecodable
    cache_dir: Path
    folder: Path
    report: Callable[[str], None]
    """Told what was left out."""
    task: DataTask = "language_model"
    length: int = 0
    """Tokens of a row, of the task classification."""


def digest_of(document: Document) -> int:
    """Hash a document's text, by which it is sampled and goes to a split."""
    return int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), "little")


def is_validation(plan: BuildPlan, source: int, digest: int) -> bool:
    """Whether a document of a source goes to validation."""
    role = plan.sources[source].role
    return role == "validation" or (role == "split" and digest < plan.validation_fraction * 2**64)


def tokenize_parts(
    plan: BuildPlan,
    work: Path,
    parts: list[tuple[int, Part]],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    *,
    progress: bool,
    workers: int,
) -> None:
    """Tokenise the parts that have no file in `work` yet, in threads.

    Args:
        plan: the corpus.
        work: folder of the parts' files.
        parts: number of its source and the part, for each.
        tokenizer: makes the ids.
        dtype: of the ids.
        progress: show a bar or lines on stderr.
        workers: threads.

    Raises:
        ValueError: text that cannot be read; names its place.
    """
    missing = [number for number in range(len(parts)) if not part_path(work, number).exists()]
    total = sum(part.num_bytes for _, part in parts)
    done = total - sum(parts[number][1].num_bytes for number in missing)

    def tokenize(number: int) -> int:
        index, part = parts[number]
        _write_part(plan, index, part, part_path(work, number), tokenizer, dtype)
        return part.num_bytes

    with ByteProgress("tokenising", total=total, enabled=progress) as bar, _library_threads_off():
        bar.advance(done)
        in_threads(tokenize, missing, workers=workers, bar=bar)


@contextlib.contextmanager
def _library_threads_off() -> Iterator[None]:
    """Our threads take whole parts; with the library's threads as well, each part would wait for the others."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def part_path(work: Path, number: int) -> Path:
    """Name the file of a part, which is there when the part is complete."""
    return work / f"part-{number:06d}.npz"


def pieces_of(path: Path) -> list[Path]:
    """List the files of a part that is complete, in order."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.*.npz"))]


def _write_part(plan: BuildPlan, index: int, part: Part, path: Path, tokenizer: Tokenizer, dtype: np.dtype) -> None:
    """Tokenise one part, a piece at a time; the first piece's file appears last, when the part is complete."""
    tally = Tally()
    batches = _batches(read_part(part, undecodable=plan.undecodable, tally=tally))
    first = next(batches, [])
    for number, documents in enumerate(batches, 1):
        _write_piece(plan, index, documents, path.with_name(f"{path.stem}.{number:06d}.npz"), tokenizer, dtype)
    _write_piece(plan, index, first, path, tokenizer, dtype, {"tally": np.array(dataclasses.astuple(tally), np.int64)})


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, held = [], 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held > _PIECE_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _write_piece(
    plan: BuildPlan,
    index: int,
    documents: list[Document],
    path: Path,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    more: dict[str, np.ndarray] | None = None,
) -> None:
    """Tokenise some documents into one file, with some `more` arrays; it appears when it is complete."""
    arrays: dict[str, Any] = more or {}
    if plan.task == "classification":
        tokens, labelled = encode_labelled(documents, tokenizer, dtype, length=plan.length)
        arrays |= labelled
    else:
        texts = [document.text for document in documents]
        tokens = encode_documents(texts, tokenizer, dtype, framed=plan.task == "masked")
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        arrays |= {
            "tokens": np.concatenate([*tokens, np.zeros(0, dtype)]),
            "lengths": np.array([len(some) for some in tokens], np.int64),
            "bytes": np.array([len(document.text.encode()) for document in documents], np.int64),
            "validation": np.array([is_validation(plan, index, digest_of(document)) for document in documents], bool),
            "names": np.frombuffer(json.dumps([document.name for document in documents]).encode(), np.uint8),
        }
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
