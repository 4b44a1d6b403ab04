"""Commands that are recommended: they can be copied into a shell as they are, whatever their paths hold."""

import shlex
from pathlib import Path


def command(verb: str, *words: str | Path) -> str:
    """A `dsjax` command, quoted for a shell.

    Args:
        verb: what dsjax does.
        words: its arguments; a Path that begins with a dash is written so that it is no option.

    Example:
        >>> command("convert", Path("my runs/first"), Path("-odd"))
        "dsjax convert 'my runs/first' ./-odd"
    """
    return shlex.join(["dsjax", verb, *(_word(word) for word in words)])


def resume(folder: Path, *more: str) -> str:
    """The command that goes on with the run in a folder.

    Args:
        folder: of the run.
        more: further arguments.

    Example:
        >>> resume(Path("runs/my run"))
        "dsjax train 'runs/my run/config.yaml' --run-dir 'runs/my run' --resume"
    """
    return command("train", folder / "config.yaml", "--run-dir", folder, "--resume", *more)


def uses(source: Path, *, writes: bool, classifies: bool, adapter: Path | None = None) -> list[str]:
    """Commands that use a model; words in capitals are for the user to fill in.

    Args:
        source: the folder or file of the model.
        writes: whether it writes text from left to right.
        classifies: whether it gives texts labels.
        adapter: to be merged into it.

    Example:
        >>> uses(Path("minilm"), writes=False, classifies=False)
        ['dsjax embed minilm --text TEXT']
    """
    if writes:
        merged = [] if adapter is None else ["--adapter", adapter]
        return [command("generate", source, *merged, "--prompt", "TEXT")]
    if classifies:
        return [command("evaluate", source, "--data", "FILE.jsonl")]
    return [command("embed", source, "--text", "TEXT")]


def _word(word: str | Path) -> str:
    text = str(word)
    return f"./{text}" if isinstance(word, Path) and text.startswith("-") else text
