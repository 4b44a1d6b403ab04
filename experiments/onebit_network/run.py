"""One-bit optimizers over a network of limited speed, beside float32 and DeepSpeed: one JSON a run in results/.

    sudo .venv/bin/python experiments/onebit_network/run.py            every run that is not in results/; the report
    sudo .venv/bin/python experiments/onebit_network/run.py --list     the runs, and which are done
    sudo .venv/bin/python experiments/onebit_network/run.py --quick collective-100-mbit-s    short, nothing written

Needs Linux, root (network namespaces), iproute2, and for DeepSpeed a C++ compiler. A run takes at most 4 minutes.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import collective
import training
import yaml
from machine import busy_before
from network import check_rights
from report import report

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import MOST_OTHER_CORES, machine, python_with, stop_on_sigterm

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "onebit_network"
BASE = ["torch==2.13.0", "numpy", "setuptools", "wheel", "ninja"]
COLLECTIVES = ("collective", "collective-four")
DEEPSPEED = "deepspeed==0.19.6"  # the last release with these optimizers


def deepspeed_python() -> Path:
    """A Python with DeepSpeed, in an environment of its own; it wants torch there before it is built."""
    folder = CACHE / "venv"
    python, done = python_with(BASE, folder), folder / "deepspeed"
    if not done.exists():
        install = [python, "-m", "pip", "install", "-qq", "--no-build-isolation", DEEPSPEED]
        subprocess.run(install, check=True, env=os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"})
        done.touch()
    return python


def slug(*words: str) -> str:
    """A file's name.

    Example:
        >>> slug("collective", "1 Gbit/s")
        'collective-1-gbit-s'
    """
    return "-".join(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words)


def runs(config: dict[str, Any], peer: Callable[[], Path]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what measures it."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    measure = lambda case, rate: collective.measure(config, case=case, rate=rate, peer_python=peer())
    for case in COLLECTIVES:
        for rate_name in config[case]["rates"]:
            found[slug(case, rate_name)] = partial(measure, case, config["rates"][rate_name])
    for case in config["training"]["cases"]:
        for rate_name in config["training"]["rates"]:
            rate = config["rates"][rate_name]
            found[slug("training", case, rate_name)] = partial(training.measure, config, case=case, rate=rate)
    return found


def shortened(config: dict[str, Any]) -> dict[str, Any]:
    """The same with two blocks."""
    return config | {part: config[part] | {"blocks": 2} for part in (*COLLECTIVES, "training")}


def one(name: str, measure: Callable[[], dict[str, Any]], *, write: bool) -> None:
    """Measure a run, unless others use the machine; write it down."""
    if write and (busy := busy_before()) > MOST_OTHER_CORES:
        raise SystemExit(f"other programs keep {busy:.2f} cores busy: run it again on an idle machine (or --quick)")
    print(name, flush=True)
    result = measure()
    print(json.dumps(result["summary"], indent=1))
    if not write:
        return
    if result["other_cores"] > MOST_OTHER_CORES:
        raise SystemExit(f"other programs kept {result['other_cores']:.2f} cores busy meanwhile: nothing written")
    result |= {"when": datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ"), "machine": machine()}
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    stop_on_sigterm()
    parser = argparse.ArgumentParser(description="One-bit optimizers over a network of limited speed.")
    parser.add_argument("runs", nargs="*", help="names of runs (default: all that are not in results/)")
    parser.add_argument("--list", action="store_true", help="name the runs")
    parser.add_argument("--quick", action="store_true", help="two blocks, also on a busy machine; writes nothing")
    parser.add_argument(
        "--peer-python", type=Path, metavar="PATH", help=f"a Python with {DEEPSPEED} (default: makes one)"
    )
    options = parser.parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    config = shortened(config) if options.quick else config
    known = runs(config, lambda: options.peer_python or deepspeed_python())
    done = {path.stem for path in (HERE / "results").glob("*.json")}
    if options.list:
        print("\n".join(f"{name}{'  (done)' if name in done else ''}" for name in known))
        return
    if unknown := set(options.runs) - set(known):
        parser.error(f"no run {', '.join(sorted(unknown))}; --list names them")
    check_rights()
    for name in options.runs or known:
        if options.quick or name not in done:
            one(name, known[name], write=not options.quick)
    if not options.quick:
        report()


if __name__ == "__main__":
    main()
