"""Speed of XLA:CPU's products of a vector with SmolLM2's matrices, beside that at which the machine reads memory.

    .venv/bin/python experiments/generation_speed/products.py            results/products-*.json and README's table
    .venv/bin/python experiments/generation_speed/products.py --quick    few repeats, nothing written

Each product is one program of many of them, one after the other as in a decoding step: each takes what the last one
gave, and has a matrix of its own, so that together they are larger than the caches. `cores` is CPU time / wall time.
The whole step comes from the difference between writing 129 and 65 tokens.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from run import HERE, model_file, prompts
from side_by_side import MOST_OTHER_CORES, Worker, machine, serve, stop_on_sigterm, timed, worker, write_between_marks

# name -> (shape, how many of it are in a step). A vector is contracted with the first dimension; of the table of the
# logits, as it is stored, with the last one.
PRODUCTS = {
    "q, out": ((576, 576), 60),
    "k, v": ((576, 192), 60),
    "gate, up": ((576, 1536), 60),
    "gate and up as one": ((576, 3072), 0),
    "down": ((1536, 576), 30),
    "logits": ((49152, 576), 1),
}
BYTES = 256e6  # of one program's matrices, several times the caches
MOST_MATRICES = 200  # of one program, that it compiles in seconds
TOKENS = (65, 129)
BEGIN, END = "<!-- products -->", "<!-- end of products -->"


def load(path: str, threads: int, platform: str):
    """The worker: the commands of jax_worker.py, and two for the products."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax_worker import load as load_model

    from dsjax.layers.cross_entropy import logits

    commands = load_model(path, threads, platform)
    ready: dict[str, Any] = {}

    def prepare(name: str) -> dict[str, Any]:
        """Make the matrices, compile the program, run it once."""
        shape, _ = PRODUCTS[name]
        dim = shape[1] if name == "logits" else shape[0]
        count = max(1, min(MOST_MATRICES, round(BYTES / (4 * shape[0] * shape[1]))))
        rng = np.random.default_rng(0)
        matrices = [jnp.asarray(rng.standard_normal(shape, np.float32) / dim**0.5) for _ in range(count)]

        @jax.jit
        def chain(x, matrices):
            for matrix in matrices:
                y = logits(x, matrix) if name == "logits" else jnp.tensordot(x, matrix, axes=1)
                x = jnp.resize(y, x.shape)
            return x

        ready.clear()
        ready[name] = chain, jnp.ones((1, 1, dim)), matrices
        jax.block_until_ready(chain(*ready[name][1:]))
        return {"count": count, "bytes": 4 * shape[0] * shape[1]}

    def product(name: str, seconds: float) -> dict[str, Any]:
        chain, *arguments = ready[name]
        spent: list[float] = []
        while sum(spent) < seconds:
            began = time.perf_counter()
            jax.block_until_ready(chain(*arguments))
            spent.append(time.perf_counter() - began)
        return {"each": spent}

    return {**commands, "prepare": prepare, "product": product}


def measure_product(name: str, jax: Worker, *, seconds: float) -> dict[str, Any]:
    """Seconds of one product, GB/s, and the cores at work meanwhile."""
    jax.resume()
    about = jax.ask("prepare", name=name)
    jax.pause()
    answer = timed(jax, "product", name=name, seconds=seconds)
    each = statistics.median(answer["each"]) / about["count"]
    return {
        "name": name,
        "shape": PRODUCTS[name][0],
        "in_a_step": PRODUCTS[name][1],
        "matrices": about["count"],
        "seconds": each,
        "bytes_per_second": about["bytes"] / each,
        "cores": answer["cpu_seconds"] / answer["seconds"],
        "other_cores": answer["other_cores"],
    }


