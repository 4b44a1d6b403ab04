"""Train six short runs with two checkouts of dsjax on this machine and compare them bit for bit.

    .venv/bin/python experiments/same_numbers/run.py --before CHECKOUT [--after CHECKOUT] [--only NAME ...]

A checkout has its own .venv (`make install`). Of dsjax only what a user sees is used: `dsjax train CONFIG --set`,
metrics.jsonl, and the tensors that `dsjax convert` writes. So a checkout may be older or newer than this script.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import machine

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".cache" / "same_numbers"
SMOLLM2 = Path(os.environ.get("DSJAX_SMOLLM2", ROOT / "models" / "smollm2-135m-instruct.gguf"))
SIDES = ("before", "after")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")  # of one version on both sides
SEED = 14  # of the text
METRICS = ("loss", "grad_norm", "validation_loss")
FIRST_STEPS = 10  # later ones amplify what differs in the last bit
COLUMNS = 100
TOLERANCE = 1e-6  # relative, of losses and norms, where sums are made in another order (issue 14)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its config file in the checkout or beside this script, what is overridden, and options of `convert`."""

    config: str
    sets: tuple[str, ...] = ()
    convert: tuple[str, ...] = ()
    needs: Path | None = None


RUNS = {
    "quickstart": Run(
        "configs/run/quickstart.yaml",
        (
            "data.sources=[{kind: text, path: text}]", "data.validation_fraction=0.1", "optimizer.schedule.warmup=4",
            "train.steps=12", "evaluate.every=6", "evaluate.rows=32", "checkpoint.every=0", "sample.prompt=",
        ),
    ),
    "gpt2": Run("gpt2.yaml"),
    "bert": Run("bert.yaml"),
    "random_ltd": Run("random_ltd.yaml"),
    "onebit_lamb": Run("onebit_lamb.yaml"),
    "lora": Run(
        "lora.yaml",
        (f"model.init_from={SMOLLM2.resolve()}", f"data.tokenizer.path={SMOLLM2.resolve()}"),
        ("--adapter",),
        SMOLLM2,
    ),
}  # fmt: skip


def write_data(folder: Path) -> None:
    """Write the text of all runs, 64 documents of made-up words, and a WordPiece vocabulary of these words."""
    chance = random.Random(SEED)
    parts = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = sorted({"".join(chance.choices(parts, k=chance.randint(1, 3))) for _ in range(300)})
    shares = [1 / (rank + 1) for rank in range(len(words))]  # few are frequent, as in a language
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for number in range(64):
        lines = [" ".join(chance.choices(words, shares, k=chance.randint(3, 12))) for _ in range(chance.randint(2, 60))]
        (folder / "text" / f"{number:02}.txt").write_text(".\n".join(lines) + ".\n")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    (folder / "wordpiece").mkdir(exist_ok=True)
    (folder / "wordpiece" / "vocab.txt").write_text("\n".join([*special, *words]) + "\n")


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A working copy of dsjax: its commit, a hash of its code, and the packages in its .venv."""

    path: Path
    commit: str
    code: str
    packages: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> "Checkout":
        """Look at a working copy.

        Raises:
            SystemExit: it has no .venv, or that .venv has dsjax from somewhere else.
        """
        python = path / ".venv" / "bin" / "python"
        if not python.exists():
            raise SystemExit(f"{path} has no .venv: run `make install` there")
        look = (
            "import json, dsjax, importlib.metadata as m; "
            f"print(json.dumps([dsjax.__file__, {{n: m.version(n) for n in {PACKAGES}}}]))"
        )
        said = subprocess.run([python, "-P", "-c", look], cwd=WORK, capture_output=True, text=True, check=False)
        if said.returncode:
            raise SystemExit(f"{python} cannot import dsjax:\n{said.stderr}")
        file, packages = json.loads(said.stdout)
        if not Path(file).resolve().is_relative_to(path.resolve()):
            raise SystemExit(f"{python} has dsjax from {file}: run `make install` in {path}")
        git = ["git", "-C", str(path), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        return cls(path, commit, _hash_of_code(path), packages)


def _hash_of_code(path: Path) -> str:
    """SHA-256 of all that decides what a checkout computes: a working copy need not be committed."""
    digest = hashlib.sha256()
    for folder, pattern in (("dsjax", "*.py"), ("pallas_kernels", "*.py"), ("configs", "*.yaml")):
        for file in sorted((path / folder).rglob(pattern)):
            digest.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def train(checkout: Checkout, name: str, side: str) -> dict[str, Any]:
    """Run one of RUNS with a checkout: {"seconds", METRICS by step, "tensors": name -> SHA-256}.

    Each side has its own cache of data: neither reads rows that the other has made. Compiled programs are shared, which
    JAX finds by all that decides what they compute: the second side compiles only what has changed.
    """
    settings, folder = RUNS[name], WORK / side / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = (checkout.path if "/" in settings.config else HERE / "configs") / settings.config
    command = functools.partial(_dsjax, checkout, side, folder / "log.txt")
    began = time.perf_counter()
    command("train", config, "--run-dir", folder / "run", *[part for one in settings.sets for part in ("--set", one)])
    command("convert", folder / "run", folder / "model", *settings.convert)
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (file,) = (folder / "model").glob("*.safetensors")
    return {
        "seconds": round(seconds, 1),
        **{metric: {row["step"]: row[metric] for row in rows if metric in row} for metric in METRICS},
        "tensors": hash_tensors(file),
    }


def _dsjax(checkout: Checkout, side: str, log: Path, *arguments: str | Path) -> None:
    environment = os.environ | {
        "XDG_CACHE_HOME": str(WORK / side / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(WORK / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "COLUMNS": "100",
    }
    with log.open("ab") as file:
        done = subprocess.run(
            [checkout.path / ".venv" / "bin" / "dsjax", *arguments],
            cwd=WORK, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False,
        )  # fmt: skip
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"dsjax {arguments[0]} of {checkout.path} ended with exit code {done.returncode}:\n{end}")


def hash_tensors(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor of a safetensors file, over its type, shape and bytes."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    hashes = {}
    for name, about in sorted(header.items()):
        first, end = (start + offset for offset in about["data_offsets"])
        hashes[name] = hashlib.sha256(f"{about['dtype']}{about['shape']}".encode() + content[first:end]).hexdigest()
    return hashes


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the two sides of a run.

    Returns:
        "verdict": equal (bit for bit), close (losses and norms of the first steps, relative to TOLERANCE) or different;
        the largest relative difference of each metric over the first steps; names of tensors that are not equal.
    """
    names = sorted(before["tensors"].keys() | after["tensors"].keys())
    unequal = [name for name in names if before["tensors"].get(name) != after["tensors"].get(name)]
    steps = all(before[metric].keys() == after[metric].keys() for metric in METRICS)
    same = not unequal and all(before[metric] == after[metric] for metric in METRICS)
    differences = {metric: largest_difference(before[metric], after[metric]) for metric in METRICS}
    close = steps and before["tensors"].keys() == after["tensors"].keys() and max(differences.values()) <= TOLERANCE
    verdict = "equal" if same else "close" if close else "different"
    return {"verdict": verdict, "largest_difference": differences, "unequal_tensors": unequal}


