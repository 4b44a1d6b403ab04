"""The process that renders chat templates: one for all of them, kept from one rendering to the next, and bounded.

Each rendering has 2 s of CPU time, 20 s of waiting and 512 MB of address space. One that breaks a bound ends the
process, and the next one starts another. A process that waits for a request ends when the other end of its input is
closed, which only this process holds: however this process ends, that one ends too.
"""

import atexit
import functools
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_OUTPUT_CHARACTERS = 4 * 1024 * 1024
CPU_SECONDS = 2
WALL_SECONDS = 20
MEMORY_BYTES = 512 * 1024 * 1024

_CHILD = Path(__file__).with_name("chat_child.py")


class ChildError(Exception):
    """The process broke a bound, or died."""


class ChatProcess:
    """Renders templates, one at a time, in a child process that is started when it is needed. Safe between threads.

    Example:
        >>> process = ChatProcess()
        >>> [process.render("{{ a }}", {"a": text}) for text in ("one", "two")]
        [{'text': 'one'}, {'text': 'two'}]
        >>> process.close()
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Render one template.

        Args:
            template: in Jinja.
            variables: values that JSON can hold, by their names in the template.

        Returns:
            {"text": str}, or {"error": kind, "message": text} where the template is at fault.

        Raises:
            ChildError: it took too long, or the process died otherwise; says which.
        """
        request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        with self.lock:
            is_used = self._child is not None
            answer = self._ask(request)
            if answer.get("error") == "memory" and is_used:
                # Memory that earlier renderings took may not all have come back; a new process has the whole.
                answer = self._ask(request)
            return answer

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        child = self._child = self._child or _started()
        try:
            line, expired = _exchange(child, request)
            answer = json.loads(line) if line.endswith(b"\n") and not expired else None
            if answer is None:
                raise ChildError(_cause_of_death(child, expired=expired))
        except BaseException:
            self.close()  # an answer that nobody has read must not become that of the next request
            raise
        if answer.get("error") in ("memory", "output"):
            self.close()
        return answer

    def close(self) -> None:
        """End the process, if there is one. The next rendering starts another."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        _close_pipes(child)

    def forget(self) -> None:
        """Leave the child to the process that this one was forked from, which held the lock meanwhile."""
        child, self._child = self._child, None
        if child is not None:
            child.returncode = 0  # it is no child of this process: nothing to wait for
            _close_pipes(child)
        self.lock.release()


def _started() -> subprocess.Popen[bytes]:
    """Start a process that waits for requests."""
    # -I and -S: nothing of the environment, no site-packages; what is imported is named. Nobody reads warnings.
    bounds = (CPU_SECONDS, MEMORY_BYTES, MAX_OUTPUT_CHARACTERS)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-W", "ignore", str(_CHILD), _folder_of_jinja(), *map(str, bounds)],
        bufsize=0,  # what a buffer holds while this process forks would be sent by both
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        start_new_session=True,  # Ctrl-C is for the parent, which ends it
    )
    assert child.stdin is not None
    os.set_blocking(child.stdin.fileno(), False)  # one that does not read must not keep its parent waiting
    return child


def _exchange(child: subprocess.Popen[bytes], request: bytes) -> tuple[bytes, bool]:
    """Send a request and read the line that comes back.

    Returns:
        The line, without its end if there is none, and whether the time was up before there was one.
    """
    assert child.stdin is not None and child.stdout is not None
    rest, line = memoryview(request), bytearray()
    deadline = time.monotonic() + WALL_SECONDS
    poll = select.poll()
    poll.register(child.stdin, select.POLLOUT)
    poll.register(child.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        ready = [descriptor for descriptor, _ in poll.poll(max(0.0, 1000 * left))]
        if left <= 0:
            return bytes(line), True
        if child.stdin.fileno() in ready:
            try:
                rest = rest[os.write(child.stdin.fileno(), rest) :]
            except BrokenPipeError:
                break  # it died
            if not rest:
                poll.unregister(child.stdin)
        if child.stdout.fileno() in ready:
            block = os.read(child.stdout.fileno(), 1 << 16)
            if not block:
                break
            line += block
    return bytes(line), False


def _cause_of_death(child: subprocess.Popen[bytes], *, expired: bool) -> str:
    """Reap a process and say why it ended."""
    if expired:
        return f"was stopped: it took more than {WALL_SECONDS} s"
    assert child.stderr is not None
    last = child.stderr.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    if child.wait() == -signal.SIGPROF:
        return f"was stopped: it took more than {CPU_SECONDS} s of CPU time; does it loop?"
    return f"could not be rendered: {last or f'code {child.returncode}'}"


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout, child.stderr):
        assert pipe is not None
        pipe.close()


@functools.cache
def _folder_of_jinja() -> str:
    """Find the folder that holds jinja2 (and markupsafe, which is installed with it)."""
    found = importlib.util.find_spec("jinja2")
    assert found is not None and found.origin is not None, "jinja2 is a dependency of dsjax"
    return str(Path(found.origin).parents[1])


PROCESS = ChatProcess()
"""The renderer of this process, which all templates share."""
atexit.register(PROCESS.close)
# No fork amid a rendering: it would hold the other end of that child's input.
os.register_at_fork(before=PROCESS.lock.acquire, after_in_parent=PROCESS.lock.release, after_in_child=PROCESS.forget)
