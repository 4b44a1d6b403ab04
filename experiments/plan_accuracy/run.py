"""Does `dsjax plan` predict the bytes that XLA allocates? Predicts and compiles the programs of config.yaml.

    .venv/bin/python experiments/plan_accuracy/run.py          results/cpu.json, plot.png and the table in README.md
    .venv/bin/python experiments/plan_accuracy/run.py --dry    prints the table, writes nothing

Nothing is run: both programs of a step are lowered from shapes and compiled, and `memory_analysis()` is read.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import yaml

jax.config.update("jax_platforms", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from side_by_side import machine  # noqa: E402

from dsjax.config.load import from_dict  # noqa: E402
from dsjax.config.run import RunConfig  # noqa: E402
from dsjax.mesh.build import make_mesh  # noqa: E402
from dsjax.mesh.layout import Layout  # noqa: E402
from dsjax.plan.compile import lower_programs, measure  # noqa: E402
from dsjax.plan.plan import plan  # noqa: E402
from dsjax.setup.assembly import assemble  # noqa: E402

HERE = Path(__file__).parent
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def run_config(size: dict[str, Any], remat: str) -> RunConfig:
    """A size of config.yaml as a run."""
    names = ("kind", "vocab_size", "model_dim", "num_layers", "num_heads")
    model = {name: size[name] for name in names} | {"remat": remat, "compute_dtype": "float32"}
    if size["kind"] == "gpt2":
        model["max_positions"] = size["length"]
    train = {"steps": 1, "batch_size": size["batch"], "accumulation": size["accumulation"]}
    return from_dict(
        RunConfig, {"mesh": {"data": 1}, "model": model, "data": {"sequence_length": size["length"]}, "train": train}
    )


def compare(name: str, size: dict[str, Any], remat: str) -> dict[str, Any]:
    """Both programs of one configuration: predicted and compiled bytes."""
    config = run_config(size, remat)
    start = time.perf_counter()
    predicted = plan(config, num_devices=1)
    seconds = time.perf_counter() - start
    layout = Layout(make_mesh(config.mesh, devices=jax.devices()[:1]))
    result: dict[str, Any] = {"size": name, "remat": remat, "residuals": predicted.memory.residuals}
    result["plan_seconds"] = round(seconds, 2)
    lowered = lower_programs(assemble(config, layout=layout))
    for program, ours in (("gradient", predicted.gradient), ("update", predicted.update)):
        found = measure(lowered[program], dict(layout.mesh.shape))
        for kind in ("arguments", "temporary"):
            result[f"{program}_{kind}"] = {"predicted": getattr(ours, kind), "compiled": found[kind]}
        result[f"{program}_compile_seconds"] = round(found["seconds"], 1)
    return result


def ratio(result: dict[str, Any], what: str) -> float:
    return result[what]["predicted"] / result[what]["compiled"]


def table(results: list[dict[str, Any]], targets: dict[str, float]) -> list[str]:
    """Markdown: one row a configuration."""
    lines = [
        f"| size | remat | arguments (target {targets['argument_bytes']:.0%}) | gradient: temporary MB, predicted / "
        f"XLA | off by (target {targets['temporary_bytes']:.0%}) | update: off by |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        arguments = max((ratio(r, f"{p}_arguments") - 1 for p in ("gradient", "update")), key=abs)
        temporary = r["gradient_temporary"]
        off = ratio(r, "gradient_temporary") - 1
        mark = "" if abs(off) <= targets["temporary_bytes"] else " (missed)"
        lines.append(
            f"| {r['size']} | {r['remat']} | {arguments:+.2%} | {temporary['predicted'] / 1e6:,.0f} / "
            f"{temporary['compiled'] / 1e6:,.0f} | **{off:+.0%}**{mark} | {ratio(r, 'update_temporary') - 1:+.0%} |"
        )
    return lines


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Temporary bytes of the gradient program, predicted against compiled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.6, 4.2))
    for remat, marker in (("none", "o"), ("full", "s")):
        points = [r["gradient_temporary"] for r in results if r["remat"] == remat]
        ax.plot(
            [p["compiled"] / 1e6 for p in points],
            [p["predicted"] / 1e6 for p in points],
            marker,
            label=f"remat {remat}",
        )
    sizes = [r["gradient_temporary"]["compiled"] / 1e6 for r in results]
    ends = [0.7 * min(sizes), 1.4 * max(sizes)]
    ax.plot(ends, ends, color="0.6", linewidth=1)
    ax.fill_between(ends, [0.75 * x for x in ends], [1.25 * x for x in ends], color="0.9", label="within 25%")
    ax.set(xscale="log", yscale="log", xlabel="XLA's temporary bytes, MB", ylabel="predicted, MB")
    ax.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    results = []
    for name, size in config["sizes"].items():
        for remat in config["remat"]:
            results.append(compare(name, size, remat))
            print(f"{name}, remat {remat}: {ratio(results[-1], 'gradient_temporary'):.2f} of XLA's temporary bytes")
    lines = table(results, config["targets"])
    print("\n".join(lines))
    if arguments.dry:
        return
    (HERE / "results").mkdir(exist_ok=True)
    record = {"jax": jax.__version__, "backend": jax.default_backend(), "machine": machine(), "results": results}
    (HERE / "results" / "cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(results, HERE / "plot.png")
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
