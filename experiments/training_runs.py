"""Shared by experiments that train one run after another: their text, the runs that are missing, the table.

Each run leaves one JSON in results/; those that are there are not run again, and one that was interrupted goes on where
it was. The text is a tar of novels, one file a book, or without one the source of Python's standard library.
"""

import argparse
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dsjax.train
from dsjax.config.load import load_run
from dsjax.observe.environment import versions
from dsjax.observe.host import restart_with_huge_pages
from dsjax.observe.trackers import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[1]


def text_sources(archive: str | None, cache: Path, *, books: int) -> dict[str, Any]:
    """Settings of the data: of so many books every fifth validates; {} without an archive.

    Args:
        archive: a tar of .txt files, or None.
        cache: where the books are put.
        books: how many, the first by name.
    """
    if archive is None:
        return {}
    folders = {part: cache / part for part in ("train", "validation")}
    if not (cache / "done").exists():
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            files = sorted((m for m in tar if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)[:books]
            for number, member in enumerate(files):
                content = tar.extractfile(member)
                assert content is not None
                part = "validation" if number % 5 == 4 else "train"
                (folders[part] / Path(member.name).name).write_bytes(content.read())
        (cache / "done").touch()
    return {
        "data.sources": f"[{{kind: text, path: {folders['train']}}}]",
        "data.validation_sources": f"[{{kind: text, path: {folders['validation']}}}]",
    }


def train(here: Path, run: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train config.yaml of an experiment with other settings: the figures of its summary, and its curves.

    Args:
        here: the experiment's folder.
        run: names it.
        settings: dotted keys and values, as --set takes them.
    """
    config = load_run(here / "config.yaml", [f"{key}={value}" for key, value in settings.items()])
    folder = ROOT / "runs" / here.name / run
    result = dsjax.train.run(config, run_dir=folder, resume="if_any")
    if result.stopped_by:
        raise SystemExit(f"stopped by {result.stopped_by}; the same command goes on where it was")
    rows = read_metrics(folder / METRICS_FILE)
    metrics = (
        "validation_loss",
        "best_validation_loss",
        "parameters",
        "steps",
        "tokens",
        "training_seconds",
        "waiting_for_data",
        "data_hash",
    )
    return {
        "run": run,
        **{name: result.summary[name]["value"] for name in metrics},
        "batch_size": config.train.batch_size,
        "training_loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "validation": [
            [row["step"], row["tokens"], row["validation_loss"]] for row in rows if "validation_loss" in row
        ],
        "saving": rows[-1].get("saving", 0.0),
        "versions": versions(),
    }


def main(
    here: Path,
    runs: Sequence[str],
    measure: Callable[[str, Mapping[str, Any]], dict[str, Any]],
    finish: Callable[[dict[str, dict[str, Any]]], list[str]],
    *,
    books: int,
    about: str,
) -> None:
    """Run what is missing; then write the table into the README.

    Args:
        here: the experiment's folder.
        runs: all names.
        measure: (name, settings of the data) -> what is recorded.
        finish: results by name -> lines of the table; makes the plot, too.
        books: how many of the archive are read.
        about: for --help.
    """
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("archive", nargs="?", help="novels, a tar of text files; default: Python's standard library")
    parser.add_argument("--runs", nargs="+", choices=runs, default=runs, metavar="RUN")
    parser.add_argument("--list", action="store_true", help="name the runs, and which are recorded")
    arguments = parser.parse_args()
    paths = {run: here / "results" / f"{run}.json" for run in runs}
    if arguments.list:
        print("\n".join(f"{run}{'  (recorded)' if path.exists() else ''}" for run, path in paths.items()))
        return
    sources = text_sources(arguments.archive, ROOT / ".cache" / here.name, books=books)
    (here / "results").mkdir(exist_ok=True)
    for run in arguments.runs:
        if not paths[run].exists():
            paths[run].write_text(json.dumps(measure(run, sources)) + "\n")
    results = {run: json.loads(path.read_text()) for run, path in paths.items() if path.exists()}
    readme = here / "README.md"
    head = readme.read_text().split("<!-- table -->")[0]
    readme.write_text(head + "<!-- table -->\n" + "\n".join(finish(results)) + "\n")


def mean_and_range(values: Sequence[float]) -> str:
    """Of some seeds, as tables show it.

    Example:
        >>> mean_and_range([1.0, 2.0])
        '1.5000 (1.0000 to 2.0000)'
    """
    return f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"
