"""`dsjax generate SOURCE --prompt TEXT`: text that a trained model generates after a prompt."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsjax.models.generate import Generation

HELP = "continue a prompt with a trained model"

_USAGE = "dsjax generate SOURCE --prompt TEXT [options]"
_DESCRIPTION = "Continue a prompt with a trained model; the text appears as it is made."
_EPILOG = '  dsjax generate SmolLM2-135M-Instruct --chat --prompt "What is the capital of France?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.usage, parser.description, parser.epilog = _USAGE, _DESCRIPTION, _EPILOG
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run folder, a Hugging Face model folder or a GGUF file")
    add("--prompt", required=True, action="append", metavar="TEXT", help="- reads standard input; repeat for a batch")
    add("--chat", action="store_true", help="as a user's message, by the model's template; show only the answer")
    add("--system", metavar="TEXT", help="with --chat: a system message before it")
    add("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, merged into the model")
    add("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to write (default: 100)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--temperature", type=float, default=0.0, metavar="F", help="0: greedy (default); 1: as the model has it")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest tokens with this share")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--min-p", type=float, metavar="P", help="draw among tokens P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="F", help="above 1: what occurred is less likely")
    add("--seed", type=int, metavar="S", help="of the draws (default: 0)")
    add("--json", action="store_true", help="print prompt, text and why it ended, a line for each prompt")


def run(arguments: argparse.Namespace) -> int:
    """Print the prompts and the text that the model generates after them."""
    import json

    from dsjax.data.corpus.progress import elapsed
    from dsjax.inference.open import open_model, with_adapter
    from dsjax.inference.text import chat_prompt, generate_text, plain_prompt
    from dsjax.mesh.processes import use_compilation_cache

    texts = [_prompt(given) for given in arguments.prompt]
    if arguments.system is not None and not arguments.chat:
        raise ValueError("--system is a message of a conversation; give --chat too")
    options = _options(arguments)
    use_compilation_cache()
    with elapsed(f"reading {arguments.source}", enabled=True):
        trained = open_model(arguments.source, report=_note)
    if arguments.adapter is not None:
        trained = with_adapter(trained, arguments.adapter)
    if arguments.chat:
        prompts = [chat_prompt(trained, text, system=arguments.system) for text in texts]
    else:
        prompts = [plain_prompt(trained, text) for text in texts]
    all_written = generate_text(
        trained, prompts, options=options, stop=arguments.stop, show=_nothing if arguments.json else _show
    )
    if not arguments.json:
        print()
        return 0
    for prompt, written in zip(prompts, all_written, strict=True):
        result = {
            "source": trained.what,
            "prompt": prompt.text,
            "text": written.text,
            "prompt_tokens": written.prompt_tokens,
            "new_tokens": written.new_tokens,
            "stopped_by": written.stopped_by,
        }
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _options(arguments: argparse.Namespace) -> "Generation":
    """The arguments about length and choice; says which of them have no effect."""
    from dsjax.models.generate import Generation
    from dsjax.models.sampling import Sampling

    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=1.0 if arguments.top_p is None else arguments.top_p,
        top_k=0 if arguments.top_k is None else arguments.top_k,
        min_p=0.0 if arguments.min_p is None else arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    options = Generation(max_new_tokens=arguments.max_new_tokens, sampling=sampling, seed=arguments.seed or 0)
    drawing = {"--top-p": arguments.top_p, "--top-k": arguments.top_k, "--min-p": arguments.min_p}
    given = {**drawing, "--seed": arguments.seed}
    ignored = [name for name, value in given.items() if value is not None]
    if arguments.temperature == 0 and ignored:
        _note(f"without --temperature nothing is drawn: {' and '.join(ignored)} not used")
    return options


def _prompt(given: str) -> str:
    """The text; from standard input without the line end that shells put at its end.

    Raises:
        ValueError: it is empty, or not UTF-8.
    """
    import os
    import sys

    from dsjax.observe.untrusted import decode_text

    data = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    text = decode_text(data, "the prompt")
    text = text.removesuffix("\n").removesuffix("\r") if given == "-" else text
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _nothing(piece: str) -> None:
    pass


def _note(line: str) -> None:
    import sys

    print(f"dsjax: {line}", file=sys.stderr)
