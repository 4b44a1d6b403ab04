"""Building a corpus folder: parts in parallel, each kept once finished, then one pass that joins them.

Threads, not processes: the `tokenizers` library works outside Python's lock. Measured on 12 MB of Python source and 2
cores: 1.6 s with 2 threads (the library's own threads off), 1.9 s with those on, 1.9 s with 2 spawned processes; and
threads are safe in a process that has started JAX and need no importable main module.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsjax.data.config import DataTask, TokenizerConfig
from dsjax.data.corpus.encode import encode_documents
from dsjax.data.corpus.lock import full_disk_as_message, locked
from dsjax.data.corpus.progress import ByteProgress, elapsed, in_threads
from dsjax.data.corpus.store import MANIFEST, CorpusFolder, StoreWriter, open_corpus_folder, write_manifest
from dsjax.data.rows.labels import encode_labelled, label_names, number_labels
from dsjax.data.text.document import Document, Undecodable
from dsjax.data.text.passed_over import Tally
from dsjax.data.text.read import read_part
from dsjax.data.text.sources import Part, Source
from dsjax.data.tokenizers.tokenizer import Tokenizer, train_bpe

Role = Literal["split", "train", "validation"]
_MAX_PART_BYTES = 16 << 20
_MIN_PART_BYTES = 1 << 20
# More text than this is sampled for training a BPE, by document hash: merges do not change for the better beyond.
_BPE_BYTES = 256 << 20
_MOST_BPE_CHARACTERS = 1 << 30  # all the same: compressed text is more than its bytes on disk say
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


def build_folder(plan: BuildPlan, *, progress: bool, workers: int) -> CorpusFolder:
    """Open `plan.folder` if it is there, else build it; see `dsjax.data.corpus.build`."""
    partial = plan.folder.with_name(plan.folder.name + ".partial")
    while not (plan.folder / MANIFEST).is_file():
        if plan.folder.exists() and (not plan.folder.is_dir() or any(plan.folder.iterdir())):
            raise ValueError(f"{plan.folder} exists and is not a corpus folder: name a new or empty folder")
        with locked(partial, progress=progress) as held:
            if held:
                if not (plan.folder / MANIFEST).is_file():
                    with full_disk_as_message(plan.folder):
                        _build(plan, partial, progress, workers)
                shutil.rmtree(partial, ignore_errors=True)
    opened = open_corpus_folder(plan.folder)
    if opened.key != plan.key:
        raise ValueError(f"{plan.folder} holds a corpus of other data or settings: remove it or name another folder")
    return opened


def _build(plan: BuildPlan, partial: Path, progress: bool, workers: int) -> None:
    work = partial / plan.key[:32]
    work.mkdir(exist_ok=True)
    for leftover in work.glob("*.tmp"):
        leftover.unlink()
    total = sum(planned.source.num_bytes for planned in plan.sources)
    target = min(_MAX_PART_BYTES, max(_MIN_PART_BYTES, total // 256))
    with elapsed("cutting the sources into parts", enabled=progress):
        parts = [(index, part) for index, planned in enumerate(plan.sources) for part in planned.source.parts(target)]
    tokenizer = plan.tokenizer
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = _trained_tokenizer(plan, work, parts, progress)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    _tokenize_parts(plan, work, parts, tokenizer, dtype, progress=progress, workers=workers)
    joined = partial / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    paths = [path for number in range(len(parts)) for path in _pieces(_part_path(work, number))]
    labels = label_names(paths) if plan.task == "classification" else None
    with elapsed("joining the parts", enabled=progress):
        stores = _join(plan, work, [index for index, _ in parts], joined, dtype, labels)
    try:
        _check_split(plan, stores)
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    entries = {
        "train": [stores[index, "train"] for index, s in enumerate(plan.sources) if s.role != "validation"],
        "validation": [
            entry for (_, split), entry in stores.items() if split == "validation" and entry["num_documents"]
        ],
    }
    write_manifest(joined, key=plan.key, tokenizer=tokenizer, stores=entries, labels=labels)
    joined.rename(plan.folder)


def _trained_tokenizer(plan: BuildPlan, work: Path, parts: list[tuple[int, Part]], progress: bool) -> Tokenizer:
    """Train the BPE on the training documents, a sample of them when there are many."""
    saved = work / "tokenizer"
    if saved.is_dir():
        return Tokenizer.load(saved)
    training = [(index, part) for index, part in parts if plan.sources[index].role != "validation"]
    total = sum(part.num_bytes for _, part in training)
    share = min(1.0, _BPE_BYTES / total)
    with ByteProgress("reading text for the tokenizer", total=total, enabled=progress) as bar:

        def texts() -> Iterator[str]:
            taken = 0
            for index, part in training:
                for document in read_part(part, undecodable=plan.undecodable):
                    digest = _digest(document)
                    if not _is_validation(plan, index, digest) and digest * 0x9E3779B1 % 2**32 < share * 2**32:
                        taken += len(document.text)
                        if taken > _MOST_BPE_CHARACTERS:
                            return
                        yield document.text
                bar.advance(part.num_bytes)

        config = plan.tokenizer
        assert not isinstance(config, Tokenizer) and config.kind == "bpe", "only a BPE is trained"
        tokenizer = train_bpe(texts(), config, plan.cache_dir, masked=plan.task == "masked", progress=progress)
    temporary = work / "tokenizer.tmp"
    tokenizer.save(temporary)
    temporary.rename(saved)
    return tokenizer


def _digest(document: Document) -> int:
    return int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), "little")


def _is_validation(plan: BuildPlan, source: int, digest: int) -> bool:
    role = plan.sources[source].role
    return role == "validation" or (role == "split" and digest < plan.validation_fraction * 2**64)


def _tokenize_parts(
    plan: BuildPlan,
    work: Path,
    parts: list[tuple[int, Part]],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    *,
    progress: bool,
    workers: int,
) -> None:
    missing = [number for number in range(len(parts)) if not _part_path(work, number).exists()]
    total = sum(part.num_bytes for _, part in parts)
    done = total - sum(parts[number][1].num_bytes for number in missing)

    def tokenize(number: int) -> int:
        index, part = parts[number]
        _write_part(plan, index, part, _part_path(work, number), tokenizer, dtype)
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


def _part_path(work: Path, number: int) -> Path:
    return work / f"part-{number:06d}.npz"


def _pieces(path: Path) -> list[Path]:
    """The files of a part that is complete, in order."""
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
            "validation": np.array([_is_validation(plan, index, _digest(document)) for document in documents], bool),
            "names": np.frombuffer(json.dumps([document.name for document in documents]).encode(), np.uint8),
        }
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _join(
    plan: BuildPlan, work: Path, owners: list[int], folder: Path, dtype: np.dtype, labels: list[str] | None
) -> dict[tuple[int, str], dict[str, Any]]:
    """Write each source's parts, in order, into its stores; the manifest's entries by source and split."""
    entries: dict[tuple[int, str], dict[str, Any]] = {}
    for index, planned in enumerate(plan.sources):
        writers = {
            split: StoreWriter(folder, f"{split}-{index}", dtype, labelled=labels is not None)
            for split in ("train", "validation")
        }
        tally = np.zeros(len(dataclasses.fields(Tally)), np.int64)
        numbers = [number for number, owner in enumerate(owners) if owner == index]
        for path in (path for number in numbers for path in _pieces(_part_path(work, number))):
            with np.load(path, allow_pickle=False) as part:
                lengths, num_bytes, validation = part["lengths"], part["bytes"], part["validation"]
                tokens, names = part["tokens"], json.loads(part["names"].tobytes())
                classes = number_labels(part, labels) if labels is not None else None
                tally += part.get("tally", 0)
            for split, chosen in (("train", ~validation), ("validation", validation)):
                writers[split].append(
                    tokens[np.repeat(chosen, lengths)],
                    lengths[chosen],
                    names=[name for name, take in zip(names, chosen, strict=True) if take],
                    num_bytes=int(num_bytes[chosen].sum()),
                    classes=None if classes is None else classes[chosen],
                )
        for line in Tally(*tally.tolist()).remarks(planned.source.config, planned.source.root):
            plan.report(line)
        for split, writer in writers.items():
            entries[index, split] = writer.close()
    return entries


def _check_split(plan: BuildPlan, entries: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Refuse a source without training documents and a validation set without any."""
    held = {at: entry["num_documents"] for at, entry in entries.items()}
    for index, planned in enumerate(plan.sources):
        name = f"source of kind {planned.source.config.kind} in {planned.source.root}"
        if held[index, "train"] + held[index, "validation"] == 0:
            raise ValueError(f"{name}: no document has any text")
        if planned.role == "split" and held[index, "train"] == 0:
            raise ValueError(f"{name}: all of its {held[index, 'validation']} documents went to validation; {_FIX}")
    if any(planned.role == "split" for planned in plan.sources) and not any(
        held[at] for at in held if at[1] != "train"
    ):
        fraction, documents = plan.validation_fraction, sum(held.values())
        raise ValueError(f"validation_fraction {fraction} chose none of the {documents} documents; {_FIX}")


_FIX = (
    "change validation_fraction (0 trains without validation), name validation_sources, "
    "or cut a text file into documents with the source's separator"
)
