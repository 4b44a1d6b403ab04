"""A run's folder: what was asked, with what it ran, what came of it. Nothing in it is ever overwritten by another run.

config.yaml     the resolved config          versions.json   packages, devices, flags
data.json       hash and size of the data    tokenizer/      what the tokens mean
metrics.jsonl   one row a step               loss.png        its picture
checkpoints/    see checkpoint/store.py      summary.json    the outcome, each metric with how it was obtained

What a resume replaces (rows of metrics.jsonl, a config that changed harmlessly) stays beside it as NAME.bak, NAME.bak.1
and so on.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from dsjax.checkpoint import manifest
from dsjax.checkpoint.manifest import read_json
from dsjax.config.load import decode, differences, to_yaml
from dsjax.config.run import ResolvedRunConfig, RunConfig, check_name
from dsjax.config.strict_yaml import parse_yaml
from dsjax.mesh.processes import barrier, from_first
from dsjax.observe.environment import versions
from dsjax.observe.untrusted import decode_text
from dsjax.runs.commands import resume as resume_command
from dsjax.runs.disk import unwritable
from dsjax.setup.resolve import resolved

SUMMARY_FILE = "summary.json"
FAILED = "failed"  # its entry of what went wrong at the end; a resume tries that again
# What may differ when a run is resumed: where and how it runs, how long, and what is looked at meanwhile. Data may lie
# elsewhere: their hash says whether they are the same.
RESUMABLE = re.compile(
    r"name|(mesh|checkpoint|observe|evaluate|sample)\..*|train\.(steps|tokens|accumulation|max_nonfinite_steps|max_programs)"
    r"|model\.(remat|segments|init_from)|data\.(cache_dir|read_threads|prefetch|tokenizer\.path|(validation_)?sources\.\d+\.path)"
)
# What a run that was killed before its config.yaml was written has left.
BEGUN = {"data.json", "versions.json", "tokenizer"}


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.txt"); write_atomically(path, "whole"); path.read_text()
        'whole'
    """
    manifest.write_atomically(path, text.encode())


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder that may be written to.

    Attributes:
        path: the folder; of a new run it does not exist before `write_start`.
        resumed: whether it holds a run that is gone on with.
        is_first_process: whether this process writes into it.
        options: arguments of this start that the next one needs, too.
    """

    path: Path
    resumed: bool
    is_first_process: bool
    options: tuple[str, ...] = ()

    @property
    def resume_command(self) -> str:
        """The command that goes on."""
        return resume_command(self.path, *self.options)

    def write_start(self, config: RunConfig, data: Mapping[str, Any], save_tokenizer: Callable[[Path], None]) -> None:
        """Write down what is asked and with what it runs; when a resume changes it, what it was stays as NAME.bak.

        Args:
            config: the resolved config.
            data: content of data.json; its "hash" is what a resume compares.
            save_tokenizer: writes the tokenizer into a folder.
        """
        if not self.is_first_process:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            write_json(self.path / "data.json", data)
            save_tokenizer(self.path / "tokenizer")
        _replace(self.path / "versions.json", _json(versions()))
        _replace(self.path / "config.yaml", to_yaml(config))  # last: it makes the folder a run


def begun_folder(name: str, *, run_dir: str | Path | None, resume: Literal["no", "must", "if_any"]) -> Path | None:
    """The folder of the run that will be gone on with; None if a new one begins. All processes call it.

    Args:
        name: of the run.
        run_dir: as `open_folder`.
        resume: as `open_folder`.
    """
    path = None if resume == "no" else _path(name, run_dir, resume)
    return path if path is not None and (path / "config.yaml").is_file() else None


def begun_hash(folder: Path | None) -> str:
    """The hash of the data of the run in a folder; '' if there is none."""
    file = None if folder is None else folder / "data.json"
    return "" if file is None or not file.is_file() else str(read_json(file).get("hash", ""))


def _path(name: str, run_dir: str | Path | None, resume: Literal["no", "must", "if_any"]) -> Path:
    """The folder of a new run, or of the one to be resumed."""
    root = Path("runs")
    if resume == "no":
        return Path(from_first(str(run_dir or new_folder(root, name))))
    return Path(from_first(str(run_dir or newest_folder(root, name) or root / name)))


def open_folder(
    config: RunConfig,
    data_hash: str | None,
    *,
    run_dir: str | Path | None,
    resume: Literal["no", "must", "if_any"],
    report: Callable[[str], None],
    options: tuple[str, ...] = (),
) -> RunFolder:
    """Find the folder of a new run, or of the one to be resumed; nothing is written yet. All processes call it.

    Args:
        config: the resolved config.
        data_hash: of the corpus; None before it is read: a look at what would be refused then.
        run_dir: the folder; None means runs/<name>: a new one gets a number, a resumed one is the newest.
        resume: as `dsjax.train.run`.
        report: told of harmless differences.
        options: as RunFolder's.

    Raises:
        ValueError: the folder is taken, there is nothing to resume, nothing can be written there, or config or data
            are not those of the run.
    """
    path = _path(config.name, run_dir, resume)
    exists, taken = (path / "config.yaml").is_file(), _holds_something(path)
    barrier("looked at the run folder")
    if exists and resume == "no":
        raise ValueError(f"{path} holds a run already; go on with it by --resume, or give another --run-dir")
    if not exists and resume == "must":
        raise ValueError(f"nothing to resume: {path} holds no run; leave --resume out to start one")
    if not exists and taken:
        raise ValueError(f"{path} is not empty and holds no run; nothing is overwritten: give another --run-dir")
    if problem := from_first(unwritable(path) if jax.process_index() == 0 else ""):
        raise ValueError(f"the run cannot be written to {path}: {problem}")
    if exists:
        _check_resumable(path, config, data_hash, report)
    return RunFolder(path, exists, jax.process_index() == 0, options)


def read_config(path: Path) -> ResolvedRunConfig:
    """The config of a run folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    file = path / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{path} is not a run folder: it has no config.yaml")
    found = parse_yaml(decode_text(file.read_bytes(), str(file)), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: expected the sections of a run, found {found!r:.60}")
    try:
        check_name(str(found.get("name", "run")))
    except ValueError:  # from before names were checked: the folder is there, and its run's name names nothing
        found["name"] = "run"
    return resolved(decode(RunConfig, found, origin=str(file)))


def _holds_something(path: Path) -> bool:
    """Whether there is anything but what a start that was cut short has left."""
    return path.exists() and any(
        file.name.removesuffix(".partial") not in {*BEGUN, "config.yaml"} for file in path.iterdir()
    )


def _check_resumable(path: Path, config: RunConfig, data_hash: str | None, report: Callable[[str], None]) -> None:
    for line in refuse_changes(path, differences(read_config(path), config)):
        report(f"changed on resume: {line}")
    before = read_json(path / "data.json")["hash"]
    if data_hash is not None and before != data_hash:
        raise ValueError(
            f"the data has changed since {path} was started (hash {before[:12]}, now {data_hash[:12]}); bring the old "
            "data back, or start a new run with another --run-dir"
        )


def new_folder(root: Path, name: str) -> Path:
    """The first free one of root/name, root/name-2, root/name-3 ...; not made yet.

    Raises:
        ValueError: the name would lead out of `root`.
    """
    check_name(name)
    candidate, number = root / name, 2
    while candidate.exists():
        candidate, number = root / f"{name}-{number}", number + 1
    return candidate


def newest_folder(root: Path, name: str) -> Path | None:
    """The last that `new_folder` gave, if any; raises what it raises."""
    check_name(name)
    newest, number = None, 2
    candidate = root / name
    while candidate.exists():
        newest, candidate, number = candidate, root / f"{name}-{number}", number + 1
    return newest


def refuse_changes(folder: Path, differences: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Lines naming what differs, harmlessly, from the folder's config.

    Raises:
        ValueError: something differs that would make the resumed run another run.
    """
    harmless, harmful = [], []
    for path, before, now in differences:
        line = f"{path}: {before!r} -> {now!r}"
        (harmless if RESUMABLE.fullmatch(path) else harmful).append(line)
    if harmful:
        raise ValueError(
            f"{folder} holds a run with another config; these may not change on --resume:\n  "
            + "\n  ".join(harmful)
            + "\nset them back, or start a new run with another --run-dir"
        )
    return harmless


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    write_atomically(path, _json(content))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file whose old content, if it is another, stays beside it."""
    old = path.read_text(encoding="utf-8") if path.exists() else text
    if old != text:
        manifest.back_up(path, old.encode())
    if old != text or not path.exists():
        write_atomically(path, text)
