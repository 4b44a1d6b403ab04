"""8 times the batch and 4 or 40 times the learning rate, with and without growing rows; then the table and the plot.

python experiments/length_warmup_stability/run.py [english_novels.tar.xz] [--runs long-0 ...] [--list]
"""

import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from training_runs import ROOT, main, mean_and_range, train

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore

HERE = Path(__file__).parent
BOOKS, SEEDS = 20, range(5)
TITLES = {
    "small": "8 rows, learning rate r",
    "long": "64 rows, 4 r",
    "growing": "64 rows, 4 r, rows grow from 8 to 128",
    "far_long": "64 rows, 40 r",
    "far_growing": "64 rows, 40 r, rows grow from 8 to 128",
}
RUNS = [f"{kind}-{seed}" for seed in SEEDS for kind in TITLES]
TOKENS, LENGTH, RATE, LARGE = 819_200, 128, 1.5e-3, 64  # RATE is r, as in config.yaml


def settings_of(run: str) -> dict[str, Any]:
    """Settings that differ from config.yaml."""
    kind, seed = run.split("-")
    settings: dict[str, Any] = {"seed": seed, "data.shuffle_seed": seed}
    if kind == "small":
        return settings | {"evaluate.every": 80, "checkpoint.every": 80, "checkpoint.keep_every": 80}
    settings |= {"train.batch_size": LARGE, "optimizer.learning_rate": (40 if "far" in kind else 4) * RATE}
    if "growing" in kind:
        steps = round(0.4 * TOKENS / (LARGE * LENGTH))
        settings["curriculum"] = f"{{length: {{min: 8, schedule: {{kind: fixed_linear, steps: {steps}}}}}}}"
    return settings


def measure(run: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    """One run, and the largest element of Adam's variance at each of its checkpoints, which are removed then."""
    result = train(HERE, run, {**sources, **settings_of(run)})
    folder = ROOT / "runs" / HERE.name / run / "checkpoints"
    store = CheckpointStore(folder, CheckpointConfig())
    largest = []
    for step in store.steps():
        shapes = {
            name: jax.ShapeDtypeStruct(
                tuple(shape), dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            )
            for name, (shape, dtype) in store.tensors(step).items()
            if ".nu." in name
        }
        values = store.restore(step, shapes, partial=True)
        largest.append([step, math.sqrt(max(float(np.max(np.asarray(value))) for value in values.values()))])
    store.close()
    shutil.rmtree(folder)
    return result | {"largest_variance_root": largest}


def spikes(result: Mapping[str, Any]) -> int:
    """Count the rises of the validation loss by more than a tenth above its lowest so far; nan counts."""
    lowest, found = math.inf, 0
    for _, _, loss in result["validation"]:
        found += not loss <= 1.1 * lowest
        lowest = min(lowest, loss) if math.isfinite(loss) else lowest
    return found


def diverged(result: Mapping[str, Any]) -> bool:
    """Whether its last validation loss is above that after a tenth of the run, or no number."""
    first = result["validation"][max(0, len(result["validation"]) // 10)][2]
    last = result["validation_loss"]
    return last is None or not last <= first


def finish(results: dict[str, dict[str, Any]]) -> list[str]:
    """The table's lines; draws plot.png."""
    plot(results)
    lines = [
        "| run | seeds | validation loss, mean (range) | spikes | largest gradient norm | largest root of variance |"
    ]
    lines[0] += " diverged |"
    lines.append("|---" * 7 + "|")
    for kind, title in TITLES.items():
        some = [results[run] for seed in SEEDS if (run := f"{kind}-{seed}") in results]
        if not some:
            continue
        losses = mean_and_range([result["validation_loss"] for result in some])
        norms = max(max(x for x in result["grad_norm"] if math.isfinite(x)) for result in some)
        roots = max(root for result in some for _, root in result["largest_variance_root"])
        count, seeds = sum(map(diverged, some)), f"{len(some)} of {len(SEEDS)}"
        cells = (
            title,
            seeds,
            losses,
            sum(map(spikes, some)),
            f"{norms:.3g}",
            f"{roots:.3g}",
            f"{count} of {len(some)}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def plot(results: dict[str, dict[str, Any]]) -> None:
    """Validation loss, gradient norms and the root of the largest variance, over tokens, every run."""
    figure = Figure(figsize=(12.6, 3.8), layout="constrained")
    loss, norm, variance = figure.subplots(1, 3)
    for number, (kind, title) in enumerate(TITLES.items()):
        for seed in SEEDS:
            if (run := f"{kind}-{seed}") not in results:
                continue
            result, style = results[run], {"color": f"C{number}", "lw": 1, "label": title if seed == 0 else None}
            loss.plot([p[1] for p in result["validation"]], [p[2] for p in result["validation"]], **style)
            norm.plot(np.linspace(0, 1, len(result["grad_norm"])), result["grad_norm"], **style)
            steps, roots = zip(*result["largest_variance_root"], strict=True)
            variance.plot(np.array(steps) / steps[-1], roots, **style)
    loss.set(xlabel="effective tokens", ylabel="validation loss, nats per token")
    norm.set(xlabel="share of the steps", ylabel="gradient norm before clipping", yscale="log")
    variance.set(xlabel="share of the steps", ylabel="root of the largest variance", yscale="log")
    if loss.lines:
        loss.legend(fontsize=7)
    figure.savefig(HERE / "plot.png", dpi=120)


if __name__ == "__main__":
    main(HERE, RUNS, measure, finish, books=BOOKS, about=__doc__ or "")
