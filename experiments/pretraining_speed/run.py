"""Tokens per second of dsjax and of eager PyTorch on the CPU: same weights, same batches, same threads.

    .venv/bin/python experiments/pretraining_speed/run.py            all of it: results/*.json, the plot, README's table
    .venv/bin/python experiments/pretraining_speed/run.py --quick    two short blocks, nothing written

Two worker processes train by turns; the one whose turn it is not is stopped by SIGSTOP. A block is a warm-up step and
`steps_per_block` timed ones; pairs of blocks alternate in their order (ABBA), and the ratio is taken pair by pair, so
that a slow drift of the machine cancels. Before any timing both train 5 steps from the same weights, and the losses
must agree, so that surely both do the same work. All of it is done twice: memory in pages of 2 MiB, and of 4 KiB.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from protocol import Job
from report import print_table, report

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import MOST_OTHER_CORES, PAGES, Worker, machine, python_with, stop_on_sigterm, timed, worker

from dsjax.checkpoint.safetensors_folder import write_folder
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.gpt2.model import to_hf

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "pretraining_speed"
TORCH = "torch==2.13.0"
# Both compute in float32, in different orders: single sums differ by some 1e-6, and a few steps of AdamW spread that.
LARGEST_LOSS_DIFFERENCE = 1e-4
COMPARED_STEPS = 5


def torch_python() -> Path:
    """A Python with PyTorch."""
    return python_with([TORCH, "numpy"], CACHE / "torch-venv")


def gpt2_weights(job: Job, *, seed: int) -> dict[str, np.ndarray]:
    """Initial weights under GPT-2's names, matrices [in, out]; biases and scales a little off 0 and 1, so that a mix-up
    shows in the losses."""
    rng = np.random.default_rng(seed)
    dim = job.model_dim
    draw = lambda *shape: (0.02 * rng.standard_normal(shape)).astype(np.float32)
    weights = {"wte.weight": draw(job.vocab_size, dim), "wpe.weight": draw(job.length, dim)}
    matrices = {"attn.c_attn": (dim, 3 * dim), "attn.c_proj": (dim, dim), "mlp.c_fc": (dim, 4 * dim)}
    matrices["mlp.c_proj"] = (4 * dim, dim)
    norms = ["ln_f"]
    for layer in range(job.num_layers):
        norms += [f"h.{layer}.ln_1", f"h.{layer}.ln_2"]
        for name, shape in matrices.items():
            weights[f"h.{layer}.{name}.weight"] = draw(*shape)
            weights[f"h.{layer}.{name}.bias"] = draw(shape[1])
    for norm in norms:
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = 1 + draw(dim), draw(dim)
    return weights


def write_inputs(job: Job, folder: Path, *, batches: int, seed: int = 0) -> None:
    """The files that the job names: tokens with frequencies like a text's (1/rank), and weights if any are named."""
    rng = np.random.default_rng(seed)
    odds = 1 / np.arange(1, job.vocab_size + 1)
    shape = (batches, job.batch, job.length + 1)
    np.save(folder / job.tokens, rng.choice(job.vocab_size, shape, p=odds / odds.sum()).astype(np.int32))
    if not job.weights:
        return
    weights = gpt2_weights(job, seed=seed)
    model = GPT2Config(
        vocab_size=job.vocab_size,
        num_layers=job.num_layers,
        model_dim=job.model_dim,
        num_heads=job.num_heads,
        max_positions=job.length,
    )
    write_folder(folder / job.weights, weights, config=to_hf(model))
    np.savez(folder / job.weights / "weights.npz", **weights)  # pyright: ignore[reportArgumentType]


def compared(losses: dict[str, list[float]], *, largest: float) -> dict[str, Any]:
    """The losses of both sides and how far apart they are; ValueError when that says they do different work."""
    pairs = zip(losses["torch"], losses["jax"], strict=True)
    difference = max(abs(ours - theirs) / theirs for theirs, ours in pairs)
    if not difference < largest:  # also when it is nan
        raise ValueError(f"the losses differ by {difference:.1e} (allowed: {largest:.0e}), so the work does: {losses}")
    return {"losses": losses, "largest_relative_difference": difference}


