"""Train with several processes on this machine, and start them again when one dies.

    python launch/local.py --processes 2 -- configs/run/quickstart.yaml --run-dir runs/two

starts N times `python -m dsjax train ...` with DSJAX_COORDINATOR, DSJAX_NUM_PROCESSES and DSJAX_PROCESS_ID in the
environment. The rules:

* process 0 writes to this terminal, the others to files under --log-dir; nothing goes through a pipe, so nothing can
  fill one up and block;
* a process that ends with an error ends the others, and all start again on a new port with --resume-if-any
  (a crash before the first checkpoint has nothing to resume), at most --max-restarts times;
* exit code 2, a mistake in the configuration, is final: the next start would make it too;
* exit code 75, stopped by a signal with a checkpoint saved, is passed on: whoever stopped the run decides what is next;
* SIGINT and SIGTERM are passed to every process once; a second one kills them all. The processes have process
  groups of their own, so Ctrl-C reaches them through here alone; on Linux the kernel kills them if this one is killed.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

EXIT_CONFIG = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: a checkpoint was saved, resuming goes on from it
SECONDS_TO_END = 5.0  # between SIGTERM and SIGKILL for the others when one has failed: they cannot save without it
SECONDS_BETWEEN_LOOKS = 0.05
LINES_SHOWN = 20
RESUME = {"--resume", "--resume-if-any"}
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Processes to start, restarts and time limits.

    Example:
        >>> Plan(command=("dsjax", "train", "run.yaml"), processes=2, log_dir=Path("logs")).max_restarts
        3
    """

    command: tuple[str, ...]
    """The program of every process, with its arguments."""
    processes: int
    """Number of processes to start."""
    log_dir: Path
    """Where processes 1, 2, ... write."""
    max_restarts: int = 3
    """Starts after the first."""
    grace: float = 60.0
    """Seconds that a stopped process has to save and exit before it is killed."""
    environments: tuple[dict[str, str], ...] = ()
    """Environment variables added for each process; () adds none."""


def launch(plan: Plan) -> int:
    """Start the processes, watch them, start them again; returns the exit code for the shell.

    The code is 0 when all succeeded, 75 when they were stopped and had saved, else that of the process that failed
    first (128 + the signal's number if a signal ended it).
    """
    plan.log_dir.mkdir(parents=True, exist_ok=True)
    if plan.processes > 1:
        others = "process 1 writes" if plan.processes == 2 else f"processes 1 to {plan.processes - 1} write"
        _say(f"{others} to {plan.log_dir}")
    code = 1
    with _collected_signals() as received:
        for start in range(plan.max_restarts + 1):
            code = _run_once(plan, start, received)
            if code in (0, EXIT_STOPPED, EXIT_CONFIG) or received:
                return code
            if start < plan.max_restarts:
                _say(f"restart {start + 1} of {plan.max_restarts}, from the last checkpoint if there is one")
    _say(f"gave up after {plan.max_restarts} restarts")
    return code


def _run_once(plan: Plan, start: int, received: list[int]) -> int:
    """One start of the whole group: from the first process started to the end of the last."""
    group: list[_Process] = []
    try:
        for environment in _environments(plan):
            group.append(_Process(plan, start, environment))
        return _watch(group, plan, received)
    finally:  # also when a process could not be started
        _end(group)


