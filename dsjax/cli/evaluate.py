"""`dsjax evaluate SOURCE --data PATH...`: how well a trained model predicts text."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsjax.inference.open import TrainedModel

HELP = "loss, perplexity and bits per byte of a model on text; accuracy and F1 of a classifier"

_DESCRIPTION = """\
Score text by a sliding window; of a classifier labelled texts, of an encoder hidden tokens."""

_EPILOG = """\
  dsjax evaluate runs/reviews --task classification --data test.jsonl --label-key stars"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.usage = "dsjax evaluate SOURCE --data PATH [PATH ...] [options]"
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run folder, a Hugging Face model folder or a GGUF file")
    add("--data", nargs="+", required=True, metavar="PATH", help="text files, folders of them, .jsonl files")
    add("--length", type=int, metavar="T", help="tokens in a window (default: that of the training)")
    add("--stride", type=int, metavar="N", help="tokens between windows (default: half the length)")
    add("--score-first", action="store_true", help="score each document's first token too, after an end of text")
    add("--field", default="text", metavar="KEY", help="key of a .jsonl line's text (default: text)")
    tasks = tuple(_EVALUATIONS)
    add("--task", choices=tasks, metavar="TASK", help=", ".join(tasks) + " (default: what the model is for)")
    add("--label-key", default="label", metavar="KEY", help="key of a .jsonl line's label (default: label)")
    add("--pair-key", default="", metavar="KEY", help="key of a .jsonl line's second text, of pairs")
    add("--seed", type=int, default=0, metavar="N", help="of what is hidden, with --task masked (default: 0)")
    add("--glob", default="*.txt", metavar="PATTERN", help="which files of a folder count (default: *.txt)")
    choices = ("error", "replace", "skip")
    add("--undecodable", choices=choices, default="error", metavar="HOW", help="bytes not UTF-8: error, replace, skip")
    add("--batch-tokens", type=int, metavar="N", help="tokens at a time on each device (default: 8192)")
    add("--json", action="store_true", help="print the metrics, each with how it was obtained, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the metrics."""
    import json
    import sys

    from dsjax.data.corpus.progress import elapsed
    from dsjax.inference.open import open_model
    from dsjax.mesh.processes import use_compilation_cache

    use_compilation_cache()
    with elapsed(f"reading {arguments.source}", enabled=True):
        trained = open_model(arguments.source, report=lambda line: print(f"dsjax: {line}", file=sys.stderr))
    metrics = _EVALUATIONS[_task(trained, arguments.task)](trained, arguments)
    if arguments.json:
        named = {name: {"value": value, "how": how} for name, (value, how) in metrics.items()}
        print(json.dumps({"source": trained.what, **named}))
    else:
        _print_table(metrics, trained.what)
    return 0


def _task(trained: "TrainedModel", asked: str | None) -> str:
    """The model's task, which must be the one that was asked for.

    Raises:
        ValueError: it is for something else.
    """
    from dsjax.objectives.registry import objectives_for

    fitting = objectives_for(trained.model.config)
    own = next(iter(fitting), trained.model.config.task)
    if not fitting or asked not in (None, *fitting):
        wanted = f"--task {asked} needs a model for that" if asked else "such vectors are not evaluated here"
        raise ValueError(f"{trained.what} was made for the task {own}; {wanted}: fine-tune it first (dsjax train)")
    return asked or own


def _on_text(trained: "TrainedModel", arguments: argparse.Namespace) -> dict:
    """A language model's loss on text, in windows."""
    import contextlib

    from rich.console import Console

    from dsjax.data.corpus.progress import elapsed
    from dsjax.evaluate import perplexity
    from dsjax.observe.progress import Progress

    length = trained.trained_length if arguments.length is None else arguments.length
    stride = max(1, length // 2) if arguments.stride is None else arguments.stride
    batch_tokens = perplexity.BATCH_TOKENS if arguments.batch_tokens is None else arguments.batch_tokens
    perplexity.check_windows(trained.model, length=length, stride=stride, batch_tokens=batch_tokens)
    with elapsed("tokenising the text", enabled=True):
        text = perplexity.read_text(
            _sources(arguments),
            trained.tokenizer,
            score_first=arguments.score_first,
            undecodable=arguments.undecodable,
        )
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def show(done: int, total: int, so_far: perplexity.Score) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, console=Console(stderr=True))))
            bars[0].update(done, loss=so_far.nats / so_far.num_tokens)

        score = perplexity.score(
            trained.model,
            text.documents,
            length=length,
            stride=stride,
            batch_tokens=batch_tokens,
            progress=show,
        )
    return perplexity.metrics(text, score, length=length, stride=stride)


def _on_hidden_tokens(trained: "TrainedModel", arguments: argparse.Namespace) -> dict:
    """An encoder's loss on the tokens that are hidden from it."""
    from dsjax.evaluate.masked import metrics, score_masked

    length = _length(trained, arguments)
    score = score_masked(
        trained.model,
        trained.tokenizer,
        _sources(arguments),
        length=length,
        seed=arguments.seed,
        batch_rows=max(1, (arguments.batch_tokens or _BATCH_TOKENS) // length),
        undecodable=arguments.undecodable,
    )
    return metrics(score, length=length, seed=arguments.seed)


def _on_labels(trained: "TrainedModel", arguments: argparse.Namespace) -> dict:
    """A classifier's accuracy."""
    from dsjax.data.config import JsonlSource
    from dsjax.evaluate.labels import metrics, predict, read_labelled

    keys = {"field": arguments.field, "text_pair": arguments.pair_key, "label": arguments.label_key}
    labelled = read_labelled(
        [JsonlSource(path=path, **keys) for path in arguments.data],
        trained.tokenizer,
        names=trained.labels,
        length=_length(trained, arguments),
        undecodable=arguments.undecodable,
    )
    batch_tokens = arguments.batch_tokens or _BATCH_TOKENS
    return metrics(labelled, predict(trained.model, labelled.rows, batch_tokens=batch_tokens))


_EVALUATIONS = {"language_model": _on_text, "classification": _on_labels, "masked": _on_hidden_tokens}
"""By the name of the objective that trained the model."""
_BATCH_TOKENS = 8192


def _length(trained: "TrainedModel", arguments: argparse.Namespace) -> int:
    """Tokens of a row, within the model's positions.

    Raises:
        ValueError: more were asked for than it has.
    """
    limit, length = trained.model.architecture.max_positions, arguments.length or trained.trained_length
    if limit and length > limit:
        raise ValueError(f"--length {length} is more than the {limit} positions that the model has")
    return length


def _sources(arguments: argparse.Namespace) -> list:
    """Each PATH as a source of text: a .jsonl file (compressed or not) by its name, anything else as text."""
    from dsjax.data.config import JsonlSource, TextSource
    from dsjax.data.text.jsonl import JSONL_ENDINGS

    return [
        JsonlSource(path=path, field=arguments.field)
        if path.endswith((*JSONL_ENDINGS, ".ndjson"))
        else TextSource(path=path, glob=arguments.glob)
        for path in arguments.data
    ]


def _print_table(metrics: dict, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how it was obtained", overflow="fold")
    for name, (value, how) in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:,.5g}" if isinstance(value, float) else f"{value:,}", how)
    Console(highlight=False).print(table)
