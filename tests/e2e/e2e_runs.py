"""A tiny run for the end-to-end tests: its data, its config, and the ways of starting, watching and ending it."""

import contextlib
import dataclasses
import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "tests-e2e"
STEPS = 24
HALF = 12  # the checkpoint of this step is kept
# Compiling takes most of the time of these tests, and they are not about the speed of what is compiled.
# With large pages asked for the command does not start itself again, which a life that is forked does not do either:
# versions.json says which pages there are, and is kept twice where it changes.
ENVIRONMENT = {
    "XDG_CACHE_HOME": str(CACHE),
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "COLUMNS": "100",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
LAUNCH = [sys.executable, ROOT / "launch" / "local.py", "--log-dir", "logs", "--processes"]
PATIENCE = 300.0  # seconds: a machine may be slow, a test must not hang

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "mesh": {"data": 2, "fsdp": 4, "zero_stage": 3, "platform": "cpu", "cpu_devices": 8},
    "model": {
        "kind": "bloom",
        "vocab_size": 264,
        "num_layers": 2,
        "model_dim": 16,
        "num_heads": 8,
        "dropout": 0.1,
        "segments": [2],
    },
    "data": {
        "tokenizer": {"kind": "byte"},
        "sequence_length": 16,
        "validation_fraction": 0.2,
    },
    "optimizer": {"kind": "adamw", "learning_rate": 3e-3, "schedule": {"kind": "cosine", "warmup": 3}},
    "train": {"steps": STEPS, "batch_size": 16, "ema_decay": 0.9},
    "evaluate": {"every": 5, "rows": 32},
    "checkpoint": {"every": 3, "keep_every": HALF},
    "sample": {"prompt": "the", "max_new_tokens": 8},
}


def write_texts(folder: Path, *, seed: int = 0) -> Path:
    """A folder of small documents."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, words = random.Random(seed), ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "small", "dog"]
    for number in range(60):
        text = " ".join(chance.choice(words) for _ in range(chance.randint(3, 60)))
        (folder / f"{number:02}.txt").write_text(text + "\n")
    return folder


def write_config(path: Path, texts: Path, **changes: Any) -> Path:
    """The config with changes, given as `train={"steps": 3}`; a section with another `kind` is replaced."""
    config = json.loads(json.dumps(CONFIG))
    config["data"]["sources"] = [{"kind": "text", "path": str(texts)}]
    for name, change in changes.items():
        old = config.get(name)
        merge = isinstance(change, dict) and isinstance(old, dict) and change.get("kind") in (None, old.get("kind"))
        config[name] = {**old, **change} if merge else change
    path.write_text(yaml.safe_dump(config))
    return path


def once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `root/name`, made by the first of pytest's processes that asks for it."""
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            (root / f"{name}.made").touch()
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl, which another process may be writing."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def curve(run: Path) -> list[dict[str, Any]]:
    """What must come out equal whatever happened on the way: all figures of each step but those of the clock."""
    clock = ("step_seconds", "data_seconds", "tokens_per_second", "compiled", "mfu", "stall_seconds")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows(run)]


def outcome(run: Path) -> dict[str, Any]:
    """The values of summary.json that must come out equal."""
    clock = (
        "step_seconds",
        "tokens_per_second",
        "waiting_for_data",
        "training_seconds",
        "peak_host_bytes",
        "mfu",
        "stall_seconds",
    )
    summary = json.loads((run / "summary.json").read_text())
    del summary["name"]
    return {name: figure["value"] for name, figure in summary.items() if name not in clock}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def interrupted(reference: Path, run: Path, *, step: int = HALF) -> Path:
    """A copy of a finished run as it would be had it been killed some time after `step` and before the next save."""
    shutil.copytree(reference, run)
    for name in ("summary.json", "loss.png"):
        (run / name).unlink()
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return run


def close_to(got: Path, wanted: Path, *, tolerance: float = 1e-5) -> None:
    """Every loss and validation loss of two runs, relative; what is counted must be equal."""
    assert [row["step"] for row in rows(got)] == [row["step"] for row in rows(wanted)]
    for one, other in zip(curve(got), curve(wanted), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name in ("loss", "validation_loss"):
                assert abs(one[name] - other[name]) <= tolerance * abs(other[name]), (name, one, other)
            elif name != "grad_norm":
                assert one[name] == other[name], (name, one, other)


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints, in order."""
    return [int(path.name.removeprefix("step_")) for path in sorted((run / "checkpoints").glob("step_*"))]


def rubbish(run: Path) -> list[str]:
    """What kills and failures have left in a run folder."""
    made = {"checkpoints", "config.yaml", "data.json", "loss.png", "summary.json", "tokenizer", "versions.json"}
    names = {path.name for path in run.iterdir() if not re.fullmatch(r"metrics\.jsonl(\.bak.*)?", path.name)}
    return sorted(names - made) + [path.name for path in (run / "checkpoints").iterdir() if path.name[:5] != "step_"]


def wait_until(condition: Callable[[], bool], *, every: float = 0.002) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(every)


@dataclasses.dataclass
class Life:
    """One process of a run, from its start to its end."""

    pid: int
    log: Path
    wait: Callable[[], int]
    """Waits for its end; the exit code, negative for a signal."""

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition: Callable[[], bool], *, every: float = 0.002) -> None:
        """Waits for the condition, or for the end of the life, whichever comes first."""
        wait_until(lambda: condition() or self.over(), every=every)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def over(self) -> bool:
        """Whether it has ended, its exit code not asked for yet."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return "State:\tZ" in Path(f"/proc/{self.pid}/status").read_text()
        return True


class Zygote:
    """See zygote.py; one life at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._live = folder, 0, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=os.environ | ENVIRONMENT,
        )  # fmt: skip

    def train(self, *arguments: str | Path, **options: Any) -> Life:
        """Start `dsjax train`."""
        assert not self._live, "the life before was not waited for"
        self._number += 1
        log = self._folder / f"life-{self._number}.log"
        argv = ["train", *map(str, arguments), "--force"]  # the look at the memory takes a second of each life
        start = {"argv": argv, "cwd": str(self._folder), "log": str(log), **options}
        self._live = self._ask({"start": start})["pid"]
        return Life(self._live, log, self._wait)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._live:
                os.kill(self._live, signal.SIGKILL)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)

    def _wait(self) -> int:
        code = self._ask({"wait": self._live})["code"]
        self._live = 0
        return code

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        if not select.select([stdout], [], [], PATIENCE)[0]:
            os.kill(self._live, signal.SIGKILL)
            raise TimeoutError(f"no answer to {request}")
        return json.loads(stdout.readline())


def train(*arguments: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "dsjax", "train", *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, env=os.environ | ENVIRONMENT | environment,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


@contextlib.contextmanager
def started(command: list[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        list(map(str, command)), text=True, start_new_session=True, env=os.environ | ENVIRONMENT, **options
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=30)


@contextlib.contextmanager
def launch(folder: Path, processes: int, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """launch/local.py in `folder`, its output in `folder`/launch.log. Skips the test where there is no /proc."""
    if sys.platform != "linux":
        pytest.skip("looks at processes through /proc")
    command = [*LAUNCH, str(processes), *arguments]
    with (folder / "launch.log").open("w") as log, started(command, cwd=folder, stdout=log, stderr=log) as launcher:
        yield launcher


def said(folder: Path) -> str:
    """What the launcher and all processes wrote."""
    return "".join(path.read_text() for path in [folder / "launch.log", *sorted((folder / "logs").glob("*"))])
