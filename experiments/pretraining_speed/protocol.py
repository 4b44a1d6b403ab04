"""How a driver talks to a worker: one JSON object a line, down the worker's stdin and up its stdout.

    {"cmd": "load", ...}           make the model and the optimizer; the rest of the line is a Job
    {"cmd": "losses", "steps": 5}  train from the first weights on
    {"cmd": "steps", "steps": 10}  go on training; both -> {"losses": [...], "seconds": ..., "cpu_seconds": ...}
    {"cmd": "inspect"}             what the step is like on its device -> {"peak_bytes": ..., ...}
    {"cmd": "quit"}

A worker trains on its own and knows nothing of another one. Standard library only, for the workers run in different
Pythons.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train; the same for both workers."""

    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    batch: int
    length: int
    optimizer: dict[str, float]  # learning_rate, b1, b2, eps, weight_decay (of tensors with two dimensions)
    tokens: str  # .npy, int32 [batches, batch, length + 1]
    weights: str = ""  # a Hugging Face GPT-2 folder that holds weights.npz too; '' draws its own
    device: str = "cpu"  # cpu or cuda
    compute_dtype: str = "float32"  # or bfloat16; parameters and optimizer state are float32
    remat: str = "none"  # or full: keep only the input of every block
    compile: bool = False  # torch.compile


class Trainer(Protocol):
    """What a worker makes of a Job."""

    def about(self) -> dict[str, Any]:
        """Parameters, versions, choices made."""
        ...

    def reset(self) -> None:
        """Back to the first weights, optimizer state and batch."""
        ...

    def train(self, steps: int) -> list[float]:
        """Train and return all losses; nothing is left running on the device."""
        ...

    def inspect(self) -> dict[str, Any]:
        """Peak memory of the device in bytes (0: not known there), and what the worker has to add."""
        ...


def serve(make: Callable[[Job], Trainer]) -> None:
    """A worker's main loop. What libraries print goes to stderr, so that stdout carries answers only."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    trainer: Trainer | None = None
    for line in sys.stdin:
        message = json.loads(line)
        command = message.pop("cmd")
        if command == "quit":
            return
        if command == "load":
            trainer = make(Job(**message))
            answer = trainer.about()
        elif command == "inspect":
            assert trainer is not None, "load comes first"
            answer = trainer.inspect()
        else:
            assert trainer is not None, "load comes first"
            if command == "losses":
                trainer.reset()
            began, cpu = time.perf_counter(), time.process_time()
            losses = trainer.train(message["steps"])
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            answer = {"losses": losses, "seconds": seconds, "cpu_seconds": cpu}
        print(json.dumps(answer), file=answers)


class WorkerDied(RuntimeError):
    """A worker ended in the middle; out_of_memory says whether its device was full."""

    def __init__(self, message: str, *, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Worker:
    """A worker process as the driver sees it."""

    def __init__(self, name: str, command: list[str], *, log: Path, environment: dict[str, str] | None = None) -> None:
        self.name, self.log = name, log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | (environment or {}),
            )

    def ask(self, command: str, **message: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; WorkerDied with the end of its log if it did."""
        assert self._process.stdin and self._process.stdout
        line = ""
        try:
            self._process.stdin.write(json.dumps({"cmd": command, **message}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = self._process.wait()
            said = self.log.read_text(errors="replace")
            tail = "\n".join(said.splitlines()[-20:])
            raise WorkerDied(
                f"the {self.name} worker ended with exit code {code} during {command!r}:\n{tail}",
                out_of_memory="OutOfMemoryError" in said or "RESOURCE_EXHAUSTED" in said,
            )
        return json.loads(line)

    def pause(self) -> None:
        """Stop it where it is: threads that spin while they wait for work take time from others."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused worker go on."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, politely if it listens."""
        assert self._process.stdin
        self.resume()
        try:
            self._process.stdin.write('{"cmd": "quit"}\n')
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def stop_on_sigterm() -> None:
    """Let SIGTERM end the driver as Ctrl-C does, so that it ends its workers: a paused one would stay for ever."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def worker(name: str, command: list[str], **options: Any) -> Iterator[Worker]:
    """A worker that is ended whatever happens."""
    process = Worker(name, command, **options)
    try:
        yield process
    finally:
        process.close()
