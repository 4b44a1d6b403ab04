"""GPT-3 1.3B on one GPU: dsjax against torch.compile with flash attention, in one go on one machine.

    python experiments/pretraining_speed/gpu.py --out results            everything; needs jax and torch for CUDA
    python experiments/pretraining_speed/gpu.py --out /tmp/x --tiny      the whole path on a CPU, in about a minute

Both: float32 parameters and optimizer state, bf16 compute, AdamW, no dropout, plain causal attention, nothing
recomputed (if that does not fit, blocks are recomputed on both sides). Only one process is on the GPU at a time.

1. check   a small model: cuDNN's fused attention is in dsjax's compiled step (under its vmap over workers), and the
           losses of the first five steps agree
2. sweep   rows a step, for each side; what does not fit is noted
3. final   each side with its best number of rows, in fresh processes by turns

FLOPs a token: 6 N + 12 L D T for both, N = parameters in matrix products (all but the positions); not halved for
causality. Stages can be run one at a time: --stage, with --rows torch=8 jax=16 for the last one alone.
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
from protocol import Job
from run import COMPARED_STEPS, compared, torch_python, write_inputs
from side_by_side import Worker, WorkerDied, stop_on_sigterm, worker

from dsjax.observe.flops import mfu, model_flops_per_token

HERE = Path(__file__).parent
SIDES = ("torch", "jax")
# bf16 has 8 bits: single products are off by 2^-9 at most, a mean over thousands of tokens by far less than this.
LARGEST_LOSS_DIFFERENCE = 5e-3


def loaded(each: Worker, message: dict[str, Any]) -> dict[str, Any]:
    """Let a worker make its model; what it says of it."""
    each.ask("load", **message)
    return each.ask("about")


class Bench:
    """Starts workers for jobs on this machine."""

    def __init__(self, settings: dict[str, Any], folder: Path, *, optimizer: dict[str, float], tiny: bool) -> None:
        self.settings, self.folder, self.optimizer, self.tiny = settings, folder, optimizer, tiny
        self.environment = {
            "PYTHONPATH": os.pathsep.join([*map(str, HERE.parents[:2]), os.environ.get("PYTHONPATH", "")]),
            # The final stage starts the programs of the sweep again: they need not be compiled again.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax-cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch-cache"),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        }

    def job(self, *, remat: str = "none", weights: str = "", **sizes: int) -> Job:
        """A Job with its input files written."""
        device = "cpu" if self.tiny else "cuda"
        job = Job(
            **sizes, optimizer=self.optimizer, tokens="tokens.npy", weights=weights,
            device=device, compute_dtype="bfloat16", remat=remat, compile=True,
        )  # fmt: skip
        write_inputs(job, self.folder, batches=4)
        return job

    def message(self, job: Job) -> dict[str, Any]:
        """The job with whole paths, as the workers want it."""
        weights = str(self.folder / job.weights) if job.weights else ""
        return {**vars(job), "tokens": str(self.folder / job.tokens), "weights": weights}

    def worker(self, side: str, name: str):
        """A fresh worker process (a context)."""
        log = self.folder / f"{side}-{name}.log"
        return worker(side, self.command(side), log=log, environment=self.environment)

    def command(self, side: str) -> list[str]:
        """The program of a side; a Python with torch is looked for, and made, only where torch's is asked for."""
        here = side == "jax" or importlib.util.find_spec("torch") is not None
        return [sys.executable if here else str(torch_python()), str(HERE / f"{side}_worker.py")]


def check(bench: Bench) -> dict[str, Any]:
    """Stage 1; ValueError when the sides do not do the same work or dsjax does it without fused attention."""
    job = bench.job(**bench.settings["check"], weights="weights")
    about, losses, calls = {}, {}, 0
    for side in SIDES:
        with bench.worker(side, "check") as each:
            about[side] = loaded(each, bench.message(job))
            losses[side] = each.ask("losses", steps=COMPARED_STEPS)["losses"]
            if side == "jax":
                calls = each.ask("inspect")["cudnn_attention_calls"]
    agreement = compared(losses, largest=LARGEST_LOSS_DIFFERENCE)
    if not bench.tiny and calls == 0:
        raise ValueError("the compiled step holds no call of cuDNN's fused attention")
    difference = agreement["largest_relative_difference"]
    print(f"check: losses agree to {difference:.1e}, {calls} cuDNN attention calls", flush=True)
    return {"about": about, **agreement, "cudnn_attention_calls": calls}


