"""Checks that need a GPU, in 8 minutes, most important first (README.md); installs nothing and asks no network.

    make gpu-check                              # on a machine with a GPU
    make gpu-check ARGS=--rehearse              # all of it in tiny sizes on a CPU
    python3 experiments/gpu_check/run.py --only decod --out /tmp/x

Every item of items.py runs in a fresh process with a time limit, so that one that fails, crashes, hangs or fills the
memory does not stop the others. After each the results are written, so that a run that is cut short has told the most.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from items import ITEMS, Item

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKS = HERE / "checks"
MINUTES = 8.0
FIT = 0.5  # an item is started if this share of its time limit is left at least
TAIL = 40  # lines of its log that are kept of an item that went wrong
WIDTHS = {"item": 28, "target": 20, "ours": 28, "verdict": 9, "seconds": 7}
BAD = ("missed", "failed", "not run")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run of the items.

    Attributes:
        path: of the results, JSON.
        work: a folder for inputs and compiled programs.
        rehearse: tiny sizes on a CPU.
        seconds: for all items together.
        checks: folders with the items' modules.
    """

    path: Path
    work: Path
    rehearse: bool
    seconds: float
    checks: tuple[Path, ...] = (CHECKS,)

    @property
    def logs(self) -> Path:
        """The folder with an item's whole output."""
        return self.path.parent / "logs"

    def environment(self) -> dict[str, str]:
        """Variables of an item's process: where its modules are, its platform, a compilation cache."""
        # No folder with a run.py may come before pretraining_speed, whose gpu.py imports its neighbour by this name.
        places = [*self.checks, ROOT / "experiments" / "pretraining_speed", ROOT / "experiments", ROOT]
        given = os.environ.get("PYTHONPATH", "")
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, places), *([given] if given else [])]),
            # Named, so that an item fails where JAX finds no GPU, rather than take a CPU in its place.
            "JAX_PLATFORMS": "cpu" if self.rehearse else os.environ.get("JAX_PLATFORMS", "cuda"),
            "JAX_COMPILATION_CACHE_DIR": str(self.work / "jax-cache"),
            "PYTHONUNBUFFERED": "1",
        }


def run_items(items: Iterable[Item], plan: Plan) -> list[dict[str, Any]]:
    """Run the items one after the other and write what is known after each; the entries of the results."""
    began = time.monotonic()
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    results: dict[str, Any] = {
        "kind": "rehearsal" if plan.rehearse else "gpu", "when": when, "seconds": plan.seconds,
        "python": platform.python_version(), "finished": False, "items": [],
    }  # fmt: skip
    entries = results["items"]
    plan.logs.mkdir(parents=True, exist_ok=True)
    plan.work.mkdir(parents=True, exist_ok=True)
    write(plan.path, results)
    for item in items:
        left = plan.seconds - (time.monotonic() - began)
        entries.append(run_item(item, plan, left=left, earlier=entries))
        write(plan.path, results)
        print(row(entries[-1]), flush=True)
    write(plan.path, {**results, "finished": True})
    return entries


def run_item(item: Item, plan: Plan, *, left: float, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """One item with at most `left` seconds: its entry in the results."""
    entry: dict[str, Any] = {"item": item.name, "target": item.target, "function": item.function}
    entry |= {"seconds": 0.0, "figures": {}}
    missing = [name for name in item.needs if importlib.util.find_spec(name) is None]
    if missing:
        return entry | {"ours": f"no {', '.join(missing)} here", "verdict": "skipped"}
    if left < FIT * item.limit:
        return entry | {"ours": "no time left", "verdict": "not run"}
    limit, began = min(item.limit, left), time.monotonic()
    log = plan.logs / f"{plan.path.stem}-{item.function.replace(':', '.')}.log"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {each["function"]: each["figures"] for each in earlier}
        message = {"function": item.function, "rehearse": plan.rehearse, "work": str(plan.work), "earlier": figures}
        message["limit"] = limit
        (folder / "message.json").write_text(json.dumps(message))
        code = run_process(folder, plan, log=log, limit=limit)
        result = folder / "result.json"
        answer = json.loads(result.read_text()) if result.exists() else {}
    entry |= {"seconds": round(time.monotonic() - began, 1), "figures": answer.get("figures", {})}
    lines = log.read_text(errors="replace").splitlines()
    if "ours" in answer and code == 0:
        verdict = {True: "met", False: "missed", None: "measured"}[answer["passed"]]
        entry |= {"ours": answer["ours"], "verdict": verdict}
    else:
        unseen = item.may_be_unseen and not plan.rehearse
        entry |= {"ours": reason(code, limit, lines), "verdict": "not seen" if unseen else "failed"}
    return entry if entry["verdict"] in ("met", "measured") else entry | {"log": lines[-TAIL:]}


def run_process(folder: Path, plan: Plan, *, log: Path, limit: float) -> int | None:
    """Run an item's function in a process of its own; its exit code, or None if it was stopped at the limit."""
    command = [sys.executable, str(CHECKS / "child.py"), str(folder)]
    with log.open("wb") as file:
        # A session of its own: whatever it started ends with it, and gives back its part of the GPU's memory.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=plan.environment(), cwd=ROOT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reason(code: int | None, limit: float, lines: list[str]) -> str:
    """Why an item has no outcome, in a few words."""
    if code is None:
        return f"stopped after {limit:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole: it is never half written."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def row(cells: Mapping[str, Any]) -> str:
    """A line of the table, at most 100 columns; the whole text is in the results."""
    fitted = []
    for key, width in WIDTHS.items():
        text = f"{cells[key]:.0f}" if isinstance(cells[key], float) else cells[key]
        text = text if len(text) <= width else text[: width - 3] + "..."
        fitted.append(f"{text:>{width}}" if key == "seconds" else f"{text:<{width}}")
    return "  ".join(fitted)


HEAD = row({key: key for key in WIDTHS})


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if every item that could run met its target."""
    parser = argparse.ArgumentParser(description="Checks on a GPU what only a GPU can tell, most important first.")
    parser.add_argument("--rehearse", action="store_true", help="all of it in tiny sizes on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR", help="for the results (results/)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything together ({MINUTES:g})")
    parser.add_argument("--only", default="", metavar="TEXT", help="only items with this in their name")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "gpu_check", metavar="DIR",
                        help="for inputs and compiled programs (.cache/gpu_check)")  # fmt: skip
    options = parser.parse_args(arguments)
    chosen = [item for item in ITEMS if options.only in item.name]
    if not chosen:
        parser.error(f"no item has {options.only!r} in its name: {', '.join(item.name for item in ITEMS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the item's processes end, too
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = options.out.resolve() / f"{'rehearsal' if options.rehearse else 'gpu'}-{now}.json"
    plan = Plan(path, options.work.resolve(), options.rehearse, 60 * options.minutes)
    print(HEAD, flush=True)
    entries = run_items(chosen, plan)
    print(f"\n{HEAD}\n{'-' * len(HEAD)}")
    print("\n".join(row(entry) for entry in entries))
    print(f"written: {path}")
    return int(any(entry["verdict"] in BAD for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
