"""Starts `dsjax` many times cheaply: a process that has imported JAX but not started it, and forks a run per request.

Requests and answers are lines of JSON on stdin and stdout:
    {"start": {"argv": [...], "cwd": DIR, "log": FILE, ...}} -> {"pid": N}        {"wait": N} -> {"code": N}

What a start may ask for besides: `die`: [PART, N], SIGKILL itself before its N-th change of a file with PART in its
path (counted: opening to write, renaming, removing, making a folder); `file_size`: RLIMIT_FSIZE in bytes; `count`: a
file to which the numbers of compilation cache hits and misses are written at the end; `environment`: more variables;
`encoding`: of its standard output, which fails at what that has no character for.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys

import jax

import dsjax.cli.train
import dsjax.train.loop  # noqa: F401  what takes long to import
from dsjax.cli.main import main

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def serve() -> list[str]:
    """Forks until stdin ends; returns in the children only, with their arguments."""
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                return prepare(**request["start"])
            answer = {"pid": pid}
        else:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        print(json.dumps(answer), flush=True)
    os._exit(0)


def prepare(argv, cwd, log, die=None, file_size=None, count=None, environment=None, encoding=None) -> list[str]:
    """Makes the child look like a process of its own."""
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment or {})
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if file_size:  # not of the log
        file = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin.fileno()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if encoding:
        sys.stdout.reconfigure(encoding=encoding, errors="strict")
    if count:
        count_compilations(count)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if die:
        die_at(*die)
    return argv


def die_at(part: str, number: int) -> None:
    left = number

    def on_event(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == "open":
            path, mode, flags = arguments
            changes = bool(flags & WRITING) if isinstance(flags, int) else not set(mode or "r").isdisjoint("wax+")
        else:
            path, changes = arguments[0] if arguments else None, event in CHANGES
        if changes and isinstance(path, str | bytes | os.PathLike) and part in os.fsdecode(path):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def count_compilations(path: str) -> None:
    numbers = {"cache_hits": 0, "cache_misses": 0}

    def on_event(event: str, **_) -> None:
        name = event.removeprefix("/jax/compilation_cache/")
        if name in numbers:
            numbers[name] += 1

    def write() -> None:
        with open(path, "w") as file:
            json.dump(numbers, file)

    jax.monitoring.register_event_listener(on_event)
    atexit.register(write)


if __name__ == "__main__":
    sys.exit(main(serve()))
