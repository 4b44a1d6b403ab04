"""Step times of random-LTD in every size of its schedule beside dense ones; writes results/cpu.json and the table.

python experiments/random_ltd_speed/run.py [--quick]
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import MOST_OTHER_CORES, busy_seconds, machine, write_between_marks

from dsjax.config.load import load_run
from dsjax.config.run import RunConfig
from dsjax.mesh.build import set_platform
from dsjax.observe.environment import versions
from dsjax.observe.host import restart_with_huge_pages
from dsjax.plan.cost import Cost
from dsjax.setup.assembly import Setup, assemble, first_state
from dsjax.setup.buckets import Bucket
from dsjax.setup.placement import training_placement

HERE = Path(__file__).parent
REPEATS, STEPS = 3, 2


class Trainer:
    """Compiled steps of every size, on random tokens."""

    def __init__(self, setup: Setup) -> None:
        self.layout, self.optimizer, self.programs = setup.layout, setup.optimizer, setup.programs
        self.state, _ = first_state(setup)
        self.vocab = setup.config.model.vocab_size
        self.update = self.programs.updates["full"]

    def batch(self, bucket: Bucket) -> dict[str, jax.Array]:
        """Random rows of a size."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.vocab, (bucket.rows, bucket.width)).astype(np.int32)
        rows = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, bool)}
        return training_placement(self.layout, batch_size=bucket.rows, accumulation=1)(rows)

    def compile(self, bucket: Bucket) -> tuple[Any, float, int]:
        """A gradient program, the seconds that it took to compile, and its temporary bytes."""
        counts = None if bucket.num_kept is None else np.array([bucket.width, bucket.num_kept], np.int32)
        batch = self.batch(bucket)
        inputs = self.programs.gradient_inputs(self.optimizer, "full", self.state, batch, counts=counts)
        began = time.perf_counter()
        program = self.programs.gradient_for(self.optimizer, "full", num_kept=bucket.num_kept).lower(inputs)
        compiled = program.compile()
        seconds = time.perf_counter() - began

        def step() -> float:
            start = time.perf_counter()
            for _ in range(STEPS):
                inputs = self.programs.gradient_inputs(self.optimizer, "full", self.state, batch, counts=counts)
                gradients, metrics = compiled(inputs)
                self.state, _ = self.update(self.state, gradients, metrics["loss"], np.float32(1e-4))
            jax.block_until_ready(self.state.params)
            return (time.perf_counter() - start) / STEPS

        return step, seconds, int(compiled.memory_analysis().temp_size_in_bytes)


