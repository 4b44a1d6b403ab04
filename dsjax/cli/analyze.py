"""`dsjax analyze CONFIG`: how difficult the rows are, by the metrics of a curriculum."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from dsjax.data.corpus.build import Corpus
    from dsjax.data.rows.mixture import Rows

HELP = "how difficult the training rows are, by the metrics of a curriculum"

_EPILOG = """\
What is measured is kept for `dsjax train`, which measures by itself what is missing.

  dsjax analyze my.yaml --metric vocab_rarity
  dsjax analyze my.yaml --metric my_package.my_module.my_function --examples 5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.epilog = _EPILOG
    parser.usage = "dsjax analyze CONFIG [options]"
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a run file; its data and curriculum are what counts")
    add("--set", action="append", default=[], metavar="A.B=C", help="change one value (repeatable)")
    add("--metric", metavar="NAME", help="vocab_rarity, length, length_then_rarity or a function's dotted path")
    add("--examples", type=int, default=2, metavar="N", help="easiest and hardest rows to show (default: 2)")
    add("--workers", type=int, metavar="N", help="threads that measure (default: one per CPU)")
    add("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure what is not measured yet, print and draw it."""
    import json
    import sys

    from dsjax.config.load import load_run
    from dsjax.data.corpus.build import build_corpus
    from dsjax.data.curriculum.analyze import metrics_of, open_index
    from dsjax.data.curriculum.metrics import code_of
    from dsjax.data.rows.mixture import Rows
    from dsjax.observe.plots import require_plots
    from dsjax.setup.resolve import resolved

    if arguments.examples < 0 or (arguments.workers is not None and arguments.workers < 1):
        raise ValueError(
            f"--examples must be 0 or more and --workers 1 or more; got {arguments.examples}, {arguments.workers}"
        )
    config = resolved(load_run(arguments.config, arguments.set))
    metrics = (arguments.metric,) if arguments.metric else metrics_of(config.curriculum) if config.curriculum else ()
    if not metrics:
        raise ValueError(
            f"{arguments.config} has no curriculum.difficulty: name a metric, such as --metric vocab_rarity"
        )
    for metric in metrics:
        code_of(metric)  # refuse an unknown metric now, not after the text is read and others are measured
    require_plots()
    corpus = build_corpus(config.data, progress=not arguments.json)
    if corpus.note:
        print(f"dsjax: {corpus.note}", file=sys.stderr)
    rows = Rows.of(corpus, config.data, split="train")
    index = open_index(
        corpus, rows, config=config.data, metrics=metrics, progress=not arguments.json, workers=arguments.workers
    )
    results = {}
    for metric, values in index.values.items():
        folder = index.folders[metric]
        results[metric] = _describe(metric, values, rows, corpus, arguments.examples, str(folder), arguments.json)
    if arguments.json:
        print(json.dumps(results, indent=2))
    return 0


def _describe(
    metric: str, values: "np.ndarray", rows: "Rows", corpus: "Corpus", count: int, folder: str, quiet: bool
) -> dict:
    """Print one metric unless `quiet`, draw it into its folder, and return the numbers.

    A picture that cannot be written gives a warning.
    """
    import sys
    from pathlib import Path

    from dsjax.data.curriculum.describe import examples, histogram, percentiles
    from dsjax.observe.plots import histogram_plot

    found = percentiles(values)
    ends = examples(values, rows, tokenizer=corpus.tokenizer, count=count)
    picture = Path(folder, "histogram.png")
    if not quiet:
        print(f"{metric}: {len(values):,} rows of {rows.sequence_length} tokens\n")
        width = max(len(f"{value:,}") for value in found.values())
        for percent, value in found.items():
            print(f"{'easiest row' if percent == 0 else f'{percent}% up to':>11}  {value:>{width},}")
        print("\n" + "\n".join(histogram(values)))
        for name, some in zip(("easiest", "hardest"), ends, strict=True):
            for one in some:
                print(f"\n{name}: row {one.row:,}, {one.difficulty:,}")
                print("\n".join(one.lines()))
        print(f"\nindex and {picture.name} in {folder}")
    try:
        histogram_plot(values, picture, label=f"difficulty by {metric}", title=f"{len(values):,} rows")
    except OSError as error:
        print(f"dsjax: warning: {picture} cannot be written: {error.strerror}", file=sys.stderr)
    shown = [[(one.row, one.difficulty, one.text) for one in some] for some in ends]
    return {"folder": folder, "rows": len(values), "percentiles": found, "easiest": shown[0], "hardest": shown[1]}