def time_pairs(workers: dict[str, Worker], tokens_per_step: int, *, blocks: int, steps: int) -> list[dict[str, float]]:
    """One entry a pair of blocks: of each side tokens/s, busy cores and those of them in the kernel, page faults a
    step; the ratio; how many cores others kept busy."""
    pairs = []
    for number in range(blocks):
        order = ["torch", "jax"] if number % 2 == 0 else ["jax", "torch"]
        pair: dict[str, float] = {}
        for name in order:
            timed(workers[name], "steps", steps=1)  # caches are cold after a pause
            answer = timed(workers[name], "steps", steps=steps)
            pair[name] = steps * tokens_per_step / answer["seconds"]
            pair[f"{name}_cores"] = answer["cpu_seconds"] / answer["seconds"]
            pair[f"{name}_kernel_cores"] = answer["kernel_seconds"] / answer["seconds"]
            pair[f"{name}_faults"] = answer["page_faults"] / steps
            pair["other_cores"] = max(pair.get("other_cores", 0.0), answer["other_cores"])
        pair["ratio"] = pair["jax"] / pair["torch"]
        pairs.append(pair)
        print(f"  pair {number + 1}: torch {pair['torch']:,.0f}, dsjax {pair['jax']:,.0f} tokens/s,", end=" ")
        print(f"ratio {pair['ratio']:.3f}", flush=True)
    return pairs


def measure(
    name: str, job: Job, commands: dict[str, list[str]], *, pages: str, blocks: int, steps: int, threads: int
) -> dict:
    """Everything about one model size, both sides with memory in the same pages."""
    print(f"{name}, pages of {pages}: {job.num_layers} layers of {job.model_dim},", end=" ")
    print(f"{job.batch} rows of {job.length} tokens", flush=True)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")  # torch's, its BLAS's, XLA's
    environment = dict.fromkeys(names, str(threads)) | PAGES[pages]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(job, folder, batches=8)
        message = {**vars(job), "tokens": str(folder / job.tokens), "weights": str(folder / job.weights)}
        with (
            worker("torch", commands["torch"], log=folder / "torch.log", environment=environment) as torch,
            worker("jax", commands["jax"], log=folder / "jax.log", environment=environment) as jax,
        ):
            workers, about, losses = {"torch": torch, "jax": jax}, {}, {}
            for key, each in workers.items():  # one after the other: torch times its optimizers while it loads
                each.ask("load", **message)
                about[key] = each.ask("about")
                losses[key] = each.ask("losses", steps=COMPARED_STEPS)["losses"]
                each.pause()
            assert about["torch"]["parameters"] == about["jax"]["parameters"], about
            check = compared(losses, largest=LARGEST_LOSS_DIFFERENCE)
            pairs = time_pairs(workers, job.batch * job.length, blocks=blocks, steps=steps)
    median = {key: statistics.median(pair[key] for pair in pairs) for key in pairs[0]}
    kind = {"model": name, "pages": pages, **vars(job)}
    return {**kind, "about": about, "check": check, "pairs": pairs, "median": median}


def main() -> None:
    stop_on_sigterm()
    parser = argparse.ArgumentParser(description="Training speed beside eager PyTorch, on the CPU.")
    parser.add_argument("--quick", action="store_true", help="two blocks of two steps; writes nothing")
    parser.add_argument("--torch-python", type=Path, metavar="PATH", help="a Python with torch (default: makes one)")
    options = parser.parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    threads = config["threads"]
    python = options.torch_python or torch_python()
    commands = {
        "torch": [str(python), str(HERE / "torch_worker.py")],
        "jax": [sys.executable, str(HERE / "jax_worker.py")],
    }
    if sys.platform == "linux":  # the workers inherit it: neither has more cores than it may have threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    blocks, steps = (2, 2) if options.quick else (config["blocks"], config["steps_per_block"])
    result: dict[str, Any] = {"kind": "cpu", "machine": machine(), "threads": threads, "steps_per_block": steps}
    sizes = []
    for name, size in config["models"].items():
        job = Job(
            **size, vocab_size=config["vocab_size"], optimizer=config["optimizer"],
            tokens="tokens.npy", weights="weights",
        )  # fmt: skip
        sizes += [
            measure(name, job, commands, pages=pages, blocks=blocks, steps=steps, threads=threads) for pages in PAGES
        ]
    result |= {"sizes": sizes}
    print_table(result)
    if (others := max(size["median"]["other_cores"] for size in sizes)) > MOST_OTHER_CORES:
        print(f"Other programs kept {others:.2f} cores busy meanwhile: these are not the machine's speeds.")
        if not options.quick:
            raise SystemExit("nothing written; run it again on an idle machine")
    if options.quick:
        return
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    path = HERE / "results" / f"cpu-{when}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"when": when, **result}, indent=1) + "\n")
    report()
    print(f"written: {path}, README.md's table, plot.png")


if __name__ == "__main__":
    main()
