"""Record runs of dsjax that are stopped half way, and how they would have gone on.

Run at commit 520233e in an empty folder, whose content becomes tests/golden/made_before/stopped:

    python record_stopped.py .../tests/golden/made_before/model

text/, tokenizer/   what the runs read; the tokenizer, of eleven tokens, is the one that is given
NAME/run.tar.xz     the folder of a run as if it had been killed after HALF steps, at its checkpoint
NAME/whole.json     loss and gradient norm of each step of the run that was not stopped
NAME/model/         its final parameters, as `dsjax convert` writes them; of lora the adapter

Names of paths are relative, and none is of the machine that recorded.
"""

import hashlib
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import yaml

HALF, STEPS = 6, 12
COMMON: dict[str, Any] = {
    "model": {
        "kind": "gpt2", "vocab_size": 12, "num_layers": 4, "model_dim": 8, "num_heads": 2, "mlp_dim": 16,
        "max_positions": 16, "init_std": 0.1, "segments": [1, 2, 1],
    },
    "data": {
        "sources": [{"kind": "text", "path": "text"}],
        "tokenizer": {"kind": "file", "path": "tokenizer"},
        "sequence_length": 16,
        "validation_fraction": 0,
        "cache_dir": "cache",
    },
    "train": {"steps": STEPS, "batch_size": 16},
    "evaluate": {"every": 0},
    "checkpoint": {"every": HALF, "asynchronous": False},
    "sample": {"prompt": ""},
}  # fmt: skip
TENSOR = {"data": 2, "fsdp": 2, "tensor": 2, "zero_stage": 3, "platform": "cpu", "cpu_devices": 8}
RUNS: dict[str, dict[str, Any]] = {
    "adamw": {
        "mesh": TENSOR,
        "model": COMMON["model"] | {"dropout": 0.1},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-2, "schedule": {"kind": "cosine", "warmup": 2}},
        "train": COMMON["train"] | {"ema_decay": 0.9, "accumulation": 2},
    },
    "onebit_lamb": {  # compressed from step 4 on
        "mesh": TENSOR | {"fsdp": 4, "tensor": 1, "zero_stage": 1},
        "model": {
            "kind": "llama", "vocab_size": 12, "num_layers": 3, "model_dim": 8, "num_heads": 2, "mlp_dim": 16,
            "init_std": 0.5, "segments": [2, 1], "tied_embedding": True,
        },
        "optimizer": {"kind": "onebit_lamb", "learning_rate": 5e-2, "freeze_step": 3},
    },
    "lora": {
        "mesh": TENSOR | {"data": 4, "tensor": 1},
        "model": {"kind": "pretrained", "init_from": "adamw/model", "segments": [1, 3]},
        "lora": {"rank": 2, "alpha": 4, "targets": r"(attention\.qkv|mlp\.down)\.kernel"},
        "optimizer": {"kind": "adamw", "learning_rate": 2e-2},
    },
}  # fmt: skip


def dsjax(*arguments: str | Path) -> None:
    """Run the command."""
    subprocess.run([sys.executable, "-m", "dsjax", *map(str, arguments)], check=True)


def without_our_path(run: Path) -> None:
    """Take this machine's path out of the one file of a checkpoint that has it, and mend its manifest."""
    for file in run.glob("checkpoints/*/commit_success.txt"):
        manifest = file.with_name("manifest_00000_of_00001.txt")
        old = file.read_bytes()
        new = old.replace(f"{Path.cwd()}/".encode(), b"")
        file.write_bytes(new)
        before, after = (f"{hashlib.sha256(content).hexdigest()} {len(content)}" for content in (old, new))
        lines = manifest.read_text().replace(before, after).splitlines(keepends=True)[:-1]
        manifest.write_text("".join(lines) + hashlib.sha256("".join(lines).encode()).hexdigest() + " end\n")


def archive(run: Path, file: Path) -> None:
    """Pack a folder as run/, without times and owners."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(path for path in run.rglob("*") if path.is_file()):
            about = tarfile.TarInfo(f"run/{path.relative_to(run).as_posix()}")
            about.size = path.stat().st_size
            tar.addfile(about, io.BytesIO(path.read_bytes()))
    file.write_bytes(lzma.compress(packed.getvalue(), preset=9))


def main() -> None:
    """Make everything in the current folder."""
    os.environ.pop("XLA_FLAGS", None)
    shutil.copytree(sys.argv[1], "tokenizer")
    chance, words = random.Random(0), ["ab", "abc", "cab", "bad", "dab", "a", "d", "abcd"]
    Path("text").mkdir()
    for number in range(30):
        text = " ".join(chance.choice(words) for _ in range(chance.randint(3, 40)))
        Path("text", f"{number:02}.txt").write_text(text + "\n")
    for name, changes in RUNS.items():
        here, run = Path(name), Path(name, "run")
        here.mkdir()
        Path("config.yaml").write_text(yaml.safe_dump({**COMMON, **changes, "name": name}))
        dsjax("train", "config.yaml", "--run-dir", run)
        dsjax("convert", run, here / "model", *(["--adapter"] if name == "lora" else []))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        whole = {metric: [row[metric] for row in rows] for metric in ("loss", "grad_norm")}
        (here / "whole.json").write_text(json.dumps(whole, indent=1) + "\n")
        shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
        for file in ("loss.png", "summary.json", "versions.json"):
            (run / file).unlink()
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(lines[:HALF]))
        without_our_path(run)
        archive(run, here / "run.tar.xz")
        shutil.rmtree(run)
    for file in Path().glob("*/model/generation_config.json"):
        file.unlink()
    shutil.rmtree("cache")
    Path("config.yaml").unlink()


if __name__ == "__main__":
    main()
