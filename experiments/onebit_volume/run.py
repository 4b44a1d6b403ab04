"""Bytes of 1-bit Adam, 1-bit LAMB and 0/1 Adam over a whole run: `plan` on the published schedules, and real runs.

    .venv/bin/python experiments/onebit_volume/run.py           what is missing in results/, then plot.png and README.md
    .venv/bin/python experiments/onebit_volume/run.py --report  table and plot from results/ only

A real run is `dsjax.train.run` whose programs are wrapped: each is compiled once, its collectives over `data` are
counted in the compiled text, and every call adds them up. Nothing of the planner takes part in that.
"""

import argparse
import collections
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import yaml

import dsjax.setup.assembly as assembly
from dsjax.collectives.hlo import count_collectives
from dsjax.config.load import from_dict, load_run, to_dict
from dsjax.config.run import RunConfig
from dsjax.plan.plan import plan
from dsjax.setup.programs import Programs
from dsjax.train.loop import run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
PAPERS = {"bert-large-onebit-adam": "up to 5x", "bert-large-onebit-lamb": "up to 4.6x"}


def sent_in_plan(config: RunConfig, workers: int) -> dict[str, Any]:
    """Bytes that one device sends over `data`, stage by stage, as `plan` predicts them."""
    needs = plan(config, num_devices=workers)
    rounds = {one.stage: {"steps": one.steps, "sent": one.sent} for one in needs.rounds}
    total = sum(one["steps"] * one["sent"] for one in rounds.values())
    steps = sum(one["steps"] for one in rounds.values())
    no_collectives = rounds.get("local", {"steps": 0})["steps"]
    float32 = steps * rounds["full"]["sent"]
    # As the papers count: 16 bits a value in the full stage and in the baseline.
    short = (
        total - sum(rounds[name]["steps"] * rounds[name]["sent"] for name in ("full", "freeze") if name in rounds) / 2
    )
    return {
        "workers": workers,
        "steps": steps,
        "rounds": rounds,
        "sent": total,
        "float32_baseline": float32,
        "against_float32": float32 / total,
        "against_16_bits": float32 / 2 / total,
        "against_16_bits_with_a_16_bit_full_stage": float32 / 2 / short,
        "silent_steps": no_collectives / steps,
    }


def scaled(preset: str, settings: dict[str, Any]) -> RunConfig:
    """A preset's optimizer with all that is counted in steps divided, on the small model."""
    published, factor = load_run(ROOT / "configs" / "run" / f"{preset}.yaml"), settings["factor"]
    optimizer = to_dict(published)["optimizer"]
    divided = lambda value: max(1, round(value / factor))
    for name in ("freeze_step", "var_freeze_step", "var_update_scaler", "local_step_scaler"):
        if name in optimizer:
            optimizer[name] = divided(optimizer[name])
    for name in ("warmup", "decay_every"):
        optimizer["schedule"][name] = divided(optimizer["schedule"][name])
    run = settings["run"]
    train = run["train"] | {"steps": divided(published.train.steps)}
    data = run["data"] | {"cache_dir": str(ROOT / ".cache" / "onebit_volume")}
    return from_dict(RunConfig, run | {"name": preset, "optimizer": optimizer, "train": train, "data": data})


class Counted:
    """A jitted program that is compiled at its first call, and adds up what each call sends over `data`."""

    def __init__(self, name: str, program: Callable, sizes: dict[str, int], calls: collections.Counter, bytes_of: dict):
        self.name, self.program, self.sizes, self.calls, self.bytes_of = name, program, sizes, calls, bytes_of
        self.compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is None:
            self.compiled = self.program.lower(*arguments).compile()
            share = (self.sizes["data"] - 1) / self.sizes["data"]
            self.bytes_of[self.name] = sum(
                one.total_bytes * share * (2 if one.kind == "all-reduce" else 1)
                for one in count_collectives(self.compiled.as_text(), self.sizes)
                if "data" in one.axes
            )
        self.calls[self.name] += 1
        return self.compiled(*arguments)


def measured(config: RunConfig, folder: Path) -> dict[str, Any]:
    """A real run: for each program how often it was called and what a call sends."""
    calls: collections.Counter[str] = collections.Counter()
    bytes_of: dict[str, float] = {}
    make = assembly.make_programs

    def counting(*arguments: Any, **options: Any) -> Programs:
        programs, sizes = make(*arguments, **options), dict(arguments[2].mesh.shape)
        wrap = lambda name, program: Counted(name, program, sizes, calls, bytes_of)
        return Programs(
            wrap("gradient", programs.gradient),
            {stage: wrap(f"update {stage}", update) for stage, update in programs.updates.items()},
            programs.evaluate,
            programs.local and wrap("gradient alone", programs.local),
        )

    assembly.make_programs = counting
    start = time.perf_counter()
    try:
        result = run(config, run_dir=folder)
    finally:
        assembly.make_programs = make
    updates = {name: count for name, count in calls.items() if name.startswith("update ")}
    return {
        "calls": dict(calls),
        "sent_by_a_call": bytes_of,
        "steps": sum(updates.values()),
        "sent": sum(count * bytes_of[name] for name, count in calls.items()),
        "seconds": round(time.perf_counter() - start, 1),
        "training_loss": result.summary["training_loss"]["value"],
    }


