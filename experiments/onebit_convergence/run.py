"""Losses of 1-bit Adam, 1-bit LAMB and 0/1 Adam beside Adam and LAMB at equal samples; then tables and plots.

python experiments/onebit_convergence/run.py [english_novels.tar.xz] [--runs gpt-adamw-0 ...]

One JSON a run; those that are there are not run again, and one that was interrupted goes on where it was. Without an
archive of novels (one text file a book) the text is the source of Python's standard library, as in the quickstart.
"""

import argparse
import json
import statistics
import tarfile
from pathlib import Path

from matplotlib.figure import Figure

import dsjax.train
from dsjax.config.load import load_run
from dsjax.observe.environment import versions
from dsjax.observe.trackers import METRICS_FILE, read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "onebit_convergence"
SEEDS = range(3)
STEPS = 400
ROWS = 16 * STEPS
# Every fifth book is kept for validation; so many of the archive's are read.
BOOKS = 20
BATCHES = {1: 8, 8: 64, 32: 256}
OPTIMIZERS = {
    "adamw": {},
    "onebit_adam": {"freeze_step": 100},
    "zero_one_adam": {"var_freeze_step": 60, "var_update_scaler": 8, "local_step_scaler": 100, "local_step_clipper": 4},
}
TITLES = {
    "adamw": "Adam",
    "onebit_adam": "1-bit Adam",
    "zero_one_adam": "0/1 Adam",
    "lamb": "LAMB",
    "onebit_lamb": "1-bit LAMB",
}
GROUPS = ["gpt", "masked", *(f"lamb{factor}" for factor in BATCHES)]


def all_runs() -> list[str]:
    """Names: what is trained, by which optimizer, with which seed."""
    adam = [f"{task}-{name}-{seed}" for task in ("gpt", "masked") for name in OPTIMIZERS for seed in SEEDS]
    lamb = [f"lamb{factor}-{name}-{seed}" for factor in BATCHES for name in ("lamb", "onebit_lamb") for seed in SEEDS]
    return adam + lamb


