"""A network of limited speed inside one machine: a network namespace for each process, joined by virtual cables.

    with Network(2) as network:
        network.shape(100e6)
        subprocess.run(network.inside(0, ["python", "worker.py"]))

Two namespaces are the two ends of one veth pair; more are joined by a bridge in a namespace of its own. `tc tbf` limits
what each namespace sends. Everything lies in the namespaces and carries the driver's process id in its name: nothing of
the machine's own network is touched, and two drivers do not meet. Needs root and iproute2.
"""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

DEVICE = "eth0"
SWITCH = "switch"
PREFIX = "dsjax"
LATENCY = "50ms"  # how long a packet may wait in tbf's queue before it is dropped
# What may leave at once after a pause. A large one would carry a whole one-bit message for free; too small a one does
# not keep up with the kernel's timer.
SMALLEST_BURST, BURST_SECONDS = 32_768, 1e-3


@dataclasses.dataclass(frozen=True)
class Counters:
    """Bytes that an interface has sent and received since it exists, with the headers of every packet."""

    sent: int
    received: int

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(self.sent - other.sent, self.received - other.received)


def parse_counters(text: str, device: str) -> Counters:
    """The line of a device in /proc/net/dev.

    Example:
        >>> parse_counters(" eth0:    90  1 0 0 0 0 0 0   1200   2 0 0 0 0 0 0", "eth0")
        Counters(sent=1200, received=90)
    """
    found = re.search(rf"^\s*{re.escape(device)}:(.*)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no interface {device} in {text!r}")
    fields = [int(field) for field in found[1].split()]
    return Counters(sent=fields[8], received=fields[0])


def own_counters() -> Counters:
    """Of the namespace that this process runs in."""
    return parse_counters(Path("/proc/self/net/dev").read_text(), DEVICE)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Names, addresses and commands of a network of `size` namespaces."""

    name: str
    size: int

    @property
    def namespaces(self) -> list[str]:
        """One a process; behind them that of the bridge, if there is one."""
        return [f"{self.name}-{rank}" for rank in range(self.size)] + [f"{self.name}-{SWITCH}"] * (self.size > 2)

    def address(self, rank: int) -> str:
        """IPv4 address of a process; the namespaces see no other network, so it cannot clash."""
        return f"10.77.0.{rank + 1}"

    def commands(self) -> list[list[str]]:
        """Commands for `ip`.

        Example:
            >>> [" ".join(words) for words in Plan("n", 2).commands()][2]
            'link add eth0 netns n-0 type veth peer name eth0 netns n-1'
        """
        ends, switch = self.namespaces[: self.size], f"{self.name}-{SWITCH}"
        words = [f"netns add {namespace}" for namespace in self.namespaces]
        if self.size == 2:
            words.append(f"link add {DEVICE} netns {ends[0]} type veth peer name {DEVICE} netns {ends[1]}")
        else:
            words += [f"-n {switch} link add {SWITCH} type bridge", f"-n {switch} link set {SWITCH} up"]
            for rank, end in enumerate(ends):
                words.append(f"link add {DEVICE} netns {end} type veth peer name port{rank} netns {switch}")
                words.append(f"-n {switch} link set port{rank} master {SWITCH} up")
        for rank, end in enumerate(ends):
            words.append(f"-n {end} addr add {self.address(rank)}/24 dev {DEVICE}")
            words += [f"-n {end} link set {DEVICE} up", f"-n {end} link set lo up"]
        return [line.split() for line in words]

    def hosts(self, rank: int, host_name: str) -> str:
        """/etc/hosts of a namespace: gloo listens at the address that the machine's own name stands for."""
        return f"127.0.0.1 localhost\n{self.address(rank)} {host_name}\n"


class Network:
    """A context manager: the network exists inside it, and nothing of it is left behind."""

    def __init__(self, size: int) -> None:
        if size < 2:
            raise ValueError(f"a network of {size}: must have at least 2 processes")
        self.plan = Plan(f"{PREFIX}{os.getpid()}", size)

    def __enter__(self) -> "Network":
        check_rights()
        remove_left_behind()
        try:
            for rank in range(self.plan.size):
                folder = Path("/etc/netns") / self.plan.namespaces[rank]  # `ip netns exec` mounts its files over /etc
                folder.mkdir(parents=True)
                (folder / "hosts").write_text(self.plan.hosts(rank, socket.gethostname()))
            for words in self.plan.commands():
                run("ip", *words)
        except BaseException:
            remove(self.plan.namespaces)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        remove(self.plan.namespaces)

    def inside(self, rank: int, command: Sequence[str]) -> list[str]:
        """The command that runs `command` in a namespace, as the same process."""
        return ["ip", "netns", "exec", self.plan.namespaces[rank], *command]

    def shape(self, bits_per_second: float | None) -> None:
        """Limit what every process sends; None: as fast as memory."""
        for end in self.plan.namespaces[: self.plan.size]:
            shaped = "tbf" in run("tc", "-n", end, "qdisc", "show", "dev", DEVICE)
            if bits_per_second is not None:
                burst = max(SMALLEST_BURST, int(bits_per_second / 8 * BURST_SECONDS))
                limits = ["rate", f"{bits_per_second:.0f}bit", "burst", str(burst), "latency", LATENCY]
                run("tc", "-n", end, "qdisc", "replace", "dev", DEVICE, "root", "tbf", *limits)
            elif shaped:
                run("tc", "-n", end, "qdisc", "del", "dev", DEVICE, "root")


def run(*command: str) -> str:
    """A command's output; its complaint is the error's message."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def check_rights() -> None:
    """End with a message unless this process may make namespaces and has the programs for it."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not found: install iproute2 (apt-get install iproute2)")
    if os.geteuid() != 0:
        raise SystemExit("making network namespaces needs root: run it as root, with the Python of this environment")


def remove(namespaces: Sequence[str]) -> None:
    """Delete namespaces, with what is in them, and their hosts files; those that do not exist are passed over."""
    existing = listed()
    for namespace in namespaces:
        if namespace in existing:
            for pid in run("ip", "netns", "pids", namespace).split():
                end(int(pid))
            run("ip", "netns", "del", namespace)
        shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def end(pid: int) -> None:
    """Kill a process that was left in a namespace of ours: it would keep the namespace alive."""
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def listed() -> set[str]:
    """Names of all namespaces of this machine."""
    return {line.split()[0] for line in run("ip", "netns", "list").splitlines() if line.split()}


def remove_left_behind() -> None:
    """Delete what a driver left that was killed by SIGKILL."""
    ours = re.compile(rf"{PREFIX}(\d+)-(\d+|{SWITCH})")
    folders = {folder.name for folder in Path("/etc/netns").glob("*")}
    matches = [match for name in listed() | folders if (match := ours.fullmatch(name))]
    remove([match[0] for match in matches if not Path(f"/proc/{match[1]}").exists()])