def measure_step(jax: Worker, *, repeats: int) -> dict[str, Any]:
    """Seconds of one decoding step of one text, and the cores at work in it."""
    message = {"tokens": prompts(jax, rows=1, length=16)}
    for count in TOKENS:
        timed(jax, "run", **message, new_tokens=count)  # compiles
    steps = []
    for _ in range(repeats):
        few, many = (timed(jax, "run", **message, new_tokens=count) for count in TOKENS)
        wall, cpu = (many[what] - few[what] for what in ("seconds", "cpu_seconds"))
        steps.append({"seconds": wall / (TOKENS[1] - TOKENS[0]), "cores": cpu / wall})
        steps[-1]["other_cores"] = max(few["other_cores"], many["other_cores"])
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]} | {"repeats": steps}


def lines(result: dict[str, Any]) -> list[str]:
    """README's table."""
    peak, step = result["bytes_per_second"], result["step"]
    table = ["| product | in a step | us each | GB/s | of the read bandwidth | cores |", "|---" * 6 + "|"]
    for one in result["products"]:
        shape = " x ".join(str(n) for n in one["shape"])
        speed = f"{one['seconds'] * 1e6:,.0f} | {one['bytes_per_second'] / 1e9:.1f}"
        share = f"{one['bytes_per_second'] / peak:.0%} | {one['cores']:.2f}"
        table.append(f"| {one['name']}: {shape} | {one['in_a_step'] or '-'} | {speed} | {share} |")
    speed = result["weight_bytes"] / step["seconds"]
    together = sum(one["seconds"] * one["in_a_step"] for one in result["products"])
    table.append(f"| a whole step, {result['weight_bytes'] / 1e6:.0f} MB | | {step['seconds'] * 1e6:,.0f} | ")
    table[-1] += f"{speed / 1e9:.1f} | {speed / peak:.0%} | {step['cores']:.2f} |"
    by_threads = [f"{value / 1e9:.1f} GB/s by {threads}" for threads, value in result["read_by_threads"].items()]
    return [
        *table,
        "",
        f"{result['when']}, {result['machine']['cpu']}, {result['threads']} threads, jax {result['jax']}. Memory is "
        f"read at {', '.join(by_threads)} thread(s). The products of a step, added up, take {together * 1e3:.1f} of "
        f"its {step['seconds'] * 1e3:.1f} ms. Other programs took {result['other_cores']:.2f} cores.",
    ]


def measure(*, repeats: int, seconds: float) -> dict[str, Any]:
    """Everything, in one worker process."""
    threads = yaml.safe_load((HERE / "config.yaml").read_text())["threads"]
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    result: dict[str, Any] = {"machine": machine(), "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        with worker("jax", command, log=Path(folder) / "log") as jax:
            jax.ask("load", path=str(model_file()), threads=threads, platform="cpu")
            about = jax.ask("about")
            jax.pause()
            read = {n: timed(jax, "bandwidth", repeats=100, threads=n) for n in range(1, threads + 1)}
            result["step"] = measure_step(jax, repeats=repeats)
            result["products"] = [measure_product(name, jax, seconds=seconds) for name in PRODUCTS]
    result["read_by_threads"] = {str(n): answer["bytes_per_second"] for n, answer in read.items()}
    result["bytes_per_second"] = max(result["read_by_threads"].values())
    result |= {"jax": about["versions"]["jax"], "weight_bytes": about["weight_bytes"]}
    measured = [*read.values(), result["step"], *result["products"]]
    result["other_cores"] = max(one["other_cores"] for one in measured)
    result["when"] = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    return result


def main() -> None:
    """Measure, then write unless another program was busy."""
    parser = argparse.ArgumentParser(description="Matrix-vector products of a decoding step.")
    parser.add_argument("--quick", action="store_true", help="two repeats; writes nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(load)
        return
    stop_on_sigterm()
    result = measure(repeats=2, seconds=0.5) if options.quick else measure(repeats=7, seconds=3.0)
    print("\n".join(lines(result)))
    if options.quick:
        return
    if result["other_cores"] > MOST_OTHER_CORES:
        raise SystemExit(f"other programs kept {result['other_cores']:.2f} cores busy: nothing written")
    path = HERE / "results" / f"products-{result['when']}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_between_marks(HERE / "README.md", lines(result), marks=(BEGIN, END))
    print(f"written: {path}, README.md's table")


if __name__ == "__main__":
    main()
