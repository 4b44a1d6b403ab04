"""Losses of 1-bit Adam, 1-bit LAMB and 0/1 Adam beside Adam and LAMB at equal samples; then tables and plots.

python experiments/onebit_convergence/run.py [english_novels.tar.xz] [--runs gpt-adamw-0 ...]

One JSON a run; those that are there are not run again, and one that was interrupted goes on where it was. Without an
archive of novels (one text file a book) the text is the source of Python's standard library, as in the quickstart.
"""

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from training_runs import main, mean_and_range, train

HERE = Path(__file__).parent
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
# What of 0/1 Adam costs how much: its variance learnt for longer, and no step without a sync.
CONTROLS = {
    "zero_one_late": {**OPTIMIZERS["zero_one_adam"], "var_freeze_step": 120},
    "zero_one_synced": {**OPTIMIZERS["zero_one_adam"], "var_freeze_step": 120, "local_step_clipper": 1},
}
TITLES = {
    "adamw": "Adam",
    "onebit_adam": "1-bit Adam",
    "zero_one_adam": "0/1 Adam",
    "zero_one_late": "0/1 Adam, variance learnt for 120 steps",
    "zero_one_synced": "the same, a sync in every step",
    "lamb": "LAMB",
    "onebit_lamb": "1-bit LAMB",
}
GROUPS = ["gpt", "masked", *(f"lamb{factor}" for factor in BATCHES)]


def all_runs() -> list[str]:
    """Names: what is trained, by which optimizer, with which seed."""
    adam = [f"{task}-{name}-{seed}" for task in ("gpt", "masked") for name in OPTIMIZERS for seed in SEEDS]
    lamb = [f"lamb{factor}-{name}-{seed}" for factor in BATCHES for name in ("lamb", "onebit_lamb") for seed in SEEDS]
    return adam + [f"gpt-{name}-{seed}" for name in CONTROLS for seed in SEEDS] + lamb


def settings_of(run: str, sources: dict[str, object]) -> dict[str, object]:
    """Settings that differ from config.yaml."""
    group, kind, seed = run.split("-")
    settings = {"seed": seed, "data.shuffle_seed": seed, **sources}
    if group == "masked":
        model = "{kind: bert, vocab_size: 2048, num_layers: 4, model_dim: 128, num_heads: 4, max_positions: 128}"
        settings |= {"model": model}
    if not group.startswith("lamb"):
        how = (OPTIMIZERS | CONTROLS)[kind]
        kind = "zero_one_adam" if kind in CONTROLS else kind
        optimizer = {"kind": kind, "learning_rate": 2e-3, "b2": 0.999, **how}
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


def measure(run: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    """One run."""
    return train(HERE, run, settings_of(run, dict(sources)))


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
            rows.append("| " + " | ".join((*cells, mean_and_range(values), gap, spread)) + " |")
    return rows


def plot(results: dict[str, dict]) -> None:
    """Validation loss over rows seen, every run, a panel for each task."""
    groups = [group for group in GROUPS if any(run.startswith(f"{group}-") for run in results)]
    figure = Figure(figsize=(4.2 * len(groups), 3.6), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    colors = dict(zip(TITLES, ("C0", "C1", "C2", "C3", "C4", "C0", "C1"), strict=True))
    for axes, group in zip(panels, groups, strict=True):
        for run, result in results.items():
            if not run.startswith(f"{group}-"):
                continue
            name = run.split("-")[1]
            label = TITLES[name] if run.endswith("-0") else None
            seen = [point[0] * result["batch_size"] for point in result["validation"]]
            axes.plot(seen, [point[-1] for point in result["validation"]], color=colors[name], lw=1, label=label)
        axes.set(title=group, xlabel="rows", ylabel="validation loss, nats per token")
        axes.legend(fontsize=8)
    figure.savefig(HERE / "plot.png", dpi=120)


def finish(results: dict[str, dict[str, Any]]) -> list[str]:
    """The table's lines; draws plot.png."""
    plot(results)
    return table(results)


if __name__ == "__main__":
    main(HERE, all_runs(), measure, finish, books=BOOKS, about=__doc__ or "")
