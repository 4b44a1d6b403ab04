"""Building a corpus folder: parts in parallel, each kept once finished, then one pass that joins them."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.data.corpus.lock import full_disk_as_message, locked
from dsjax.data.corpus.parts import BuildPlan, digest_of, is_validation, part_path, pieces_of, tokenize_parts
from dsjax.data.corpus.progress import ByteProgress, elapsed
from dsjax.data.corpus.store import MANIFEST, CorpusFolder, StoreWriter, open_corpus_folder, write_manifest
from dsjax.data.rows.labels import label_names, number_labels
from dsjax.data.text.read import read_part
from dsjax.data.text.skipped import Tally
from dsjax.data.text.source import Part
from dsjax.data.tokenizers.tokenizer import Tokenizer
from dsjax.data.tokenizers.train import train_bpe

_MAX_PART_BYTES = 16 << 20
_MIN_PART_BYTES = 1 << 20
# More text than this is sampled for training a BPE, by document hash: merges do not change for the better beyond.
_BPE_BYTES = 256 << 20
_MOST_BPE_CHARACTERS = 1 << 30  # all the same: compressed text is more than its bytes on disk say


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
    tokenize_parts(plan, work, parts, tokenizer, dtype, progress=progress, workers=workers)
    joined = partial / "joined"
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    paths = [path for number in range(len(parts)) for path in pieces_of(part_path(work, number))]
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
                    digest = digest_of(document)
                    if not is_validation(plan, index, digest) and digest * 0x9E3779B1 % 2**32 < share * 2**32:
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
        for path in (path for number in numbers for path in pieces_of(part_path(work, number))):
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
        for line in planned.source.config.tally_remarks(Tally(*tally.tolist()), planned.source.root):
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
