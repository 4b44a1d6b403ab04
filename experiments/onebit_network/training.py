"""One run of the training benchmark: a case's optimizers at one rate, two processes for each, that take turns."""

import contextlib
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from collective import WITHIN, environments, processes
from machine import Others
from network import Network

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import Worker, ask_all

HERE = Path(__file__).parent
NUM_PROCESSES = 2


def measure(config: dict[str, Any], *, case: str, rate: float | None) -> dict[str, Any]:
    """One run; see the module."""
    training = config["training"]
    sides = training["cases"][case]
    common = {name: training[name] for name in ("model", "rows", "clip")}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = stack.enter_context(Network(NUM_PROCESSES))
        groups: dict[str, list[Worker]] = {}
        for number, (side, settings) in enumerate(sides.items()):
            environment = environments(network, number)["jax"]
            command = [sys.executable, str(HERE / "training_jax.py")]
            group = stack.enter_context(processes(network, side, command, folder=folder, environment=environment))
            optimizer = training["optimizer"] | settings["optimizer"]
            total = settings["begin"] + training["blocks"] * settings["steps"]
            ask_all(group, "load", within=WITHIN, optimizer=optimizer, steps=total, **common)
            ask_all(group, "steps", within=WITHIN, steps=settings["begin"])  # compiles, and gets to the stages wanted
            groups[side] = group
        about = {side: group[0].ask("about") for side, group in groups.items() if side in sides}
        network.shape(rate)
        others = Others()
        found: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in sides}
        losses, elapsed = {}, dict.fromkeys(sides, 0.0)
        for number in range(training["blocks"]):
            for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
                with others.watched():
                    answers = ask_all(groups[side], "steps", within=WITHIN, steps=sides[side]["steps"])
                losses[side] = [answer["loss"] for answer in answers]
                # Not the sum of each step's slowest: in steps without messages nobody waits for the other.
                elapsed[side] += max(sum(row["step_seconds"] for row in answer["steps"]) for answer in answers)
                found[side] += [list(rows) for rows in zip(*(answer["steps"] for answer in answers), strict=True)]
                print(f"  block {number + 1}, {side}: {answers[0]['seconds'] / sides[side]['steps']:.2f} s a step")
        assert all(math.isfinite(loss) for each in losses.values() for loss in each), losses
    steps = {side: [merged(rows) for rows in each] for side, each in found.items()}
    tokens = training["rows"] * training["model"]["max_positions"]
    result = {"case": case, "rate": rate, "about": about, "tokens_per_step": tokens, "other_cores": others.cores()}
    summaries = {side: summary(each, elapsed=elapsed[side]) for side, each in steps.items()}
    return result | {"losses": losses, "steps": steps, "summary": summaries}


def merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A step of all processes: the slowest one's time, the mean of what interfaces carried."""
    assert len({row["stage"] for row in rows}) == 1, rows
    means = {way: statistics.fmean(row[way] for row in rows) for way in ("sent", "received")}
    return {"stage": rows[0]["stage"], "seconds": max(row["step_seconds"] for row in rows), **means}


def summary(steps: list[dict[str, Any]], *, elapsed: float) -> dict[str, Any]:
    """Of each stage median, smallest and largest seconds of a step and bytes a step; of all steps the means.

    Args:
        steps: of all turns, merged.
        elapsed: seconds that they took.
    """
    stages = {}
    for stage in dict.fromkeys(step["stage"] for step in steps):
        of_stage = [step for step in steps if step["stage"] == stage]
        seconds = [step["seconds"] for step in of_stage]
        figures = {"steps": len(of_stage), "median": statistics.median(seconds)}
        figures |= {"smallest": min(seconds), "largest": max(seconds)}
        figures |= {f"{way}_bytes": statistics.fmean(step[way] for step in of_stage) for way in ("sent", "received")}
        stages[stage] = figures
    means = {name: statistics.fmean(step[name] for step in steps) for name in ("sent", "received")}
    return {"stages": stages, "mean": {"seconds": elapsed / len(steps), **means}}