def settings_of(run: str, sources: dict[str, object]) -> dict[str, object]:
    """What differs from config.yaml."""
    group, kind, seed = run.split("-")
    settings = {"seed": seed, "data.shuffle_seed": seed, **sources}
    if group == "masked":
        model = "{kind: bert, vocab_size: 2048, num_layers: 4, model_dim: 128, num_heads: 4, max_positions: 128}"
        settings |= {"model": model}
    if not group.startswith("lamb"):
        optimizer = {"kind": kind, "learning_rate": 2e-3, "b2": 0.999, **OPTIMIZERS[kind]}
        return settings | {"optimizer": _with_schedule(optimizer, 40)}
    batch = BATCHES[int(group.removeprefix("lamb"))]
    steps = ROWS // batch
    # The square-root rule: the learning rate of LAMB grows with the root of the batch.
    rate = 4e-3 * (batch / 64) ** 0.5
    optimizer = {"kind": kind, "learning_rate": rate, "b2": 0.99}
    if kind == "onebit_lamb":
        optimizer |= {"freeze_step": steps // 4}
    evaluated = max(1, steps // 8)
    return settings | {
        "optimizer": _with_schedule(optimizer, steps // 10),
        "train.batch_size": batch,
        "train.steps": steps,
        "evaluate.every": evaluated,
        "evaluate.batch_size": 16,
    }


def _with_schedule(optimizer: dict[str, object], warmup: int) -> str:
    inner = ", ".join(f"{key}: {value}" for key, value in optimizer.items())
    return f"{{{inner}, schedule: {{kind: cosine, warmup: {warmup}}}}}"


def text_sources(archive: str | None) -> dict[str, object]:
    """Settings of the data: books to train on and books to validate on, or the standard library."""
    if archive is None:
        return {}
    folders = {part: CACHE / part for part in ("train", "validation")}
    if not all(folder.is_dir() for folder in folders.values()):
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as books:
            files = sorted((m for m in books if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)[:BOOKS]
            for number, member in enumerate(files):
                content = books.extractfile(member)
                assert content is not None
                part = "validation" if number % 5 == 4 else "train"
                (folders[part] / Path(member.name).name).write_bytes(content.read())
    return {
        "data.sources": f"[{{kind: text, path: {folders['train']}}}]",
        "data.validation_sources": f"[{{kind: text, path: {folders['validation']}}}]",
    }


def train(run: str, sources: dict[str, object]) -> dict:
    """One run's figures."""
    folder = ROOT / "runs" / "onebit_convergence" / run
    config = load_run(HERE / "config.yaml", [f"{key}={value}" for key, value in settings_of(run, sources).items()])
    result = dsjax.train.run(config, run_dir=folder, resume="if_any")
    if result.stopped_by:
        raise SystemExit(f"stopped by {result.stopped_by}; the same command goes on where it was")
    summary = result.summary
    rows = read_metrics(folder / METRICS_FILE)
    return {
        "run": run,
        "validation_loss": summary["validation_loss"]["value"],
        "parameters": summary["parameters"]["value"],
        "steps": summary["steps"]["value"],
        "batch_size": config.train.batch_size,
        "training_loss": [row["loss"] for row in rows],
        "validation": [[row["step"], row["validation_loss"]] for row in rows if "validation_loss" in row],
        "training_seconds": summary["training_seconds"]["value"],
        "data_hash": summary["data_hash"]["value"],
        "versions": versions(),
    }


def table(results: dict[str, dict]) -> list[str]:
    """Final validation losses: each optimizer's mean and spread, and its gap to the uncompressed one."""
    rows = [
        "| task | optimizer | steps x rows | validation loss, mean (lowest to highest) | gap | spread of Adam or LAMB |"
    ]
    rows.append("|---" * 6 + "|")
    for group in GROUPS:
        losses: dict[str, list[float]] = {}
        for run, result in results.items():
            if run.startswith(f"{group}-"):
                losses.setdefault(run.split("-")[1], []).append(result["validation_loss"])
        base = losses.get("lamb" if group.startswith("lamb") else "adamw", [])
        for name, values in losses.items():
            one = next(r for run, r in results.items() if run.startswith(f"{group}-{name}-"))
            mean = statistics.mean(values)
            spread = f"{max(base) - min(base):.4f}" if values is base and len(base) > 1 else ""
            gap = "" if values is base or not base else f"{mean - statistics.mean(base):+.4f}"
            cells = (
                group,
                f"{TITLES[name]}, seeds recorded: {len(values)} of {len(SEEDS)}",
                f"{one['steps']:,} x {one['batch_size']}",
            )
            shown = f"{mean:.4f} ({min(values):.4f} to {max(values):.4f})"
            rows.append("| " + " | ".join((*cells, shown, gap, spread)) + " |")
    return rows


def plot(results: dict[str, dict]) -> None:
    """Validation loss over rows seen, every run, a panel for each task."""
    groups = [group for group in GROUPS if any(run.startswith(f"{group}-") for run in results)]
    figure = Figure(figsize=(4.2 * len(groups), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    colors = dict(zip(TITLES, ("C0", "C1", "C2", "C0", "C1"), strict=True))
    for axes, group in zip(panels, groups, strict=True):
        for run, result in results.items():
            if not run.startswith(f"{group}-"):
                continue
            name = run.split("-")[1]
            label = TITLES[name] if run.endswith("-0") else None
            seen = [step * result["batch_size"] for step, _ in result["validation"]]
            axes.plot(seen, [loss for _, loss in result["validation"]], color=colors[name], lw=1, label=label)
        axes.set(title=group, xlabel="rows", ylabel="validation loss, nats per token")
        axes.legend(fontsize=8)
    figure.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", nargs="?", help="novels, a tar of text files; default: Python's standard library")
    parser.add_argument("--runs", nargs="+", choices=all_runs(), default=all_runs(), metavar="RUN")
    arguments = parser.parse_args()
    sources = text_sources(arguments.archive)
    (HERE / "results").mkdir(exist_ok=True)
    for run in arguments.runs:
        path = HERE / "results" / f"{run}.json"
        if not path.exists():
            path.write_text(json.dumps(train(run, sources)) + "\n")
    paths = {run: HERE / "results" / f"{run}.json" for run in all_runs()}
    results = {run: json.loads(path.read_text()) for run, path in paths.items() if path.exists()}
    readme = HERE / "README.md"
    head = readme.read_text().split("<!-- table -->")[0]
    readme.write_text(head + "<!-- table -->\n" + "\n".join(table(results)) + "\n")
    plot(results)


if __name__ == "__main__":
    main()
