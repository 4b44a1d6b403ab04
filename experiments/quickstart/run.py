"""Train the quickstart with three seeds; one JSON a seed, finished ones are skipped; fills the README's table.

python experiments/quickstart/run.py
"""

import json
import shutil
import statistics
import time
from pathlib import Path

from rich.console import Console

import dsjax.train
from dsjax.config.load import load_run
from dsjax.observe.environment import versions
from dsjax.observe.host import restart_with_huge_pages

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SEEDS = (0, 1, 2)
KEPT = (
    "parameters",
    "tokens",
    "validation_loss",
    "unigram_nats_per_token",
    "bigram_nats_per_token",
    "validation_nats_per_byte",
    "bigram_nats_per_byte",
    "tokens_per_second",
    "training_seconds",
    "waiting_for_data",
    "peak_host_bytes",
    "data_hash",
)


def train(seed: int) -> dict:
    """One run's figures."""
    folder = ROOT / "runs" / f"experiment-quickstart-{seed}"
    config = load_run(ROOT / "configs/run/quickstart.yaml", [f"seed={seed}", f"data.shuffle_seed={seed}"])
    began = time.perf_counter()
    result = dsjax.train.run(config, run_dir=folder, resume="if_any")
    seconds = time.perf_counter() - began
    if seed == SEEDS[0]:
        shutil.copy(folder / "loss.png", HERE / "loss.png")
    metrics = {name: result.summary[name]["value"] for name in KEPT}
    return {"seed": seed, "wall_seconds": seconds, **metrics, "versions": versions()}


def main() -> None:
    """Run what is missing, then write the table."""
    restart_with_huge_pages()
    results = []
    for seed in SEEDS:
        path = HERE / "results" / f"seed-{seed}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(train(seed), indent=1) + "\n")
        results.append(json.loads(path.read_text()))
    rows = ["| figure | " + " | ".join(f"seed {r['seed']}" for r in results) + " | median |"]
    rows.append("|---" * (len(results) + 2) + "|")
    for name in ("wall_seconds", *KEPT[:-1]):
        values = [r[name] for r in results]
        shown = [f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" for v in (*values, statistics.median(values))]
        rows.append(f"| {name.replace('_', ' ')} | " + " | ".join(shown) + " |")
    readme = HERE / "README.md"
    head = readme.read_text().split("<!-- table -->")[0]
    readme.write_text(head + "<!-- table -->\n" + "\n".join(rows) + "\n")
    Console().print("\n".join(rows))


if __name__ == "__main__":
    main()