def _watch(group: "list[_Process]", plan: Plan, received: list[int]) -> int:
    """Wait until all have ended well, one has failed or the grace period of stopped ones is over."""
    forwarded, deadline = False, float("inf")
    while True:
        codes = [process.poll() for process in group]
        failed = [i for i, code in enumerate(codes) if code not in (None, 0, EXIT_STOPPED)]
        if failed:
            # A mistake in the configuration is the reason to name, whatever ended the others meanwhile.
            first = next((i for i in failed if codes[i] == EXIT_CONFIG), failed[0])
            group[first].report()
            return _shell_code(codes[first])
        if None not in codes:
            return EXIT_STOPPED if EXIT_STOPPED in codes else 0
        if len(received) > 1:
            _say("second signal: killing all")
            for process in group:
                process.kill()
            return 128 + received[-1]
        if received and not forwarded:
            forwarded = True
            _say(f"{signal.Signals(received[0]).name}: asking all to save and stop; once more kills them")
            for process in group:
                process.send(received[0])
        if (forwarded or EXIT_STOPPED in codes) and deadline == float("inf"):
            deadline = time.monotonic() + plan.grace
        if time.monotonic() > deadline:
            _say(f"not all ended within --grace {plan.grace:g} s; killing the rest")
            for process in group:
                process.kill()
            return 128 + signal.SIGKILL
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _end(group: "list[_Process]") -> None:
    """No process of the group, nor any that one of them started, is left after this."""
    for process in group:
        process.send(signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline and any(process.poll() is None for process in group):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for process in group:
        process.kill()


class _Process:
    """One process of the group and the file it writes to."""

    def __init__(self, plan: Plan, start: int, environment: dict[str, str]) -> None:
        self.index = int(environment["DSJAX_PROCESS_ID"])
        self.log = plan.log_dir / f"start-{start}-process-{self.index}.log" if self.index else None
        resume = start > 0 and not RESUME & set(plan.command)
        with contextlib.ExitStack() as files:
            out = files.enter_context(self.log.open("wb")) if self.log else None
            self._popen = subprocess.Popen(
                [*plan.command, "--resume-if-any"] if resume else plan.command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if out else None,
                process_group=0,
                preexec_fn=_die_with_parent(),
            )

    def poll(self) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        return self._popen.poll()

    def send(self, signum: int) -> None:
        """Signal the process itself: what it started is its own to stop in order."""
        if self.poll() is None:
            self._popen.send_signal(signum)

    def kill(self) -> None:
        """SIGKILL to the process and everything it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone; macOS: all gone but not yet reaped
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def report(self) -> None:
        """Report how it ended and the end of its output."""
        code = self.poll()
        assert code is not None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        _say(f"process {self.index} (pid {self._popen.pid}) {how}; ending the others")
        if self.log:
            lines = self.log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
            _say(f"the end of {self.log}:" if lines else f"{self.log} is empty")
            print(*(f"    {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """A list that grows by the signals that arrive, in place of ending the process."""
    received: list[int] = []
    before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _die_with_parent() -> Callable[[], None] | None:
    """Ask the kernel to kill the calling child when this process dies (Linux)."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # loaded here: nothing is imported between fork and exec

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return before_exec


def _environments(plan: Plan) -> list[dict[str, str]]:
    """Environment variables of `dsjax train`; every start gets its own port, the old one may still be closing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"DSJAX_COORDINATOR": f"127.0.0.1:{port}", "DSJAX_NUM_PROCESSES": str(plan.processes)}
    extra = plan.environments or ({},) * plan.processes
    return [shared | {"DSJAX_PROCESS_ID": str(i)} | extra[i] for i in range(plan.processes)]


def _shell_code(code: int | None) -> int:
    assert code is not None
    return code if code >= 0 else 128 - code


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


def visible_gpus() -> list[str]:
    """The GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES names them; [] without a GPU."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name for name in listed.split(",") if name.strip() not in ("", "-1")]
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        lines = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout.splitlines()
        return [str(i) for i in range(sum(line.startswith("GPU ") for line in lines))]
    return []


def share_devices(processes: int, per_process: int | None, *, gpus: Sequence[str]) -> tuple[list[dict], list[str]]:
    """Which devices each process takes: (one environment a process, arguments for `dsjax train`).

    GPUs are dealt out in order, because every process would otherwise open all of them. Without GPUs a number given
    becomes the run's virtual CPU devices; with None the config's `mesh.cpu_devices` are divided by `dsjax train`.

    Raises:
        ValueError: more GPUs are asked for than there are, or they cannot be shared equally.

    Example:
        >>> share_devices(2, None, gpus=["0", "1", "2", "3"])
        ([{'CUDA_VISIBLE_DEVICES': '0,1'}, {'CUDA_VISIBLE_DEVICES': '2,3'}], [])
        >>> share_devices(2, 4, gpus=[])
        ([{}, {}], ['--set', 'mesh.cpu_devices=8'])
    """
    if not gpus:
        arguments = [] if per_process is None else ["--set", f"mesh.cpu_devices={processes * per_process}"]
        return [{} for _ in range(processes)], arguments
    if per_process is None and len(gpus) % processes:
        raise ValueError(
            f"{len(gpus)} GPUs cannot be shared equally by {processes} processes; choose --processes to divide them, "
            "give --devices-per-process, or hide some with CUDA_VISIBLE_DEVICES"
        )
    count = per_process or len(gpus) // processes
    if count * processes > len(gpus):
        raise ValueError(f"{processes} processes with {count} GPUs each need {processes * count}; got {len(gpus)}")
    shares = [gpus[i * count : (i + 1) * count] for i in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares], []


def with_run_dir(train: Sequence[str], *, root: Path = Path("runs")) -> list[str]:
    """The arguments of `dsjax train` with a run folder named, the first free one, if they name none.

    A restart has to find the folder of the first start. Left to itself it takes the newest, which would be that of an
    earlier run if the first start died before it made one.

    Example:
        >>> with_run_dir(["configs/run/mine.yaml"], root=Path("nowhere"))
        ['configs/run/mine.yaml', '--run-dir', 'nowhere/mine']
    """
    if RESUME & set(train) or any(argument.split("=")[0] == "--run-dir" for argument in train):
        return list(train)
    name, number = Path(train[0]).stem, 1
    while (folder := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return [*train, "--run-dir", str(folder)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train with several processes on this machine; start them again when one dies.",
        usage="%(prog)s --processes N [options] -- CONFIG [arguments of dsjax train]",
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many to start")
    parser.add_argument(
        "--devices-per-process", default="auto", metavar="D",
        help="GPUs of each process, or where there are none virtual CPU devices; auto (default): an equal share",
    )  # fmt: skip
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="default 3")
    parser.add_argument(
        "--grace", type=float, default=60.0, metavar="S", help="seconds to save in after a signal (default 60)"
    )
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="files of processes 1, 2, ... (default: a new one)")
    return parser


def main(
    argv: Sequence[str] | None = None, *, program: Sequence[str] = (sys.executable, "-m", "dsjax", "train")
) -> int:
    """The command line; `program` is what every process runs, with all that stands after `--`."""
    parser = _parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:cut])
    train = argv[cut + 1 :]
    if not train or train[0].startswith("-"):
        parser.error("what to train is missing: end with -- CONFIG [arguments of dsjax train]")
    if options.processes < 1 or options.max_restarts < 0 or options.grace < 0:
        parser.error("--processes must be at least 1, --max-restarts and --grace 0 or more")
    auto = options.devices_per_process == "auto"
    if not auto and not (options.devices_per_process.isdigit() and int(options.devices_per_process)):
        parser.error(f"--devices-per-process must be auto or a number above 0; got {options.devices_per_process!r}")
    if "dsjax" in program and not importlib.util.find_spec("dsjax") and not Path("dsjax").is_dir():
        parser.error(
            f"{sys.executable} has no dsjax; use the Python it is installed in: .venv/bin/python {sys.argv[0]}"
        )
    try:
        environments, added = share_devices(
            options.processes, None if auto else int(options.devices_per_process), gpus=visible_gpus()
        )
    except ValueError as error:
        parser.error(str(error))
    return launch(
        Plan(
            command=(*program, *with_run_dir(train), *added),
            processes=options.processes,
            log_dir=options.log_dir or Path(tempfile.mkdtemp(prefix="dsjax-launch-")),
            max_restarts=options.max_restarts,
            grace=options.grace,
            environments=tuple(environments),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
