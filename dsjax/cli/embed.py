"""`dsjax embed SOURCE --text A --text B`: texts as unit vectors, and their cosines."""

import argparse

HELP = "unit vectors of texts, and the cosine of each pair"

_DESCRIPTION = """\
Turn texts into unit vectors and print the cosine of each pair: of two texts one number, of more a
table. A vector is the mean of the model's features over the text, or what files of
sentence-transformers in the model's folder say. --json prints the vectors, too."""

_EPILOG = """\
  dsjax embed all-MiniLM-L6-v2 --text "A man plays a guitar." --text "Someone plays an instrument."
  dsjax embed all-MiniLM-L6-v2 --text - --json < sentences.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("source", metavar="SOURCE", help="a run folder, a Hugging Face model folder or a GGUF file")
    parser.add_argument(
        "--text",
        action="append",
        required=True,
        metavar="TEXT",
        dest="texts",
        help="a text, may be given again; - reads them from standard input, one a line (ended by a line feed)",
    )
    parser.add_argument("--json", action="store_true", help="print texts, vectors and cosines as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the cosines, or vectors and cosines as JSON."""
    import json

    from dsjax.data.corpus.progress import elapsed
    from dsjax.inference.embed import cosines, embed
    from dsjax.inference.open import open_model
    from dsjax.mesh.processes import use_compilation_cache

    texts = _texts(arguments.texts)
    use_compilation_cache()
    with elapsed(f"reading {arguments.source}", enabled=True):
        trained = open_model(arguments.source, report=_note)
    with elapsed("embedding", enabled=True):
        found = embed(trained, texts)
    for text, length in zip(texts, found.num_tokens, strict=True):
        if found.limit and length > found.limit:
            _note(f"of {length} tokens the model sees the first {found.limit}: {text[:40]!r}...")
    alike = cosines(found.vectors)
    if arguments.json:
        result = {
            "source": trained.what,
            "dimensions": found.vectors.shape[1],
            "texts": texts,
            "num_tokens": list(found.num_tokens),
            "vectors": found.vectors.tolist(),
            "cosines": alike.tolist(),
        }
        print(json.dumps(result, ensure_ascii=False))
    elif len(texts) == 1:
        print(" ".join(f"{value:.6f}" for value in found.vectors[0].tolist()))
    elif len(texts) == 2:
        print(f"{alike[0, 1]:.4f}")
    else:
        _print_matrix(texts, alike)
    return 0


def _texts(given: list[str]) -> list[str]:
    """The texts; those of standard input are its lines, empty ones left out.

    Raises:
        ValueError: standard input is not UTF-8 (nor has another encoding's byte-order mark), or has no text.
    """
    import sys

    from dsjax.observe.untrusted import decode_text, split_lines

    texts: list[str] = []
    for text in given:
        if text != "-":
            texts.append(text)
            continue
        lines = split_lines(decode_text(sys.stdin.buffer.read(), "standard input"))
        filled = [line for line in lines if line.strip()]
        if not filled:
            raise ValueError("standard input has no text; give a text a line")
        if len(filled) < len(lines):
            _note(f"of {len(lines)} lines {len(lines) - len(filled)} without text are left out")
        texts += filled
    return texts


def _print_matrix(texts: list[str], alike) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for header in ("", *(str(number + 1) for number in range(len(texts)))):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis")
    for number, (text, row) in enumerate(zip(texts, alike.tolist(), strict=True)):
        table.add_row(str(number + 1), *(f"{value:.4f}" for value in row), Text(" ".join(text.split())))
    Console(highlight=False).print(table)


def _note(line: str) -> None:
    import sys

    print(f"dsjax: {line}", file=sys.stderr)
