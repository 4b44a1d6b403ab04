"""Curriculum, random-LTD and both, with all, two thirds and half of the data; then the table and the plot.

python experiments/data_efficiency/run.py [english_novels.tar.xz] [--runs both-50-0 ...] [--list]
"""

import itertools
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from training_runs import main, mean_and_range, train

HERE = Path(__file__).parent
BOOKS = 20
SEEDS = range(3)
TOKENS, RATE, ROWS, LENGTH, LAYERS = 1_228_800, 1e-3, 16, 256, 6
SHARES = (100, 67, 50)
TITLES = {
    "baseline": "plain",
    "curriculum": "curriculum",
    "ltd": "random-LTD",
    "both": "both",
    "steps": "plain, as many steps as both",
}
RUNS = [f"{method}-{share}-{seed}" for method in TITLES for share in SHARES for seed in SEEDS]


def settings_of(run: str) -> dict[str, Any]:
    """Settings that differ from config.yaml: schedules are the shares of the nominal steps that GPT-3's recipe has."""
    method, share, seed = run.split("-")
    tokens = TOKENS * int(share) // 100
    nominal = tokens // (ROWS * LENGTH)
    settings = {
        "seed": seed,
        "data.shuffle_seed": seed,
        "train.tokens": tokens,
        "optimizer.learning_rate": RATE * 100 / int(share),  # as the paper: in proportion to 1 / data
    }
    curriculum = round(0.38 * nominal)
    if method in ("curriculum", "both"):
        rarity = f"{{metric: vocab_rarity, min: 1, max: 100, schedule: {{kind: fixed_root, steps: {curriculum}}}}}"
        length = f"{{min: 16, schedule: {{kind: fixed_linear, steps: {curriculum}}}}}"
        settings["curriculum"] = f"{{difficulty: [{rarity}], length: {length}}}"
    if method in ("ltd", "both"):
        settings["random_ltd"] = f"{{min_kept: 32, quantum: 16, steps: {round(0.7 * nominal)}}}"
    if method == "steps":
        settings |= fewer_rows(share, tokens)
    return settings


def fewer_rows(share: str, tokens: int) -> dict[str, Any]:
    """The plain run with as many optimizer steps as both methods take for the same tokens, so with smaller batches."""
    from dsjax.config.load import load_run
    from dsjax.setup.resolve import resolved, schedule_of

    both = settings_of(f"both-{share}-0")
    steps = schedule_of(
        resolved(load_run(HERE / "config.yaml", [f"{key}={value}" for key, value in both.items()]))
    ).num_steps
    return {"train.batch_size": round(tokens / (steps * LENGTH))}


def measure(run: str, sources: Mapping[str, Any]) -> dict[str, Any]:
    """One run."""
    return train(HERE, run, {**sources, **settings_of(run)})


def finish(results: dict[str, dict[str, Any]]) -> list[str]:
    """The table's lines; draws plot.png."""
    plot(results)
    lines = ["| method | data | seeds | steps | validation loss, mean (range) | gap to plain at 100 % | FLOPs saved |"]
    lines.append("|---" * 7 + "|")
    losses = lambda method, share: [
        results[run]["validation_loss"] for seed in SEEDS if (run := f"{method}-{share}-{seed}") in results
    ]
    whole = losses("baseline", 100)
    for method, title in TITLES.items():
        for share in SHARES:
            if not (some := losses(method, share)):
                continue
            one = next(r for run, r in results.items() if run.startswith(f"{method}-{share}-"))
            gap = f"{statistics.mean(some) - statistics.mean(whole):+.4f}" if whole else ""
            seeds = f"{len(some)} of {len(SEEDS)}"
            saved = f"{one['saving']:.1%}"
            lines.append(
                f"| {title} | {share} % | {seeds} | {one['steps']:,} | {mean_and_range(some)} | {gap} | {saved} |"
            )
    return lines + crossing(
        [(share, statistics.mean(some)) for share in SHARES if (some := losses("both", share))], whole
    )


def crossing(both: list[tuple[int, float]], whole: list[float]) -> list[str]:
    """Where both methods reach the mean loss of the plain run with all data, on straight lines between shares."""
    for (more, better), (less, worse) in itertools.pairwise(both if whole else []):
        target = statistics.mean(whole)
        if better <= target < worse:
            share = less + (more - less) * (worse - target) / (worse - better)
            return ["", f"**Both methods reach the loss of plain training with all data at {share:.0f} % of it.**"]
    return []


def plot(results: dict[str, dict[str, Any]]) -> None:
    """Validation loss over effective tokens, every run, a panel for each share of the data."""
    figure = Figure(figsize=(4.2 * len(SHARES), 3.8), layout="constrained")
    panels = figure.subplots(1, len(SHARES), sharey=True)
    for axes, share in zip(panels, SHARES, strict=True):
        for number, (method, title) in enumerate(TITLES.items()):
            for seed in SEEDS:
                if (run := f"{method}-{share}-{seed}") in results:
                    points = results[run]["validation"]
                    label = title if seed == 0 else None
                    tokens, losses = [p[1] / 1e6 for p in points], [p[2] for p in points]
                    axes.plot(tokens, losses, color=f"C{number}", lw=1, label=label)
        axes.set(title=f"{share} % of the data", xlabel="effective tokens, millions")
        if axes.lines:
            axes.legend(fontsize=7)
    panels[0].set_ylabel("validation loss, nats per token")
    figure.savefig(HERE / "plot.png", dpi=120)


if __name__ == "__main__":
    main(HERE, RUNS, measure, finish, books=BOOKS, about=__doc__ or "")
