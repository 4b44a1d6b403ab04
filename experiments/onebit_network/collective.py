"""One run of the collective's benchmark at one rate: W processes of each program, that take turns."""

import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import Others
from network import Network

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import Worker, ask_all, worker

HERE = Path(__file__).parent
PORTS = {"jax": 29400, "deepspeed": 29500}
WITHIN = 200.0  # seconds for one answer
IDLE_SECONDS = 3.0
# What is timed, and in which program.
SIDES = {"one_bit": "jax", "messages": "jax", "exchanges": "jax", "float32": "jax", "deepspeed": "deepspeed"}
# At CHECKED values sums of squares differ in their last bits, and a value that close to zero may change its sign: it
# then differs by twice the scale, and makes up for it in the next round. At the size that is timed torch's float32 norm
# is 6e-4 off (it adds up in one row), so that there the scales differ by that.
CHECKED = 65536
LARGEST_DIFFERENCE = {CHECKED: 2e-5}
LARGEST_AT_FULL_SIZE = 5e-3


@contextlib.contextmanager
def processes(
    network: Network, name: str, command: list[str], *, folder: Path, environment: dict[str, str]
) -> Iterator[list[Worker]]:
    """One process of a program in each namespace, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with contextlib.ExitStack() as stack:
        workers = []
        for rank in range(network.plan.size):
            own = ["taskset", "-c", str(cores[rank % len(cores)]), *command]
            variables = {name: value.format(rank=rank) for name, value in environment.items()}
            variables["PYTHONPATH"] = os.pathsep.join(paths)
            log = folder / f"{name.replace('/', '-')}-{rank}.log"
            started = worker(f"{name} {rank}", network.inside(rank, own), log=log, environment=variables)
            workers.append(stack.enter_context(started))
        yield workers


def environments(network: Network, group: int = 0) -> dict[str, dict[str, str]]:
    """Addresses by which a program's processes find one another; groups of the same program have numbers."""
    first, size = network.plan.address(0), str(network.plan.size)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), "1")
    names = {
        "DSJAX_COORDINATOR": f"{first}:{PORTS['jax'] + group}",
        "DSJAX_NUM_PROCESSES": size,
        "DSJAX_PROCESS_ID": "{rank}",
    }
    torch = {"MASTER_ADDR": first, "MASTER_PORT": str(PORTS["deepspeed"]), "WORLD_SIZE": size, "RANK": "{rank}"}
    return {"jax": {**one_thread, **names, "JAX_PLATFORMS": "cpu"}, "deepspeed": {**one_thread, **torch}}


def compared(folder: Path, groups: dict[str, list[Worker]], *, values: int, rounds: int) -> dict[str, float]:
    """Both programs' means of the same inputs; AssertionError when they are not the same scheme's."""
    found = {}
    for name, workers in groups.items():
        files = [folder / f"{name}-{rank}.npy" for rank in range(len(workers))]
        ask_all(workers, "results", within=WITHIN, values=values, rounds=rounds, path=str(folder / name))
        first, *others = (np.load(file) for file in files)
        assert all(np.array_equal(first, other) for other in others), f"the processes of {name} have different means"
        found[name] = first
        for file in files:
            file.unlink()
    ours, theirs = found["jax"], found["deepspeed"]
    flipped = float(np.mean((ours < 0) != (theirs < 0)))
    difference = float(np.abs(np.abs(ours) - np.abs(theirs)).max() / np.abs(theirs).max())
    allowed = LARGEST_DIFFERENCE.get(values, LARGEST_AT_FULL_SIZE)
    assert difference < allowed and flipped < allowed, f"{values} values: differ by {difference}, signs {flipped}"
    return {"values": values, "rounds": rounds, "largest_relative_difference": difference, "signs_that_differ": flipped}


def turns(groups: dict[str, list[Worker]], config: dict[str, Any], others: Others) -> dict[str, list[dict[str, Any]]]:
    """Turns of every side; the order changes from block to block."""
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES if side in config["calls"]}
    for number in range(config["blocks"]):
        for side in list(sides) if number % 2 == 0 else list(reversed(sides)):
            group = groups[SIDES[side]]
            with others.watched():
                answers = ask_all(group, "calls", within=WITHIN, name=side, calls=config["calls"][side])
            slowest = [max(seconds) for seconds in zip(*(answer["calls"] for answer in answers), strict=True)]
            moved = {way: [answer[way] for answer in answers] for way in ("sent", "received")}
            sides[side].append({"seconds": slowest, **moved, "elapsed": max(answer["seconds"] for answer in answers)})
        said = (f"{side} {1e3 * statistics.median(rows[-1]['seconds']):.0f} ms" for side, rows in sides.items())
        print(f"  block {number + 1}: {', '.join(said)}", flush=True)
    return sides


def measure(config: dict[str, Any], *, case: str, rate: float | None, peer_python: Path) -> dict[str, Any]:
    """One run of a case of config.yaml; see the module."""
    commands = {"jax": [sys.executable, str(HERE / "collective_jax.py")]}
    commands["deepspeed"] = [str(peer_python), str(HERE / "collective_deepspeed.py")]
    settings = config[case]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        network = stack.enter_context(Network(settings["processes"]))
        found = environments(network)
        groups = {
            name: stack.enter_context(processes(network, name, command, folder=folder, environment=found[name]))
            for name, command in commands.items()
        }
        for workers in groups.values():
            ask_all(workers, "load", within=WITHIN, values=settings["values"], seed=config["seed"])
        about = {name: workers[0].ask("about") for name, workers in groups.items()}
        rounds, sizes = settings["check_rounds"], settings["check_values"]
        check = [compared(folder, groups, values=values, rounds=rounds) for values in sizes]
        idle = ask_all(groups["jax"], "idle", within=WITHIN, seconds=IDLE_SECONDS)
        network.shape(rate)
        others = Others()
        sides = turns(groups, settings, others)
    idle_rates = {way: max(answer[way] for answer in idle) / IDLE_SECONDS for way in ("sent", "received")}
    result = {
        "processes": settings["processes"],
        "values": settings["values"],
        "rate": rate,
        "about": about,
        "check": check,
        "idle_bytes_per_second": idle_rates,
    }
    result |= {"other_cores": others.cores(), "sides": sides, "summary": summary(sides, idle_rates)}
    return result


def summary(sides: dict[str, list[dict[str, Any]]], idle: dict[str, float]) -> dict[str, dict[str, float]]:
    """Of every side: median, smallest and largest seconds of a call, and its bytes each way without idle traffic."""
    found = {}
    for side, rows in sides.items():
        seconds = [second for row in rows for second in row["seconds"]]
        figures = {"median": statistics.median(seconds), "smallest": min(seconds), "largest": max(seconds)}
        for way in ("sent", "received"):
            calls = [(moved - idle[way] * row["elapsed"]) / len(row["seconds"]) for row in rows for moved in row[way]]
            figures[f"{way}_bytes"] = statistics.median(calls)
        found[side] = figures
    return found
