"""`dsjax data build CONFIG`: tokenise a corpus once, in parallel, into memory-mapped files."""

import argparse

HELP = "Tokenise a corpus once, in parallel and resumably, into memory-mapped files."

_EXAMPLE = """\
A build that is interrupted goes on where it was when the same command is given again.

  dsjax data build configs/run/quickstart.yaml
  dsjax data build my.yaml --set data.tokenizer.vocab_size=8192 --out tokens
      then, in another config:   data: {sources: [{kind: tokens, path: tokens}]}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", metavar="build", required=True)
    build = verbs.add_parser("build", help="tokenise the sources of a run file", description=HELP, epilog=_EXAMPLE)
    build.add_argument("config", metavar="CONFIG", help="a run file; its `data` is what counts")
    build.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one value (repeatable)")
    build.add_argument("--out", metavar="DIR", help="write into this folder, for sources of kind `tokens`")
    build.add_argument("--workers", type=int, metavar="N", help="threads that tokenise (default: one per CPU)")
    build.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build, and print the counts."""
    import json
    import sys
    from pathlib import Path

    from dsjax.config.load import load_run
    from dsjax.data.corpus.build import build_corpus
    from dsjax.runs.disk import unwritable
    from dsjax.setup.resolve import resolved

    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers must be at least 1; got {arguments.workers}")
    if arguments.out is not None and (problem := unwritable(Path(arguments.out))):
        raise ValueError(f"--out {arguments.out}: {problem}")
    config = resolved(load_run(arguments.config, arguments.set)).data  # the model decides what its rows are for
    corpus = build_corpus(config, progress=not arguments.json, workers=arguments.workers, out=arguments.out)
    if corpus.note:
        print(f"dsjax: {corpus.note}", file=sys.stderr)
    splits = {
        name: {
            "documents": sum(store.num_documents for store in stores),
            "tokens": sum(store.num_tokens for store in stores),
            "bytes": sum(store.num_bytes for store in stores),
        }
        for name, stores in (("train", corpus.train), ("validation", corpus.validation))
    }
    result = {
        "folder": str(corpus.folder),
        "hash": corpus.hash,
        "vocab_size": corpus.tokenizer.vocab_size,
        **splits,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, counts in splits.items():
        per_token = f", {counts['bytes'] / counts['tokens']:.2f} bytes a token" if counts["tokens"] else ""
        print(f"{name:<11}{counts['documents']:>10,} documents {counts['tokens']:>15,} tokens{per_token}")
    print(f"vocabulary {corpus.tokenizer.vocab_size:,}, data hash {corpus.hash[:16]}")
    print(f"in {corpus.folder}")
    return 0
