"""Feeds 129,000 damaged files to the readers: each must end in success or ValueError, in little time and memory.

    .venv/bin/python experiments/reader_fuzz/run.py            results/cpu.json and the table in README.md
    .venv/bin/python experiments/reader_fuzz/run.py --reader folder   one reader anew, the others' results stay
    .venv/bin/python experiments/reader_fuzz/run.py --share 0.01      a hundredth of it, nothing written
    .venv/bin/python experiments/reader_fuzz/run.py --only gguf:1234  one input, with its traceback

Each reader has a process of its own, so that a crash is seen and named by the number of its input.
"""

import argparse
import collections
import json
import multiprocessing
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import machine

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
HANGS_AFTER = 20  # seconds of wall clock, whatever else the machine does


def write_input(reader: str, number: int, seed: int, sound: list[dict[str, bytes]], folder: Path) -> int:
    """One damaged input on the disk; its bytes."""
    from mutate import mutated
    from readers import damaged

    rng = random.Random(f"{seed} {reader} {number}")
    files = damaged(rng.choice(sound), mutated, rng)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sum(map(len, files.values()))


def outcome_of(reader: str, folder: Path) -> tuple[str, str]:
    """("loaded" | "refused" | "broken", why)."""
    from readers import READERS

    try:
        READERS[reader](folder)
    except ValueError as error:
        if isinstance(error, UnicodeError | json.JSONDecodeError):  # a message for nobody: it names no file
            return "broken", f"{type(error).__name__}: {error}"
        return "refused", str(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the panics of Rust libraries are no Exceptions; whatever it is, it is a finding
        return "broken", f"{type(error).__name__}: {error}"
    return "loaded", ""


def reason(message: str) -> str:
    """Kind of a refusal: the message without names and numbers."""
    return re.sub(r"'[^']*'|\S*/\S+|[\d.]+|\S*\.\S+", "#", message)[:60]


def feed(reader: str, count: int, config: dict[str, Any], work: Path, progress: Any) -> dict[str, Any]:
    """All inputs of one reader."""
    from readers import READERS, sound_files

    limit = config["limits"]["address_space_megabytes"] << 20
    sound = sound_files(reader, work / "sound")
    folder = work / "input"
    for files in sound:  # what is loaded lazily is loaded now, and the sound files are sound
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        READERS[reader](folder)
        shutil.rmtree(folder)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts, reasons = collections.Counter(), collections.Counter()
    broken, slowest, largest = [], (0.0, -1), (0, -1)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    began = time.perf_counter()
    for number in range(count):
        progress.value = number
        write_input(reader, number, config["seed"], sound, folder)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        signal.alarm(HANGS_AFTER)  # not caught: the process ends, and its parent names the input
        cpu = time.process_time()
        outcome, why = outcome_of(reader, folder)
        cpu = time.process_time() - cpu
        signal.alarm(0)
        peak = tracemalloc.get_traced_memory()[1] - before
        counts[outcome] += 1
        slowest, largest = max(slowest, (cpu, number)), max(largest, (peak, number))
        if outcome == "refused":
            reasons[reason(why)] += 1
        if outcome == "broken":
            broken.append({"input": number, "error": why[:300]})
    return {
        "inputs": count,
        **{outcome: counts[outcome] for outcome in ("loaded", "refused", "broken")},
        "kinds_of_refusal": len(reasons),
        "seconds": round(time.perf_counter() - began, 1),
        "most_cpu_seconds": round(slowest[0], 4),
        "slowest_input": slowest[1],
        "most_memory_bytes": largest[0],
        "largest_input": largest[1],
        "resident_growth_bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024,
        "findings": broken[:20],
        "common_refusals": dict(reasons.most_common(8)),
    }


def _child(reader: str, count: int, config: dict[str, Any], work: Path, progress: Any, results: Any) -> None:
    results.put(feed(reader, count, config, work, progress))


def run_reader(reader: str, count: int, config: dict[str, Any]) -> dict[str, Any]:
    """One reader in a process of its own; a crash or a hang becomes a finding."""
    context = multiprocessing.get_context("spawn")
    progress, results = context.Value("q", -1), context.Queue()
    with tempfile.TemporaryDirectory() as work:
        child = context.Process(target=_child, args=(reader, count, config, Path(work), progress, results))
        child.start()
        child.join()
    if child.exitcode == 0:
        return results.get()
    error = f"the process ended with code {child.exitcode}"
    return {"inputs": count, "broken": 1, "findings": [{"input": progress.value, "error": error}]}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: one row a reader."""
    lines = [
        "| reader | inputs | loaded all the same | refused with ValueError | ways to refuse | anything else "
        "| most CPU time of one | most memory of one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        lines.append(
            f"| {name} | {r['inputs']:,} | {r.get('loaded', 0):,} | {r.get('refused', 0):,} "
            f"| {r.get('kinds_of_refusal', 0)} | **{r['broken']}** | {1000 * r.get('most_cpu_seconds', 0):.0f} ms "
            f"| {r.get('most_memory_bytes', 0) / 1e6:.2f} MB |"
        )
    total = sum(r["inputs"] for r in results.values())
    return [*lines, f"| all | {total:,} | | | | **{sum(r['broken'] for r in results.values())}** | | |"]


def too_much(results: dict[str, dict[str, Any]], limits: dict[str, float]) -> list[str]:
    """Cases that broke, or went beyond the limits of config.yaml."""
    found = []
    for name, r in results.items():
        found += [f"{name}:{finding['input']}: {finding['error']}" for finding in r["findings"]]
        if r.get("most_cpu_seconds", 0) > limits["cpu_seconds"]:
            found.append(f"{name}:{r['slowest_input']} took {r['most_cpu_seconds']} s of CPU time")
        megabytes = limits.get(f"{name}_megabytes", limits["memory_megabytes"])
        if r.get("most_memory_bytes", 0) > megabytes * 1e6:
            found.append(f"{name}:{r['largest_input']} took {r['most_memory_bytes']:,} bytes")
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs; below 1 nothing is written")
    parser.add_argument("--reader", help="one of config.yaml's; the recorded results of the others are kept")
    parser.add_argument("--only", metavar="READER:NUMBER", help="one input, with its traceback")
    arguments = parser.parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    if arguments.only:
        return show_one(arguments.only, config)
    file = HERE / "results" / "cpu.json"
    results = json.loads(file.read_text())["results"] if arguments.reader else {}
    for reader, count in config["inputs"].items():
        if arguments.reader not in (None, reader):
            continue
        results[reader] = run_reader(reader, max(1, round(count * arguments.share)), config)
        print(table({reader: results[reader]})[2], flush=True)
    for line in (problems := too_much(results, config["limits"])):
        print(line)
    if arguments.share == 1:
        about = machine() | {"python": sys.version}
        content = {"config": config, "machine": about, "results": results, "problems": problems}
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
        readme = (HERE / "README.md").read_text()
        head, tail = readme.split(BEGIN)[0], readme.split(END)[1]
        (HERE / "README.md").write_text("\n".join([head + BEGIN, *table(results), END + tail]))
    return 1 if problems else 0


def show_one(which: str, config: dict[str, Any]) -> int:
    """One input again, without catching what it raises."""
    from readers import READERS, sound_files

    reader, number = which.split(":")
    with tempfile.TemporaryDirectory() as work:
        sound = sound_files(reader, Path(work) / "sound")
        size = write_input(reader, int(number), config["seed"], sound, Path(work) / "input")
        print(f"{which}: {size} bytes")
        READERS[reader](Path(work) / "input")
    print("loaded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
