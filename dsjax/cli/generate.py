"""`dsjax generate SOURCE --prompt TEXT`: let a trained model go on with a text."""

import argparse

HELP = "continue a prompt with a trained model"

_DESCRIPTION = """\
Continue a prompt with a trained model; the text appears as it is made, after the prompt.
The likeliest token is taken each time (greedy) unless --temperature is above 0."""

_EPILOG = """\
  dsjax generate runs/quickstart --prompt "def "
  dsjax generate bloom-560m --prompt - --temperature 0.8 --top-p 0.95 < prompt.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("source", metavar="SOURCE", help="a run folder, a Hugging Face model folder or a GGUF file")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on with; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to write (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="F", help="0: greedy; 1: as the model has it")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens with this share")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="S", help="of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="print prompt, text and why it ended, at the end")


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt and what the model writes after it."""
    import json

    from dsjax.models.sampling import Sampling
    from dsjax.train.processes import use_compilation_cache
    from dsjax.train.source import open_model, write

    prompt = _prompt(arguments.prompt)
    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=1.0 if arguments.top_p is None else arguments.top_p,
        top_k=0 if arguments.top_k is None else arguments.top_k,
    )
    _say_what_is_ignored(arguments)
    use_compilation_cache()
    trained = open_model(arguments.source, report=_note)
    written = write(
        trained,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed or 0,
        show=_nothing if arguments.json else _show,
    )
    if not arguments.json:
        print()
        return 0
    result = {
        "source": trained.what,
        "prompt": prompt,
        "text": written.text,
        "prompt_tokens": written.prompt_tokens,
        "new_tokens": written.new_tokens,
        "stopped_by": written.stopped_by,
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0


def _prompt(given: str) -> str:
    """The text; from standard input without the line end that shells put at its end.

    Raises:
        ValueError: it is empty, or not UTF-8.
    """
    import os
    import sys

    data = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from error
    text = text.removesuffix("\n").removesuffix("\r") if given == "-" else text
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def _say_what_is_ignored(arguments: argparse.Namespace) -> None:
    given = {"--top-p": arguments.top_p, "--top-k": arguments.top_k, "--seed": arguments.seed}
    ignored = [name for name, value in given.items() if value is not None]
    if arguments.temperature == 0 and ignored:
        _note(f"without --temperature nothing is drawn: {' and '.join(ignored)} not used")


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _nothing(piece: str) -> None:
    pass


def _note(line: str) -> None:
    import sys

    print(f"dsjax: {line}", file=sys.stderr)