def one(preset: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Plan on the published run, plan on the scaled one, and the scaled one run."""
    published = load_run(ROOT / "configs" / "run" / f"{preset}.yaml")
    small = scaled(preset, settings)
    folder = ROOT / ".cache" / "onebit_volume" / f"{preset}-{time.time_ns()}"
    found = {"preset": preset, "jax": jax.__version__, "factor": settings["factor"]}
    run = measured(small, folder)  # first: it sets the platform and the number of devices
    found |= {"run": run, "plan_of_run": sent_in_plan(small, small.mesh.data)}
    return found | {"published": sent_in_plan(published, published.mesh.data)}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown: the published schedules, then the runs."""
    lines = [
        "Published schedules, by `dsjax plan`; bytes sent by one device:",
        "",
        "| preset | workers | steps | sent | full steps | steps without a message | against Adam in float32 | against "
        "16 bits | the same with the full stage in 16 bits, as the papers count | paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        p = result["published"]
        full = sum(p["rounds"][stage]["steps"] for stage in ("full", "freeze") if stage in p["rounds"])
        lines.append(
            f"| {name} | {p['workers']} | {p['steps']:,} | {p['sent'] / 1e12:.2f} TB | {full / p['steps']:.1%} | "
            f"{p['silent_steps']:.1%} | {p['against_float32']:.1f}x | {p['against_16_bits']:.1f}x | "
            f"**{p['against_16_bits_with_a_16_bit_full_stage']:.1f}x** | {PAPERS.get(name, 'see below')} |"
        )
    adam, zero_one = (results[f"bert-large-{name}"]["published"] for name in ("onebit-adam", "zero-one-adam"))
    less = lambda key: 1 - adam[key] / zero_one[key]
    key = "against_16_bits_with_a_16_bit_full_stage"
    lines += [
        "",
        f"0/1 Adam against 1-bit Adam on the same {adam['steps']:,} steps: **{less('against_float32'):.1%}** less "
        f"volume with the full stage in float32, **{less(key):.1%}** with it in 16 bits (paper: up to 90%, a later "
        f"abstract 87%), and **{zero_one['silent_steps']:.1%}** fewer rounds (paper: up to 54%).",
        "",
        "Real runs, everything that is counted in steps divided by "
        f"{next(iter(results.values()))['factor']}, 4 workers:",
        "",
        "| optimizer | steps | calls of each update | sent, measured | sent, plan | plan is off by (target 3%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        run, ours = result["run"], result["plan_of_run"]
        calls = ", ".join(
            f"{k.removeprefix('update ')} {n:,}" for k, n in run["calls"].items() if k.startswith("update")
        )
        lines.append(
            f"| {name} | {run['steps']:,} | {calls} | {run['sent'] / 1e6:,.2f} MB | {ours['sent'] / 1e6:,.2f} MB | "
            f"**{ours['sent'] / run['sent'] - 1:+.2%}** |"
        )
    return lines


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Bytes sent over the published run, stage by stage, as a share of float32 gradients in every step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0))
    ax = figure.subplots()
    colours = {"full": "C0", "freeze": "C0", "compressed": "C1", "first_sync": "C2", "sync": "C2"}
    for row, result in enumerate(results.values()):
        published, left = result["published"], 0.0
        for stage, one in published["rounds"].items():
            width = 100 * one["steps"] * one["sent"] / published["float32_baseline"]
            ax.barh(row, width, left=left, color=colours.get(stage, "C3"))
            left += width
        ax.text(left + 0.2, row, f"{published['against_float32']:.1f}x less", va="center")
    for stage, label in (("full", "float32"), ("compressed", "one bit"), ("sync", "one bit, at a meeting")):
        ax.barh(0, 0, color=colours[stage], label=label)
    ax.set(yticks=range(len(results)), yticklabels=[name.removeprefix("bert-large-") for name in results])
    ax.set(xlabel="bytes sent in the run, % of float32 gradients in every step", xlim=(0, 27))
    ax.invert_yaxis()
    ax.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    settings = yaml.safe_load((HERE / "config.yaml").read_text())
    results = {}
    for preset in settings["presets"]:
        file = HERE / "results" / f"{preset}.json"
        if not file.exists() and not arguments.report:
            file.write_text(json.dumps(one(preset, settings), indent=2) + "\n")
        results[preset] = json.loads(file.read_text())
    lines = table(results)
    print("\n".join(lines))
    plot(results, HERE / "plot.png")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
