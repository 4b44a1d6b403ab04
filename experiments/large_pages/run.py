"""Commands with memory in pages of 2 MiB and of 4 KiB, by turns: peak resident memory, and the time of a step.

    .venv/bin/python experiments/large_pages/run.py        results/*.json (finished runs are skipped), README's table

A process's peak is VmHWM, read from /proc while it runs; a command's is the sum of those of its processes.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import MOST_OTHER_CORES, busy_seconds, machine, write_between_marks

from dsjax.observe.memory import format_bytes
from dsjax.observe.trackers import METRICS_FILE, read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SETTINGS = {"2 MiB": {}, "4 KiB": {"DSJAX_KEEP_MEMORY": "0"}}
WARMUP = 10  # steps
SECONDS_BETWEEN_LOOKS = 0.05


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid, *(each for child in children for each in tree(int(child)))]


def peaks(pid: int, known: dict[int, int]) -> None:
    """Note the peak of resident memory so far of a process and of those below it, in bytes."""
    for each in tree(pid):
        try:
            status = Path(f"/proc/{each}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM:")]
        known[each] = max(known.get(each, 0), 1024 * int(lines[0][1]) if lines else 0)


def run(name: str, settings: dict[str, Any], pages: str) -> dict[str, Any]:
    """Run a command once and measure it."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "DSJAX_KEEP_MEMORY")
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "run", Path(temporary) / "log"
        words = {"RUN": str(folder), "SMOLLM2": str(ROOT / "models" / "smollm2-135m-instruct.gguf")}
        command = [words.get(word, word) for word in shlex.split(settings["command"])]
        known: dict[int, int] = {}
        before, began = busy_seconds(), time.perf_counter()
        usage = os.times()
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment | SETTINGS[pages], stdout=file, stderr=file
            )
            while process.poll() is None:
                peaks(process.pid, known)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        seconds, after = time.perf_counter() - began, os.times()
        if process.returncode:
            raise SystemExit(f"{name}: exit code {process.returncode}\n{log.read_text()[-2000:]}")
        ours = sum(after[:4]) - sum(usage[:4])
        result: dict[str, Any] = {
            "command": name, "pages": pages, "seconds": seconds, "peak_bytes": sum(known.values()),
            "other_cores": max(0.0, busy_seconds() - before - ours) / seconds, "machine": machine(),
        }  # fmt: skip
        if settings.get("steps"):
            rows = read_metrics(folder / METRICS_FILE)
            result["step_seconds"] = statistics.median(float(row["step_seconds"]) for row in rows[WARMUP:])
            result["losses"] = [row["loss"] for row in rows]
    return result


def measured(config: dict[str, Any]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All results; what is missing is run, with and without by turns."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, settings in config["commands"].items():
        for number in range(config["repeats"]):
            for pages in SETTINGS if number % 2 == 0 else reversed(SETTINGS):
                path = HERE / "results" / f"{name} {pages} {number}.json".replace(" ", "_")
                if not path.exists():
                    if number == 0 and not any(found[0] == name for found in results):
                        run(name, settings, pages)  # compiles what is kept between runs
                    result = run(name, settings, pages)
                    if result["other_cores"] > MOST_OTHER_CORES:
                        raise SystemExit(f"other programs kept {result['other_cores']:.2f} cores busy: not written")
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(json.dumps(result) + "\n")
                results.setdefault((name, pages), []).append(json.loads(path.read_text()))
                last = results[name, pages][-1]
                print(f"{name}, {pages}: {last['seconds']:.1f} s, {format_bytes(last['peak_bytes'])}", flush=True)
    return results


def table(results: dict[tuple[str, str], list[dict[str, Any]]], config: dict[str, Any]) -> list[str]:
    """One row a command; AssertionError if the losses depend on the pages."""
    large, small = SETTINGS
    targets = config["targets"]
    lines = [
        "| command | peak, 2 MiB | 4 KiB | ratio (at most 1.10) | a step, 2 MiB | 4 KiB | speed (at least 1.20) |",
        "|---" * 7 + "|",
    ]
    for name in config["commands"]:
        sides = {pages: results[name, pages] for pages in SETTINGS}
        peak = {pages: statistics.median(each["peak_bytes"] for each in runs) for pages, runs in sides.items()}
        ratio = peak[large] / peak[small]
        cells = [name, format_bytes(round(peak[large])), format_bytes(round(peak[small])), f"**{ratio:.2f}**"]
        cells[-1] += "" if ratio <= targets["peak"] else " (missed)"
        if "step_seconds" in sides[large][0]:
            curves = {tuple(each["losses"]) for runs in sides.values() for each in runs}
            assert len(curves) == 1, f"{name}: {len(curves)} curves of losses"
            step = {p: statistics.median(each["step_seconds"] for each in runs) for p, runs in sides.items()}
            pairs = [b["step_seconds"] / a["step_seconds"] for a, b in zip(sides[large], sides[small], strict=True)]
            speed = step[small] / step[large]
            shown = f"**{speed:.2f}** ({min(pairs):.2f} to {max(pairs):.2f})"
            shown += "" if speed >= targets["speed"] else " (missed)"
            cells += [f"{1e3 * step[large]:.0f} ms", f"{1e3 * step[small]:.0f} ms", shown]
        lines.append(f"| {' | '.join(cells + [''] * (7 - len(cells)))} |")
    runs = [each for found in results.values() for each in found]
    others = max(each["other_cores"] for each in runs)
    about = f"{runs[0]['machine']['cpu']}, {runs[0]['machine']['cores']} cores"
    return [
        *lines,
        "",
        f"{about}; medians of {config['repeats']} runs; other programs took at most {others:.2f} cores.",
    ]


def main() -> None:
    argparse.ArgumentParser(description="Peak memory and speed with large pages and without.").parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    lines = table(measured(config), config)
    print("\n".join(lines))
    write_between_marks(HERE / "README.md", lines)


if __name__ == "__main__":
    main()
