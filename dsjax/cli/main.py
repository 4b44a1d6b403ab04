"""Finds the verb, imports only its file, and turns users' mistakes into one message and an exit code.

Exit codes: 0 done, 1 it was begun and failed, 2 a mistake in what was asked (1 and 2 with one message on stderr), 130
interrupted, 141 the reader of the output went away; other codes are the verb's own. DSJAX_TRACEBACK=1 shows where.
On Linux the command starts itself once more, to take memory in large pages (observe/host.py; DSJAX_KEEP_MEMORY=0: not).
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, cast

VERBS = {
    "train": "train a model as a run file says",
    "generate": "continue a prompt with a trained model",
    "evaluate": "loss, perplexity and bits per byte of a model on text",
    "embed": "unit vectors of texts, and the cosine of each pair",
    "data": "tokenise a corpus once, into memory-mapped files",
    "analyze": "how difficult the training rows are, by the metrics of a curriculum",
    "plan": "memory, traffic and FLOPs a run would need, without running it",
    "convert": "between a run folder, a Hugging Face folder and a GGUF file",
    "config": "show, compare and document run files",
    "env": "versions, devices and memory",
}
MAX_WIDTH = 100
MISTAKES = (ValueError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class UserError(ValueError):
    """The request cannot be fulfilled: printed without a traceback, exit code 2."""


class Failure(RuntimeError):
    """The request was begun and failed for a reason that is not a bug: printed without a traceback, exit code 1."""


class Verb(Protocol):
    """The interface of each file in dsjax/cli."""

    HELP: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """argparse on at most 100 columns, whose errors are UserErrors."""

    def __init__(self, **options: object) -> None:
        width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
        options["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, width=width, max_help_position=30
        )
        super().__init__(**options)  # pyright: ignore[reportArgumentType]

    def error(self, message: str) -> NoReturn:
        """Raises UserError in place of printing the usage and exiting."""
        raise UserError(f"{message} (see {self.prog} --help)")


def overview() -> str:
    """The text of `dsjax --help`."""
    lines = [f"  {verb:<10} {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: dsjax VERB ...",
            "",
            "The DeepSpeed papers as JAX programs that compose.",
            "",
            *lines,
            "",
            "dsjax VERB --help   what a verb takes            dsjax --version   the version",
            "Start with: dsjax train configs/run/quickstart.yaml",
        ]
    )


def parser_of(name: str) -> tuple[Parser, Verb]:
    """The parser of one verb and its module, imported here and nowhere else."""
    verb = cast(Verb, importlib.import_module(f"dsjax.cli.{name}"))
    parser = Parser(prog=f"dsjax {name}", description=verb.HELP)
    verb.add_arguments(parser)
    return parser, verb


def dispatch(arguments: Sequence[str]) -> int:
    """Run the verb that `arguments` begin with.

    Raises:
        UserError: no such verb, or arguments that it does not take.
        SystemExit: after --help.
    """
    if not arguments:
        print(overview(), file=sys.stderr)
        return 2
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "--version":
        print(f"dsjax {importlib.metadata.version('dsjax')}")
        return 0
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        raise UserError(f"no verb {name!r}{f'; closest: {near[0]}' if near else ''}; there are {', '.join(VERBS)}")
    from dsjax.observe.output import escape_unprintable  # not for --help

    parser, verb = parser_of(name)
    given = parser.parse_args(rest)
    escape_unprintable()
    return verb.run(given)


def _as_note(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for users as this command says things; of others where in the code it was given."""
    if issubclass(category, UserWarning):
        return f"dsjax: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def message_of(error: Exception) -> str:
    """One clear message: a file error names the file in place of the number of the error."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    text = str(error) or type(error).__name__
    return text.replace("\n", "\n  ")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code.

    Args:
        argv: What follows `dsjax`; None takes it from the command line, in a process that is the command's alone.

    Example:
        >>> main(["--help"])  # doctest: +ELLIPSIS
        usage: dsjax VERB ...
        ...
        0
    """
    warnings.formatwarning = _as_note
    try:
        if argv is None:
            from dsjax.observe.host import restart_with_huge_pages  # not for a verb that is called

            restart_with_huge_pages()
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BaseException as error:
        return report(error)


def report(error: BaseException) -> int:
    """Say on stderr what ended a verb. Returns the exit code.

    Raises:
        BaseException: the error itself, if it is a bug, or DSJAX_TRACEBACK asks where a mistake was found.

    Example:
        >>> report(SystemExit(7))
        7
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more on its way out; point it where that succeeds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, KeyboardInterrupt):
        print("dsjax: interrupted", file=sys.stderr)
        return 130
    if not isinstance(error, (Failure, *MISTAKES)) or os.environ.get("DSJAX_TRACEBACK") == "1":
        raise error
    print(f"dsjax: error: {message_of(error)}", file=sys.stderr)
    return 1 if isinstance(error, Failure) else 2
