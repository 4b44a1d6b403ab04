"""A run whose programs are compiled ahead, beside the same run that compiles each when it needs it, in turns.

python experiments/compile_ahead/run.py [--quick]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import MOST_OTHER_CORES, busy_seconds, machine, write_between_marks

HERE = Path(__file__).parent
REPEATS = 3
SIDES = {"ahead": "ahead", "when needed": "when-needed", "again": "again"}
"""Title -> what the child is told."""


def child(side: str, folder: Path, overrides: list[str]) -> None:
    """One run in a process of its own; prints what came of it."""
    import dsjax.train
    from dsjax.config.load import load_run
    from dsjax.observe.trackers import METRICS_FILE, read_metrics
    from dsjax.setup.dispatch import Gradients

    if side == "when-needed":
        Gradients.compile_soon = lambda *_, **__: None  # type: ignore[method-assign]
    began = time.perf_counter()
    dsjax.train.run(load_run(HERE / "config.yaml", overrides), run_dir=folder)
    seconds = time.perf_counter() - began
    rows = read_metrics(folder / METRICS_FILE)
    print(
        json.dumps(
            {
                "side": side,
                "seconds": seconds,
                "step_seconds": [row["step_seconds"] for row in rows],
                "compiled": [row["step"] for row in rows if row.get("compiled")],
                "stalls": {row["step"]: row["stall_seconds"] for row in rows if "stall_seconds" in row},
                "sizes": [[row["length"], row["kept"]] for row in rows],
                "losses": [row["loss"] for row in rows],
            }
        )
    )


def run(side: str, cache: Path, overrides: list[str]) -> dict[str, Any]:
    """A child, with a compilation cache that is empty but for the side that comes again."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--child", side, "--folder", f"{folder}/run", *overrides]
        before, ours, began = busy_seconds(), _cpu_of_children(), time.perf_counter()
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        passed = time.perf_counter() - began
    result = json.loads(done.stdout.strip().splitlines()[-1])
    others = busy_seconds() - before - (_cpu_of_children() - ours)
    return result | {"other_cores": max(0.0, others) / passed}


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def summary(result: dict[str, Any]) -> dict[str, float]:
    """Figures of one run: what it took, what waited, and its slowest step of no new size beside its neighbours."""
    timed = [
        (tuple(size), seconds)
        for step, (size, seconds) in enumerate(zip(result["sizes"], result["step_seconds"], strict=True), start=1)
        if step not in result["compiled"]
    ]
    per_size: dict[tuple[int, ...], list[float]] = {}
    for size, seconds in timed:
        per_size.setdefault(size, []).append(seconds)
    slowest = max(seconds / statistics.median(per_size[size]) for size, seconds in timed)
    first, *later = list(result["stalls"].values()) or [0.0]
    return {
        "seconds": result["seconds"],
        "first": first,
        "later": sum(later),
        "longest": max(later, default=0.0),
        "slowest": slowest,
    }


def report(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The README's lines."""
    lines = ["| programs compiled | whole run, s | stall of the first step, s | of all later ones, s | longest, s |"]
    lines[0] += " slowest step, of the median of its size |"
    lines.append("|---" * 6 + "|")
    medians = {}
    for side, runs in results.items():
        found = [summary(result) for result in runs]
        medians[side] = {name: statistics.median(one[name] for one in found) for name in found[0]}
        span = lambda name, found=found: (
            f"{min(one[name] for one in found):.2f} to {max(one[name] for one in found):.2f}"
        )
        cells = [f"{median:.2f} ({span(name)})" for name, median in medians[side].items()]
        lines.append("| " + " | ".join([side, *cells]) + " |")
    needed, ahead = medians["when needed"], medians["ahead"]
    base = medians["again"]["seconds"] - medians["again"]["first"] - medians["again"]["later"]
    cost = (ahead["seconds"] - base) / (needed["seconds"] - base)
    lines += ["", f"**Compiling ahead costs {cost:.0%} of compiling when needed** (over a run that compiles nothing)."]
    return lines


def main() -> None:
    """Run what is asked, record, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat of 60 steps, also on a busy machine")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.overrides)
        return
    how = [f"data.cache_dir={HERE.parents[1] / '.cache' / HERE.name}"]
    if options.quick:
        how += ["train.steps=60", "curriculum.length.schedule.steps=30", "random_ltd.steps=45"]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(1 if options.quick else REPEATS):
        with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as warm:
            results["ahead"].append(run("ahead", Path(cold), how))
            results["again"].append(run("again", Path(cold), how))
            results["when needed"].append(run("when-needed", Path(warm), how))
    print("\n".join(report(results)))
    others = max(r["other_cores"] for runs in results.values() for r in runs)
    if options.quick:
        return
    if others > MOST_OTHER_CORES:
        raise SystemExit(f"other programs kept {others:.2f} cores busy: run it on an idle machine")
    (HERE / "results").mkdir(exist_ok=True)
    recorded = {"runs": results, "machine": machine(), "other_cores": others}
    (HERE / "results" / "cpu.json").write_text(json.dumps(recorded) + "\n")
    write_between_marks(HERE / "README.md", report(results))


if __name__ == "__main__":
    main()
