"""The process that renders chat templates: kept, bounded, reaped, and gone when its parent is."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsjax.data.tokenizers import chat_process
from dsjax.data.tokenizers.chat_process import ChatProcess, ChildError

FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ONE, TWO = {"text": "1"}, {"text": "2"}


@pytest.fixture
def started(monkeypatch):
    """Every child that is started."""
    children, start = [], chat_process._started

    def recorded():
        children.append(start())
        return children[-1]

    monkeypatch.setattr(chat_process, "_started", recorded)
    return children


@pytest.fixture
def process(started):
    process = ChatProcess()
    yield process
    process.close()
    assert all(child.returncode is not None for child in started), "a child was not waited for"


def test_one_child_renders_different_templates(process, started):
    texts = [process.render("{{ a }}" + "{{ b }}" * n, {"a": n, "b": "é"})["text"] for n in range(5)]
    assert texts == [f"{n}" + "é" * n for n in range(5)] and len(started) == 1


@pytest.mark.parametrize(
    ("template", "num_children"),
    [
        ("{{ 'a' * 10 ** 10 }}", 2),  # tried again where nothing else has taken memory
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", 1),
    ],
)
def test_a_template_that_breaks_a_bound_ends_its_child_alone(process, started, template, num_children):
    assert process.render("{{ 1 }}", {}) == ONE
    assert process.render(template, {})["error"] in ("memory", "output")
    assert len(started) == num_children and all(child.returncode is not None for child in started)
    assert process.render("{{ 2 }}", {}) == TWO and len(started) == num_children + 1


def test_a_template_at_fault_keeps_the_child(process, started):
    assert [process.render(text, {})["error"] for text in ("{% if", "{{ ''.__class__ }}", "{{ 1 / 0 }}")] == [
        "syntax",
        "security",
        "failed",
    ]
    assert process.render("{{ 1 }}", {}) == ONE and len(started) == 1


def test_time_is_that_of_one_rendering(process, started, monkeypatch):
    """Renderings that take more than the bound together, but none by itself, are not stopped."""
    monkeypatch.setattr(chat_process, "CPU_SECONDS", 0.5)
    ticks = os.sysconf("SC_CLK_TCK")
    used = 0.0
    while used < 0.8:
        assert process.render("{% for i in range(40000) %}{% endfor %}", {}) == {"text": ""}
        fields = Path(f"/proc/{started[0].pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / ticks
    with pytest.raises(ChildError, match=r"more than 0.5 s of CPU time"):
        process.render(FOREVER, {})
    assert len(started) == 1 and process.render("{{ 1 }}", {}) == ONE


def test_a_child_that_does_not_answer(process, monkeypatch):
    assert process.render("{{ 1 }}", {}) == ONE
    with monkeypatch.context() as patch:
        patch.setattr(chat_process, "WALL_SECONDS", 0.05)
        with pytest.raises(ChildError, match=r"took more than 0.05 s"):
            process.render(FOREVER, {})
    assert process.render("{{ 2 }}", {}) == TWO


def test_a_child_that_somebody_killed(process, started):
    assert process.render("{{ 1 }}", {}) == ONE
    started[0].kill()
    assert started[0].wait() == -signal.SIGKILL
    assert process.render("{{ 2 }}", {}) == TWO


def test_nothing_is_left_for_the_next_template(process, started):
    process.render("{% set a = 1 %}{% set n = namespace(a=1) %}{% macro f() %}{{ a }}{% endmacro %}{{ f() }}", {"b": 1})
    found = process.render("{{ a is defined }} {{ b is defined }} {{ f is defined }} {{ n is defined }}", {})
    assert found == {"text": "False False False False"} and len(started) == 1


def test_threads_share_the_child(process, started):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: process.render(f"{n} {{{{ a }}}}", {"a": "x" * 70_000})["text"], range(24)))
    assert found == [f"{n} " + "x" * 70_000 for n in range(24)] and len(started) == 1


PARENT = """
import os, signal, sys, time
from dsjax.data.tokenizers.chat_process import PROCESS
assert PROCESS.render("{{ a }}", {"a": 1}) == {"text": "1"}
print(PROCESS._child.pid, flush=True)
"""
FORKS = """
forked = os.fork()
if not forked:
    assert PROCESS.render("{{ 'in the fork' }}", {}) == {"text": "in the fork"}
    print(PROCESS._child.pid, flush=True)
    os._exit(0)
assert PROCESS.render("{{ a }}", {"a": 2}) == {"text": "2"}
assert os.waitpid(forked, 0)[1] == 0
assert PROCESS.render("{{ a }}", {"a": 3}) == {"text": "3"}
print(PROCESS._child.pid, flush=True)
"""


def is_gone(pid):
    """Whether a process ends within some seconds; one that only waits to be reaped by init has ended."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["", "raise ValueError", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_child_ends_with_its_parent(end):
    done = subprocess.run([sys.executable, "-c", PARENT + end], capture_output=True, text=True, timeout=60, check=False)
    assert bool(done.returncode) == bool(end) and is_gone(int(done.stdout)), done.stderr
    assert end.startswith("raise") or not done.stderr


def test_a_fork_has_a_child_of_its_own():
    done = subprocess.run([sys.executable, "-c", PARENT + FORKS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    before, forked, after = map(int, done.stdout.split())
    assert before == after != forked and is_gone(forked) and is_gone(after)
