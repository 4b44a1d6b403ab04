"""Programs that are compiled before they are needed: which, in which order, and what is waited for."""

import threading

from dsjax.setup.compile_ahead import Ahead


class Slow:
    """A program whose compilation ends when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go = threading.Event()

    def lower(self, key: str) -> "Slow":
        self.asked.append(key)
        return self

    def compile(self) -> str:
        assert self.go.wait(20)
        return self.asked[-1].upper()


def test_the_next_program_is_compiled_while_this_one_trains():
    slow = Slow()
    with Ahead(lambda step: "ab"[step >= 5], slow.lower, num_steps=10) as ahead:
        assert not ahead.is_ready(0)
        slow.go.set()
        assert ahead.get(0)[0] == "A" and ahead.is_ready(4) and not ahead.is_ready(5)
        slow.go.clear()
        ahead.compile_soon(0, step_seconds=1e-3)
        while len(slow.asked) < 2:
            pass
        assert ahead.get(4) == ("A", 0.0)  # nobody waits for what is not needed yet
        slow.go.set()
        assert ahead.get(5)[0] == "B"
        assert ahead.get(9) == ("B", 0.0)
    assert slow.asked == ["a", "b"]


def test_one_after_another_in_the_order_of_use_and_none_too_early():
    slow = Slow()
    slow.go.set()
    order = "a" * 3 + "b" * 3 + "a" + "c" * 3 + "d" * 1000
    with Ahead(lambda step: order[step], slow.lower, num_steps=len(order)) as ahead:
        ahead.get(0)
        for step in range(8):
            ahead.compile_soon(step, step_seconds=10.0)  # a lead of 60 s: the next eight steps
            ahead.get(step)
    assert slow.asked in (["a", "b", "c"], ["a", "b", "c", "d"])  # d only if c was done when it was looked for
    slow.asked.clear()
    with Ahead(lambda step: order[step], slow.lower, num_steps=len(order)) as ahead:
        ahead.get(0)
        ahead.compile_soon(0, step_seconds=100.0)
        ahead.get(len(order) - 1)  # comes after whatever was begun before
    assert slow.asked == ["a", "d"]


def test_what_was_not_begun_is_left():
    slow = Slow()
    slow.go.set()
    with Ahead(lambda step: str(step), slow.lower, num_steps=3) as ahead:
        ahead.get(0)
    assert slow.asked == ["0"]