def speed(bench: Bench, side: str, *, rows: int, remat: str, name: str) -> dict[str, Any]:
    """Tokens/s of one fresh process, or {'out_of_memory': True}."""
    model, settings = bench.settings["model"], bench.settings
    job = bench.job(**model, batch=rows, remat=remat)
    try:
        with bench.worker(side, name) as each:
            about = loaded(each, bench.message(job))
            each.ask("steps", steps=settings["warmup_steps"])  # compiles
            answer = each.ask("steps", steps=settings["steps"])
            peak = each.ask("inspect")["peak_bytes"]
    except WorkerDied as death:
        if not death.out_of_memory:
            raise
        print(f"{side}, {rows} rows, remat {remat}: out of memory", flush=True)
        return {"side": side, "rows": rows, "remat": remat, "out_of_memory": True}
    tokens_per_second = settings["steps"] * rows * model["length"] / answer["seconds"]
    flops = model_flops_per_token(
        about["parameters"] - model["length"] * model["model_dim"],
        num_layers=model["num_layers"], model_dim=model["model_dim"], sequence_length=model["length"],
    )  # fmt: skip
    result = {
        "side": side,
        "rows": rows,
        "remat": remat,
        "out_of_memory": False,
        "tokens_per_second": tokens_per_second,
        "step_seconds": answer["seconds"] / settings["steps"],
        "mfu": mfu(tokens_per_second, flops, peak_flops=settings["peak_flops"]),
        "peak_bytes": peak,
        "losses": answer["losses"],
        "about": about,
    }
    print(
        f"{side}, {rows} rows, remat {remat}: {tokens_per_second:,.0f} tokens/s, MFU {result['mfu']:.1%}, "
        f"peak {peak / 2**30:.1f} GiB", flush=True
    )  # fmt: skip
    return result


def sweep(bench: Bench) -> list[dict[str, Any]]:
    """Stage 2: every number of rows on both sides, with recomputation only if one side fits none without."""
    results = []
    for remat in ("none", "full"):
        results += [
            speed(bench, side, rows=rows, remat=remat, name=f"sweep-{rows}-{remat}")
            for rows in bench.settings["batches"]
            for side in SIDES
        ]
        fitting = {each["side"] for each in results if not each["out_of_memory"] and each["remat"] == remat}
        if fitting == set(SIDES):
            return [{**each, "chosen": each["remat"] == remat} for each in results]
    raise ValueError(f"not even {min(bench.settings['batches'])} rows fit on both sides with every block recomputed")


def best_rows(results: list[dict[str, Any]]) -> tuple[dict[str, int], str]:
    """Rows with the most tokens/s for each side, and the remat policy that both use."""
    usable = [each for each in results if each["chosen"] and not each["out_of_memory"]]
    best = {
        side: max((each for each in usable if each["side"] == side), key=lambda each: each["tokens_per_second"])["rows"]
        for side in SIDES
    }
    return best, usable[0]["remat"]


def final(bench: Bench, rows: dict[str, int], remat: str) -> dict[str, Any]:
    """Stage 3: fresh processes by turns; medians of each side."""
    turns = [
        speed(bench, side, rows=rows[side], remat=remat, name=f"final-{turn}")
        for turn in range(bench.settings["repeats"])
        for side in SIDES
    ]
    if any(each["out_of_memory"] for each in turns):
        raise ValueError(f"out of memory in the final stage; rows {rows}, remat {remat}")
    best = {}
    for side in SIDES:
        mine = [each for each in turns if each["side"] == side]
        keys = ("tokens_per_second", "step_seconds", "mfu", "peak_bytes")
        best[side] = {key: statistics.median(each[key] for each in mine) for key in keys} | {"rows": rows[side]}
    return {"turns": turns, "best": best, "remat": remat}


def print_final(best: dict[str, dict[str, float]]) -> None:
    """The table for the terminal."""
    print(f"{'':<8}{'rows':>6}{'tokens/s':>12}{'ms/step':>10}{'MFU':>8}{'peak GiB':>10}")
    for side, name in (("jax", "dsjax"), ("torch", "torch")):
        each = best[side]
        print(
            f"{name:<8}{each['rows']:>6.0f}{each['tokens_per_second']:>12,.0f}{each['step_seconds'] * 1e3:>10.1f}"
            f"{each['mfu']:>8.1%}{each['peak_bytes'] / 2**30:>10.1f}"
        )
    print(f"dsjax / torch: {best['jax']['tokens_per_second'] / best['torch']['tokens_per_second']:.3f}")


def main() -> None:
    stop_on_sigterm()
    parser = argparse.ArgumentParser(description="Training speed on one GPU beside torch.compile.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu-*.json goes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: a rehearsal")
    parser.add_argument("--stage", choices=("check", "sweep", "final", "all"), default="all")
    parser.add_argument("--rows", nargs=2, metavar=("torch=N", "jax=N"), help="for --stage final alone")
    parser.add_argument("--remat", choices=("none", "full"), default="none", help="for --stage final alone")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keeps inputs, logs and compiled programs between runs"
    )
    options = parser.parse_args()
    if options.stage == "final" and not options.rows:
        parser.error("--stage final needs --rows torch=N jax=N, the best of the sweep")
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = options.out / f"{'tiny' if options.tiny else 'gpu'}-{options.stage}-{when}.json"
    result: dict[str, Any] = {"kind": "tiny" if options.tiny else "gpu", "when": when}
    save = lambda: path.write_text(json.dumps(result, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        settings = config["tiny" if options.tiny else "gpu"]
        bench = Bench(settings, work, optimizer=config["optimizer"], tiny=options.tiny)
        if options.stage in ("check", "all"):
            result["check"] = check(bench)
            save()
        rows, remat = dict(pair.split("=") for pair in options.rows or ()), options.remat
        if options.stage in ("sweep", "all"):
            result["sweep"] = sweep(bench)
            save()
            rows, remat = best_rows(result["sweep"])
            print(f"best: {rows}, remat {remat}", flush=True)
        if options.stage in ("final", "all"):
            result |= final(bench, {side: int(count) for side, count in rows.items()}, remat)
            save()
            print_final(result["best"])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