def largest_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Largest relative difference of a metric over the first steps; infinite where one is not finite and not equal.

    Example:
        >>> largest_difference({"1": 2.0, "2": "NaN"}, {"1": 2.5, "2": "NaN"})
        0.25
    """
    largest = 0.0
    for step in [step for step in before if step in after and int(step) <= FIRST_STEPS]:
        one, other = before[step], after[step]
        if one != other:
            difference = abs(float(one) - float(other)) / abs(float(one)) if float(one) else math.inf
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def measured(name: str, checkouts: Mapping[str, Checkout], on: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """The recorded result of a run, in which sides are run that are missing or of other code, settings or processor."""
    settings = RUNS[name]
    file = HERE / "results" / f"{name}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    own = HERE / "configs" / settings.config
    config = own.read_text() if own.exists() else ""
    about = hashlib.sha256(f"{SEED}{config}{settings.sets}{settings.convert}".encode()).hexdigest()
    for side, checkout in checkouts.items():
        key = {"code": checkout.code, "packages": dict(checkout.packages), "settings": about, "machine": on}
        if result.get(side, {}).get("key") == key:
            continue
        with console.status(f"{name}, {side}: {checkout.commit}"):
            result |= {side: {"commit": checkout.commit, "key": key, **train(checkout, name, side)}}
        result.pop("comparison", None)
        _write(file, result)
        result = json.loads(file.read_text())  # steps are text from now on
    _write(
        file, {"run": name, **{side: result[side] for side in SIDES}, "comparison": compare(*map(result.get, SIDES))}
    )
    return json.loads(file.read_text())


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(file)


def show(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print one row a run."""
    table = Table(caption=f"Differences are the largest relative ones of the first {FIRST_STEPS} steps.")
    for column in ("run", "verdict", "steps", "loss", "grad norm", "val. loss", "unequal tensors", "seconds"):
        table.add_column(column, justify="left" if column in ("run", "verdict") else "right", no_wrap=True)
    for result in results:
        before, after, found = result["before"], result["after"], result["comparison"]
        table.add_row(
            result["run"],
            found["verdict"],
            str(len(before["loss"])),
            *[f"{found['largest_difference'][metric]:.1e}" for metric in METRICS],
            f"{len(found['unequal_tensors'])} of {len(before['tensors'])}",
            f"{before['seconds']:.0f}, {after['seconds']:.0f}",
        )
    console.print(table)


def main() -> None:
    """Run what is missing, print the table; exit code 1 if a run is different."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--after", type=Path, default=ROOT, metavar="CHECKOUT", help="default: this one")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    arguments = parser.parse_args()
    console = Console(highlight=False, width=COLUMNS)
    WORK.mkdir(parents=True, exist_ok=True)
    checkouts = {side: Checkout.of(vars(arguments)[side].absolute()) for side in SIDES}
    before, after = (checkouts[side].packages for side in SIDES)
    if before != after:
        raise SystemExit(f"the checkouts have other packages, which changes numbers, too:\n  {before}\n  {after}")
    write_data(WORK)
    on = {key: machine()[key] for key in ("cpu", "system")} | {"cores": len(os.sched_getaffinity(0))}
    results = []
    for name in arguments.only:
        needs = RUNS[name].needs
        if needs is not None and not needs.exists():
            console.print(f"{name} is left out: {needs} is missing; `make models` installs it")
            continue
        results.append(measured(name, checkouts, on, console))
    if not results:
        raise SystemExit("nothing was compared")
    show(results, console)
    sys.exit(any(result["comparison"]["verdict"] == "different" for result in results))


if __name__ == "__main__":
    main()
