"""The progress line: short enough, not too often in a log, live on a terminal."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dsjax.observe.progress import Progress, format_count, format_duration, format_line


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(total: int, seconds_per_step: float, *, start: int = 0, validate_at: tuple[int, ...] = ()) -> list[str]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    with Progress(total, start_step=start, console=console, clock=clock) as progress:
        for step in range(start + 1, total + 1):
            clock.now += seconds_per_step
            validation = {"validation_loss": 4.0} if step in validate_at else {}
            progress.update(step, loss=5.0, **validation)
    return out.getvalue().splitlines()


def steps(lines: list[str]) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in lines]


def test_a_log_gets_the_first_step_every_tenth_and_the_last() -> None:
    assert steps(run(1000, 0.01)) == [1, 101, 201, 301, 401, 501, 601, 701, 801, 901, 1000]
    assert steps(run(3, 0.01)) == [1, 2, 3]


def test_a_slow_run_says_something_every_30_seconds() -> None:
    assert steps(run(1000, 10.0))[:4] == [1, 4, 7, 10]


def test_validation_is_always_shown_and_then_kept() -> None:
    lines = run(1000, 0.01, validate_at=(150,))
    assert steps(lines)[:4] == [1, 101, 150, 250]
    assert "val 4.000" in lines[2] and "val 4.000" in lines[3] and "val" not in lines[1]


def test_eta_is_the_rate_after_the_first_step_and_counts_resumed_steps_as_done() -> None:
    lines = run(110, 2.0, start=10)
    assert steps(lines)[0] == 11
    assert "ETA" not in lines[0]
    # one step in 2 s; at step 21, 89 are left
    assert "step 21/110" in lines[1] and "ETA 2:58" in lines[1]
    assert "ETA" not in lines[-1]


metrics = st.dictionaries(
    st.sampled_from(["loss", "validation_loss", "learning_rate", "tokens_per_second", "mfu", "a_rather_long_name{0}"]),
    st.floats(allow_nan=True, allow_infinity=True),
)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), metrics, st.one_of(st.none(), st.floats(0, 1e9)))
def test_it_fits_100_columns_beside_the_bar(step: int, metrics, eta) -> None:
    line = format_line(step, 10**9, metrics, eta_seconds=eta)
    assert len(line) <= 90
    assert line.startswith(f"step {step}/1000000000")


def test_usual_figures_all_fit() -> None:
    metrics = {"learning_rate": 3e-4, "loss": 10.123, "tokens_per_second": 1.23e6, "validation_loss": 10.01}
    assert format_line(120000, 200000, metrics, eta_seconds=5000) == (
        "step 120000/200000  loss 10.123  val 10.010  1.23M tok/s  lr 3.0e-04  ETA 1:23:20"
    )


def test_on_a_terminal_the_line_is_live_and_notes_stand_above() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Progress(4, console=console) as progress:
        progress.update(2, loss=1.25)
        progress.note("saved [step 2]")
        progress.update(4, loss=1.0)
    text = out.getvalue()
    assert "saved [step 2]" in text
    assert "step 4/4  loss 1.000" in text
    assert "\x1b[" in text


def test_a_narrow_terminal_cuts_the_line_and_keeps_one_row() -> None:
    out = io.StringIO()
    with Progress(4, console=Console(file=out, force_terminal=True, width=40, color_system=None)) as progress:
        progress.update(2, loss=1.25, learning_rate=1e-3, tokens_per_second=1e6)
    last = out.getvalue().split("\x1b[2K")[-1].split("\n")[0]
    assert last.startswith("step 2/4  loss 1.250") and last.endswith("…") and len(last) == 40


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999.4, "999"), (999.9, "1k"), (81250, "81.2k"), (999_600, "1M"), (3.2e15, "3200T")]
)
def test_counts(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90061, "1d 1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
