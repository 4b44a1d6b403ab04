"""Two programs side by side in processes of their own, possibly of different Pythons, told by a driver what to do.

A worker gets one JSON object a line on its stdin, {"cmd": name, ...arguments}, and answers with one a line on stdout.
Standard library only (but `machine`): the workers' Pythons have nothing else in common.
"""

import contextlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

PAGES = {"2 MiB": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "4 KiB": {"GLIBC_TUNABLES": ""}}
"""By the size of its pages the environment in which a worker takes memory so (dsjax/observe/host.py); dsjax's first."""
MOST_OTHER_CORES = 0.1  # what a system does on its own; above that the figures would be about other programs too


def serve(load: Callable[..., Mapping[str, Callable[..., dict[str, Any]]]]) -> None:
    """A worker's main loop.

    The first command is "load"; its arguments go to `load`, which returns the other commands. Every answer gets
    "seconds", "cpu_seconds", "kernel_seconds" (a part of these) and "page_faults" of the call. What libraries print
    goes to stderr, so that stdout carries answers only.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands: Mapping[str, Callable[..., dict[str, Any]]] = {}
    for line in sys.stdin:
        message = json.loads(line)
        command = message.pop("cmd")
        if command == "quit":
            return
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if command == "load":
            commands = load(**message)
            answer = {}
        else:
            answer = commands[command](**message)
        after = resource.getrusage(resource.RUSAGE_SELF)
        kernel = after.ru_stime - before.ru_stime
        clocks = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": after.ru_utime - before.ru_utime + kernel,
            "kernel_seconds": kernel,
            "page_faults": after.ru_minflt - before.ru_minflt,
        }
        print(json.dumps({**answer, **clocks}), file=answers)


def serve_and_leave(load: Callable[..., Mapping[str, Callable[..., dict[str, Any]]]]) -> NoReturn:
    """`serve` for a process that others depend on: JAX's own way out waits for them, who may be gone or wait for it."""

    def leave(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = leave
    serve(load)
    os._exit(0)


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
                env=os.environ | {"PYTHONPATH": _with_this_folder()} | (environment or {}),
            )

    def ask(self, command: str, **message: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; WorkerDied with the end of its log if it did."""
        return ask_all([self], command, **message)[0]

    def send(self, command: str, **message: Any) -> None:
        """Send a command; the answer is to be fetched by `answer`."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # `answer` says that it died
            self._process.stdin.write(json.dumps({"cmd": command, **message}) + "\n")
            self._process.stdin.flush()

    def answer(self, command: str) -> dict[str, Any]:
        """Wait for the answer to the command that was sent; WorkerDied with the end of its log if it did."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = self.log.read_text(errors="replace")
            tail = "\n".join(said.splitlines()[-20:])
            raise WorkerDied(
                f"the {self.name} worker ended with exit code {code} during {command!r}:\n{tail}",
                out_of_memory="OutOfMemoryError" in said or "RESOURCE_EXHAUSTED" in said,
            )
        return json.loads(line)

    def fileno(self) -> int:
        """Of its answers, for `select`: a line is one answer, so none waits in a buffer."""
        assert self._process.stdout
        return self._process.stdout.fileno()

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


def ask_all(workers: Sequence[Worker], command: str, *, within: float | None = None, **message: Any) -> list[dict]:
    """Send a command to workers that need each other, and wait for all answers.

    Whichever worker dies first is reported, whoever still waits for it; after `within` seconds a TimeoutError is.
    """
    for each in workers:
        each.send(command, **message)
    deadline = float("inf") if within is None else time.monotonic() + within
    waiting, answers = dict(enumerate(workers)), {}
    while waiting:
        left = None if within is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select(list(waiting.values()), [], [], left)
        if not ready:
            names = ", ".join(each.name for each in waiting.values())
            raise TimeoutError(f"no answer from {names} to {command!r} within {within:.0f} s")
        for number in [number for number, each in waiting.items() if each in ready]:
            answers[number] = waiting.pop(number).answer(command)
    return [answers[number] for number in range(len(workers))]


def stop_on_sigterm() -> None:
    """Let SIGTERM end the driver as Ctrl-C does, so that it ends its workers: a paused one would stay for ever."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def worker(name: str, command: list[str], **options: Any) -> Iterator[Worker]:
    """A worker that is ended whatever happens."""
    process = Worker(name, command, **options)
    try:
        yield process
    finally:
        process.close()


def _with_this_folder() -> str:
    """PYTHONPATH by which a worker finds this file."""
    return os.pathsep.join(part for part in (str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")) if part)


def busy_seconds() -> float:
    """Time that the cores this process may use have been at work since the machine started; 0 where unknown."""
    if sys.platform != "linux":
        return 0.0
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    # user, nice, system, (idle, iowait,) irq, softirq, steal
    ticks = sum(int(line[i]) for line in lines if line[0] in mine for i in (1, 2, 3, 6, 7, 8))
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(worker: Worker, command: str, **message: Any) -> dict[str, Any]:
    """An answer of a worker that is let go on for it, with "other_cores": how many cores others kept busy meanwhile."""
    worker.resume()
    before = busy_seconds()
    answer = worker.ask(command, **message)
    answer["other_cores"] = max(0.0, busy_seconds() - before - answer["cpu_seconds"]) / answer["seconds"]
    worker.pause()
    return answer


def python_with(packages: Sequence[str], folder: Path) -> Path:
    """A Python with these packages in an environment of its own, made on the first call."""
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists() and done.read_text() == "\n".join(packages):
        return python
    names = ("python3.11", "python3.12", "python3.13", "python3.10", "python3")
    found = [Path(place) / name for name in names for place in os.get_exec_path() if shutil.which(name, path=place)]
    question = "import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))"
    for candidate in found:  # a name on the PATH may be a version manager's stand-in that does not run
        if subprocess.run([candidate, "-c", question], capture_output=True, check=False).returncode == 0:
            print(f"installing {', '.join(packages)} into {folder} with {candidate} (once)", flush=True)
            subprocess.run([candidate, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
            done.write_text("\n".join(packages))
            return python
    raise SystemExit("no Python from 3.10 to 3.13 with venv to install PyTorch into; or name one: --torch-python PATH")


def machine() -> dict[str, Any]:
    """The machine of the measurements; for drivers, whose Python has dsjax."""
    from dsjax.observe.host import memory_pages, processor

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    found = processor()
    name = f"{found['name']} (family {found['family']}, model {found['model']})" if found else platform.machine()
    about = {"cpu": name, "processor": found, "memory_pages": memory_pages(), "cores": os.cpu_count()}
    return {**about, "system": platform.platform(), "commit": commit}


def write_between_marks(
    readme: Path, lines: Sequence[str], *, marks: tuple[str, str] = ("<!-- results -->", "<!-- end of results -->")
) -> None:
    """Replace what stands between the two marks of a README."""
    begin, end = marks
    before, _, rest = readme.read_text().partition(begin)
    readme.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{rest.partition(end)[2]}")


def plot_pairs(
    panels: Sequence[tuple[str, Sequence[Mapping[str, float]]]], labels: Mapping[str, str], path: Path
) -> None:
    """Tokens per second of every pair: one panel (title, pairs) beside the other, a line for each side in `labels`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), squeeze=False)
    for ax, (title, pairs) in zip(axes[0], panels, strict=True):
        for side, label in labels.items():
            ax.plot([pair[side] for pair in pairs], marker="o", label=label)
        ax.set_title(title)
        ax.set_xlabel("pair")
        ax.set_ylabel("tokens/s")
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
