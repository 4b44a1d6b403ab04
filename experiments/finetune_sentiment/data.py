"""The sentence polarity data as four .jsonl files: a fixed split, and its training part with shuffled labels."""

import json
import random
import zipfile
from pathlib import Path

SPLIT_SEED = 0
FILES = {"pos": "sentence_polarity/rt-polarity.pos", "neg": "sentence_polarity/rt-polarity.neg"}


def read(path: Path) -> list[dict[str, str]]:
    """Its 10,662 sentences with their labels; the files are latin-1, one sentence a line."""
    rows = []
    with zipfile.ZipFile(path) as archive:
        for label, name in FILES.items():
            lines = archive.read(name).decode("latin-1").split("\n")
            rows += [{"text": line.strip(), "label": label} for line in lines if line.strip()]
    return rows


def split(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """80% to train, 10% to validate, 10% to test, at random; a sentence that occurs twice goes with its first."""
    rng = random.Random(SPLIT_SEED)
    texts = sorted({row["text"] for row in rows})
    rng.shuffle(texts)
    cuts = len(texts) * 8 // 10, len(texts) * 9 // 10
    parts = {"train": texts[: cuts[0]], "validation": texts[cuts[0] : cuts[1]], "test": texts[cuts[1] :]}
    by_text: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_text.setdefault(row["text"], []).append(row)
    found = {name: [row for text in part for row in by_text[text]] for name, part in parts.items()}
    labels = [row["label"] for row in found["train"]]
    rng.shuffle(labels)
    found["shuffled"] = [{**row, "label": label} for row, label in zip(found["train"], labels, strict=True)]
    return found


def prepare(archive: Path, folder: Path) -> dict[str, int]:
    """Write train, shuffled, validation and test into `folder`; returns how many rows each has."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = split(read(archive))
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) for name, rows in parts.items()}
