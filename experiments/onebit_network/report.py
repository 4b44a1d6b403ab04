"""From results/*.json to the tables in README.md and plot.png; `python report.py` makes both anew."""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import write_between_marks

HERE = Path(__file__).parent
CONFIG = yaml.safe_load((HERE / "config.yaml").read_text())
NOT_RUN = "not run"


def results(kind: str) -> list[dict[str, Any]]:
    """The runs of a kind, fewest processes first, slowest network last."""
    found = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob(f"{kind}-*.json"))]
    return sorted(found, key=lambda run: (processes(run), -(run["rate"] or float("inf"))))


def processes(run: dict[str, Any]) -> int:
    """Of each program; the first runs, which do not say it, had two."""
    return run.get("processes", 2)


def rate_name(rate: float | None) -> str:
    """As config.yaml calls it."""
    return next(name for name, value in CONFIG["rates"].items() if value == rate)


def milliseconds(figures: dict[str, float]) -> str:
    """Median and spread."""
    return f"{1e3 * figures['median']:.0f} ({1e3 * figures['smallest']:.0f} to {1e3 * figures['largest']:.0f})"


def payload(run: dict[str, Any], side: str) -> float:
    """Bytes that one process sends in a call, from the compiled program: a buffer but its own part, twice to reduce."""
    others = 1 - 1 / processes(run)
    rows = run["about"]["jax"]["collectives"][side]
    return sum(row[-1] * others * (2 if row[0] == "all-reduce" else 1) for row in rows)


def collective_lines() -> list[str]:
    """The table of the one collective."""
    targets = CONFIG["collective"]["targets"]
    lines = [
        "| network | processes | ours, ms | its messages alone | these by all-to-all and all-gather | float32, ms "
        "| DeepSpeed, ms | against float32 (target) | against DeepSpeed (target) | sent MB, over payload |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in results("collective"):
        sides, name = run["summary"], rate_name(run["rate"])
        ours, aims = sides["one_bit"], targets if processes(run) == 2 else {}
        cells = [name, str(processes(run)), milliseconds(ours)]
        # Of more than two processes the messages are these exchanges.
        cells += [milliseconds(sides[side]) if side in sides else "" for side in ("messages", "exchanges")]
        cells += [milliseconds(sides[side]) for side in ("float32", "deepspeed")]
        for side, aim in (("float32", aims.get(name)), ("deepspeed", aims.get("deepspeed"))):
            ratio = f"**{sides[side]['median'] / ours['median']:.1f}**"
            cells.append(ratio if aim is None else f"{ratio} ({aim})")
        over = ours["sent_bytes"] / payload(run, "one_bit") - 1
        cells.append(f"{ours['sent_bytes'] / 1e6:.3f}, {over:+.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else [NOT_RUN]


def training_lines() -> list[str]:
    """The table of whole steps: for each optimizer the mean of the steps in its turns, and what crosses the network."""
    lines = [
        "| network | optimizer | seconds a step | of which stages | times as fast | sent MB a step | planned |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results("training"):
        slowest = max(side["mean"]["seconds"] for side in run["summary"].values())
        for side, figures in run["summary"].items():
            stages, mean = figures["stages"], figures["mean"]
            steps = sum(stage["steps"] for stage in stages.values())
            planned = run["about"][side]["planned"]
            expected = (
                sum(stage["steps"] * planned[name] for name, stage in stages.items()) / steps if planned else None
            )
            parts = ", ".join(f"{name} {stage['median']:.2f}" for name, stage in stages.items())
            cells = [rate_name(run["rate"]), side, f"{mean['seconds']:.2f}", parts]
            cells += [f"**{slowest / mean['seconds']:.2f}**", f"{mean['sent'] / 1e6:.2f}"]
            cells.append("" if expected is None else f"{expected / 1e6:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else [NOT_RUN]


def about_lines() -> list[str]:
    """When and on what, and the comparison of results."""
    lines = []
    collectives = {processes(run): run for run in reversed(results("collective"))}
    for number, run in sorted(collectives.items()):
        versions = run["about"]["jax"]["versions"] | run["about"]["deepspeed"]["versions"]
        differ = [f"{part['largest_relative_difference']:.0e} of {part['values']:,} values" for part in run["check"]]
        share = min(1, run["machine"]["cores"] / number)
        cores = "one core" if share == 1 else f"{share:g} of a core"
        lines.append(
            f"{run['when']}, {run['machine']['cpu']}, {cores} a process; jax {versions['jax']}, DeepSpeed "
            f"{versions['deepspeed']}, torch {versions['torch']}. Ours in DeepSpeed's scheme and DeepSpeed on the same "
            f"inputs, {number} processes, {run['check'][0]['rounds']} rounds: scales differ by {', by '.join(differ)}."
        )
    for run in results("training")[:1]:
        sizes = {side["parameters"] for side in run["about"].values()}
        lines.append(f"Training: {'/'.join(f'{size:,}' for size in sizes)} parameters, {run['tokens_per_step']} tokens")
        lines[-1] += " a step, a half in each process."
    busy = [run["other_cores"] for kind in ("collective", "training") for run in results(kind)]
    return [*lines, f"Other programs took at most {max(busy):.2f} cores."] if busy else []


def plot() -> None:
    """Time of a call by rate, and of a step by optimizer and rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    labels = {"one_bit": "dsjax, 1 bit", "deepspeed": "DeepSpeed, 1 bit", "float32": "JAX, float32"}
    runs = [run for run in results("collective") if processes(run) == 2]
    for side, label in labels.items():
        medians = [run["summary"][side]["median"] for run in runs]
        left.plot(range(len(runs)), medians, marker="o", label=label)
    left.set_xticks(range(len(runs)), [rate_name(run["rate"]) for run in runs])
    left.set(yscale="log", ylabel="seconds", title="one mean of 16.8 million numbers, two processes")
    trained = [run for run in results("training") if run["case"] == "adam"]
    for side in CONFIG["training"]["cases"]["adam"]:
        means = [run["summary"][side]["mean"]["seconds"] for run in trained]
        right.plot(range(len(trained)), means, marker="o", label=side)
    right.set_xticks(range(len(trained)), [rate_name(run["rate"]) for run in trained])
    right.set(ylabel="seconds", title="one training step")
    for ax in (left, right):
        ax.legend()
    figure.tight_layout()
    figure.savefig(HERE / "plot.png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def report() -> None:
    """Rewrite README.md between its marks, and the plot."""
    lines = [*collective_lines(), "", *training_lines(), "", *about_lines()]
    if results("collective") or results("training"):
        plot()
        lines += ["", "![times by the network's rate](plot.png)"]
    write_between_marks(HERE / "README.md", lines)


if __name__ == "__main__":
    report()
