"""`dsjax evaluate SOURCE --data PATH...`: how well a trained model predicts text."""

import argparse

HELP = "loss, perplexity and bits per byte of a model on text"

_DESCRIPTION = """\
Score text with a model: a window of --length tokens slides over each document by --stride."""

_EPILOG = """\
  dsjax evaluate bloom-560m --data pages.jsonl --field body --stride 256 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run folder, a Hugging Face model folder or a GGUF file")
    add("--data", nargs="+", required=True, metavar="PATH", help="text files, folders of them, .jsonl files")
    add("--length", type=int, metavar="T", help="tokens in a window (default: that of the training)")
    add("--stride", type=int, metavar="N", help="tokens between windows (default: half the length)")
    add("--score-first", action="store_true", help="score each document's first token too, after an end of text")
    add("--field", default="text", metavar="KEY", help="the key of a .jsonl line that holds the text (default: text)")
    add("--glob", default="*.txt", metavar="PATTERN", help="which files of a folder count (default: *.txt)")
    choices = ("error", "replace", "skip")
    add("--undecodable", choices=choices, default="error", metavar="HOW", help="bytes not UTF-8: error, replace, skip")
    add("--batch-tokens", type=int, metavar="N", help="tokens at a time on each device (default: 8192)")
    add("--json", action="store_true", help="print the figures, each with how it was obtained, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the figures."""
    import contextlib
    import json
    import sys

    from rich.console import Console

    from dsjax.observe.progress import Progress
    from dsjax.train import evaluate
    from dsjax.train.processes import use_compilation_cache
    from dsjax.train.source import open_model

    use_compilation_cache()
    trained = open_model(arguments.source, report=lambda line: print(f"dsjax: {line}", file=sys.stderr))
    length = trained.trained_length if arguments.length is None else arguments.length
    stride = max(1, length // 2) if arguments.stride is None else arguments.stride
    text = evaluate.read_text(
        _sources(arguments),
        trained.tokenizer,
        score_first=arguments.score_first,
        undecodable=arguments.undecodable,
    )
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []

        def show(done: int, total: int, so_far: evaluate.Score) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, console=Console(stderr=True))))
            bars[0].update(done, loss=so_far.nats / so_far.num_tokens)

        score = evaluate.score(
            trained.model,
            text.documents,
            length=length,
            stride=stride,
            batch_tokens=evaluate.BATCH_TOKENS if arguments.batch_tokens is None else arguments.batch_tokens,
            progress=show,
        )
    figures = evaluate.figures(text, score, length=length, stride=stride, score_first=arguments.score_first)
    if arguments.json:
        named = {name: {"value": value, "how": how} for name, (value, how) in figures.items()}
        print(json.dumps({"source": trained.what, **named}))
    else:
        _print_table(figures, trained.what)
    return 0


def _sources(arguments: argparse.Namespace) -> list:
    """Each PATH as a source of text: a .jsonl file by its name, anything else as text."""
    from dsjax.data.config import JsonlSource, TextSource

    return [
        JsonlSource(path=path, field=arguments.field)
        if path.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz"))
        else TextSource(path=path, glob=arguments.glob)
        for path in arguments.data
    ]


def _print_table(figures: dict, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how it was obtained", overflow="fold")
    for name, (value, how) in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.5g}" if isinstance(value, float) else f"{value:,}", how)
    Console(highlight=False).print(table)