def measure(config: RunConfig, *, quick: bool) -> dict[str, Any]:
    """Everything that is recorded."""
    setup = assemble(config)
    config, schedule, cost = setup.config, setup.schedule, Cost.of(setup)
    trainer = Trainer(setup)
    dense = Bucket(config.train.batch_size, config.data.sequence_length)
    sizes = list(dict.fromkeys([dense, *schedule.buckets]))
    sizes = sizes[:: max(1, len(sizes) // 3)] if quick else sizes
    steps, compiling, memory = {}, {}, {}
    for bucket in sizes:
        steps[bucket], compiling[bucket], memory[bucket] = trainer.compile(bucket)
        steps[bucket]()
    seconds: dict[Bucket, list[float]] = {bucket: [] for bucket in sizes}
    before, cpu, began = busy_seconds(), time.process_time(), time.perf_counter()
    for repeat in range(REPEATS):
        for bucket in sizes if repeat % 2 == 0 else sizes[::-1]:
            seconds[bucket].append(steps[bucket]())
    passed = time.perf_counter() - began
    counts = np.bincount(schedule.bucket, minlength=len(schedule.buckets)).tolist()
    flops = {
        bucket: float(cost.flops[schedule.bucket == number].mean()) for number, bucket in enumerate(schedule.buckets)
    }
    layers = config.model.num_layers * 12 * config.model.model_dim**2
    return {
        "sizes": [
            {
                **dataclasses.asdict(bucket),
                "steps": dict(zip(schedule.buckets, counts, strict=True)).get(bucket, 0),
                "seconds": seconds[bucket],
                "compiling": compiling[bucket],
                "temporary_bytes": memory[bucket],
                "flops": flops.get(bucket, cost.dense),
            }
            for bucket in sizes
        ],
        "dense_flops": cost.dense,
        "predicted": cost.saving(schedule.num_steps),
        "share_of_layers": 6 * layers * dense.rows * dense.width / cost.dense,
        "other_cores": max(0.0, busy_seconds() - before - (time.process_time() - cpu)) / passed,
        "machine": machine(),
        "versions": versions(),
    }


def saved(result: dict[str, Any], repeat: int) -> float:
    """The share of time that the schedule saves, of one repeat, against as many dense steps."""
    dense = result["sizes"][0]["seconds"][repeat]
    spent = sum(size["steps"] * size["seconds"][repeat] for size in result["sizes"])
    return 1 - spent / (dense * sum(size["steps"] for size in result["sizes"]))


def report(result: dict[str, Any]) -> list[str]:
    """The README's lines."""
    savings = [saved(result, repeat) for repeat in range(REPEATS)]
    dense = result["sizes"][0]
    lines = [
        "| kept slots of 256 | steps | seconds a step, median (range) | of dense | FLOPs, of dense | temporary MB |"
    ]
    lines.append("|---" * 6 + "|")
    median = statistics.median
    for size in result["sizes"]:
        shown = size["num_kept"] or "all"
        times = f"{median(size['seconds']):.3f} ({min(size['seconds']):.3f} to {max(size['seconds']):.3f})"
        ratio = median(size["seconds"]) / median(dense["seconds"])
        flops = size["flops"] / result["dense_flops"]
        lines.append(
            f"| {shown} | {size['steps']} | {times} | {ratio:.2f} | {flops:.2f} | {size['temporary_bytes'] / 1e6:.0f} |"
        )
    predicted, middle = result["predicted"], median(savings)
    compiling = sum(size["compiling"] for size in result["sizes"])
    lines += [
        "",
        f"**Predicted saving {predicted:.1%}, measured {middle:.1%} ({min(savings):.1%} to {max(savings):.1%}): "
        f"{middle / predicted:.0%} of the prediction.** Compiling {len(result['sizes'])} programs took "
        f"{compiling:.0f} s, not counted. "
        f"The layers' matrices are {result['share_of_layers']:.0%} of a dense step's FLOPs.",
        "",
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores; other programs took "
        f"{result['other_cores']:.2f} of them.",
    ]
    return lines


def plot(result: dict[str, Any]) -> None:
    """Time and FLOPs of a step over the tokens that are kept."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dense = result["sizes"][0]
    sizes = sorted(result["sizes"], key=lambda size: size["num_kept"] or size["width"])
    kept = [size["num_kept"] or size["width"] for size in sizes]
    middle = statistics.median(dense["seconds"])
    axes.plot(kept, [statistics.median(size["seconds"]) / middle for size in sizes], "o-", label="measured")
    axes.plot(kept, [size["flops"] / result["dense_flops"] for size in sizes], "--", label="FLOPs")
    axes.set(xlabel="tokens that the middle layers see", ylabel="of a dense step", ylim=(0, None))
    axes.legend()
    figure.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
    """Measure, record, report."""
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four sizes, also on a busy machine; writes nothing")
    quick = parser.parse_args().quick
    config = load_run(HERE / "config.yaml", [])
    set_platform(config.mesh)
    result = measure(config, quick=quick)
    print("\n".join(report(result)))
    if quick:
        return
    if result["other_cores"] > MOST_OTHER_CORES:
        raise SystemExit(f"other programs kept {result['other_cores']:.2f} cores busy: run it on an idle machine")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    write_between_marks(HERE / "README.md", report(result))
    plot(result)


if __name__ == "__main__":
    main()
