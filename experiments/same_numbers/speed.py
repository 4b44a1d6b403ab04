"""Speed of two checkouts, alternating: training as pretraining_speed does it, generation as generation_speed.

    .venv/bin/python experiments/same_numbers/speed.py --before CHECKOUT [--after CHECKOUT] [--pairs 7]

Both sides are dsjax, each with its own .venv and its own worker script of these experiments. The one whose turn it is
not is stopped; pairs alternate in their order (ABBA), and the ratio is taken pair by pair, so that a slow drift of the
machine cancels. Writes results/speed.json.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "pretraining_speed"))
from protocol import Job
from run import SIDES, SMOLLM2, WORK, Checkout  # of this folder: a script's own folder comes first
from side_by_side import PAGES, Worker, machine, stop_on_sigterm, timed, worker

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parent
TARGET = 0.97


def pairs_of(workers: Mapping[str, Worker], count: int, command: str, **message: Any) -> list[dict[str, float]]:
    """Seconds of each side, the ratio before / after (above 1: faster than before), and the cores others kept busy."""
    pairs = []
    for number in range(count):
        pair = {"other_cores": 0.0}
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            if command == "steps":
                timed(workers[side], command, steps=1)  # caches are cold after a pause
            answer = timed(workers[side], command, **message)
            pair[side] = answer["seconds"]
            pair["other_cores"] = max(pair["other_cores"], answer["other_cores"])
        pair["ratio"] = pair["before"] / pair["after"]
        pairs.append(pair)
    return pairs


def both(
    checkouts: Mapping[str, Path], script: str, folder: Path, threads: int, load: Mapping[str, Any], cases: Any
) -> dict[str, list[dict[str, float]]]:
    """Pairs by case; `cases`: workers -> pairs by case, called when both sides are loaded."""
    names = ("OMP_NUM_THREADS", "NPROC")
    environment = dict.fromkeys(names, str(threads)) | PAGES["2 MiB"]
    command = {side: [str(at / ".venv/bin/python"), str(at / "experiments" / script)] for side, at in checkouts.items()}
    start = lambda side: worker(side, command[side], log=folder / f"{side}.log", environment=environment)
    with start("before") as before, start("after") as after:
        workers = {"before": before, "after": after}
        for each in workers.values():
            each.ask("load", **load)
            each.pause()
        return cases(workers)


def training(checkouts: Mapping[str, Path], count: int) -> dict[str, list[dict[str, float]]]:
    """Blocks of training steps of both model sizes."""
    config = yaml.safe_load((EXPERIMENTS / "pretraining_speed" / "config.yaml").read_text())
    found = {}
    for name, sizes in config["models"].items():
        with tempfile.TemporaryDirectory() as temporary:
            tokens = Path(temporary) / "tokens.npy"
            shape = (8, sizes["batch"], sizes["length"] + 1)
            np.save(tokens, np.random.default_rng(0).integers(0, config["vocab_size"], shape).astype(np.int32))
            job = Job(vocab_size=config["vocab_size"], optimizer=config["optimizer"], tokens=str(tokens), **sizes)

            def cases(workers: Mapping[str, Worker], name: str = name) -> dict[str, list[dict[str, float]]]:
                for each in workers.values():
                    timed(each, "steps", steps=2)  # compiles
                return {f"training, {name}": pairs_of(workers, count, "steps", steps=config["steps_per_block"])}

            load = vars(job)
            found |= both(checkouts, "pretraining_speed/jax_worker.py", Path(temporary), config["threads"], load, cases)
    return found


def generation(checkouts: Mapping[str, Path], count: int) -> dict[str, list[dict[str, float]]]:
    """Calls of every case of generation_speed."""
    config = yaml.safe_load((EXPERIMENTS / "generation_speed" / "config.yaml").read_text())
    text = (EXPERIMENTS / "generation_speed" / "text.txt").read_text()

    def cases(workers: Mapping[str, Worker]) -> dict[str, list[dict[str, float]]]:
        found = {}
        tokens = timed(workers["after"], "encode", text=text)["tokens"]
        for name, case in config["cases"].items():
            rows = [tokens[7 * row : 7 * row + case["prompt"]] for row in range(case["rows"])]
            message = {"tokens": rows, "new_tokens": case["new_tokens"]}
            written = [timed(workers[side], "run", **message)["tokens"] for side in SIDES]  # compiles
            assert written[0] == written[1], f"{name}: the two sides write other tokens"
            found[f"generation, {name}"] = pairs_of(workers, count, "run", **message)
        return found

    load = {"path": str(SMOLLM2), "threads": config["threads"], "platform": "cpu"}
    with tempfile.TemporaryDirectory() as temporary:
        return both(checkouts, "generation_speed/jax_worker.py", Path(temporary), config["threads"], load, cases)


def show(results: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    table = Table(title="Speed: seconds before / seconds after; above 1 is faster than before", width=100)
    for column in ("case", "median ratio", "smallest", "largest", "seconds before", "seconds after"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, pairs in results.items():
        ratios = [pair["ratio"] for pair in pairs]
        seconds = [f"{statistics.median(pair[side] for pair in pairs):.3f}" for side in SIDES]
        table.add_row(name, f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}", f"{max(ratios):.3f}", *seconds)
    Console(width=100).print(table)


def main() -> int:
    stop_on_sigterm()
    parser = argparse.ArgumentParser(description="Speed of two checkouts, alternating.")
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--after", type=Path, default=EXPERIMENTS.parent, metavar="CHECKOUT")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    checkouts = {side: getattr(options, side).resolve() for side in SIDES}
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    WORK.mkdir(parents=True, exist_ok=True)
    commits = {side: Checkout.of(path).commit for side, path in checkouts.items()}
    results = training(checkouts, options.pairs) | generation(checkouts, options.pairs)
    medians = {name: statistics.median(pair["ratio"] for pair in pairs) for name, pairs in results.items()}
    record = {"machine": machine(), "commits": commits, "target": TARGET, "medians": medians, "pairs": results}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "speed.json").write_text(json.dumps(record, indent=1))
    show(results)
    return int(min(medians.values()) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
