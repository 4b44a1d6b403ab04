"""The loss plot: a valid picture from any run, and a smoothed curve that follows it."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.observe.plots import histogram_plot, loss_plot, smoothed


def rows(count: int) -> list[dict[str, float | int | str]]:
    rows: list[dict[str, float | int | str]] = [
        {"step": step, "loss": 8.0 / step, "learning_rate": 1e-3, "stage": "mean"} for step in range(1, count + 1)
    ]
    for row in rows[9::10]:
        row["validation_loss"] = 3.0
    return rows


@pytest.mark.parametrize("count", [1, 2, 60])
def test_it_is_a_png_of_1200_by_750(tmp_path: Path, count: int) -> None:
    import matplotlib.image

    path = tmp_path / "new" / "loss.png"
    loss_plot(rows(count), path, references={"unigram": 6.0, "bigram": 5.0}, title="a run")
    assert matplotlib.image.imread(path).shape == (750, 1200, 4)
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]


def test_a_reference_changes_the_picture_in_its_place(tmp_path: Path) -> None:
    import matplotlib.image

    pictures = []
    for name, references in (("without", {}), ("with", {"bigram": 4.0})):
        loss_plot([{"step": s, "loss": 8.0 - s / 10} for s in range(80)], tmp_path / name, references=references)
        pictures.append(matplotlib.image.imread(tmp_path / name))
    # The loss falls from 8 to 0.1, so 4 is at half height. The legend, which changes too, is in the right quarter.
    changed = np.flatnonzero((pictures[0] != pictures[1])[:, 150:900].any((1, 2)))
    assert len(changed) and np.ptp(changed) < 6
    assert 250 < changed.mean() < 420


def test_steps_that_are_not_finite_leave_a_gap_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    broken = [*rows(20), {"step": 21, "loss": math.nan}, {"step": 22, "loss": math.inf}]
    loss_plot(broken, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="none of 1 rows has a finite 'loss'"):
        loss_plot([{"step": 1, "loss": math.nan}], tmp_path / "none.png")
    with pytest.raises(ValueError, match="none of 0 rows"):
        loss_plot([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.floats(-1, 1), st.floats(-1e3, 1e3), st.data())
def test_a_straight_line_is_its_own_smoothing(count: int, slope: float, start: float, data) -> None:
    line = start + slope * np.arange(count)
    gaps = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    line[list(gaps)] = np.nan
    # float64 sums of up to 400 terms of size 1e3, rounded to 9 digits after the point
    np.testing.assert_allclose(smoothed(line.tolist()), line, atol=1e-7, rtol=0)


def test_smoothing_is_the_least_squares_line_of_the_window() -> None:
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=400) + 100.0
    found = smoothed(noisy.tolist())
    for at in (0, 3, 200, 399):
        window = np.arange(max(0, at - 10), min(400, at + 11))
        expected = np.polyval(np.polyfit(window, noisy[window], 1), at)
        assert found[at] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("values", [[7], [0, 1, 1, 2**60], list(range(1000))])
def test_a_histogram_of_any_whole_numbers(tmp_path: Path, values: list[int]) -> None:
    import matplotlib.image

    histogram_plot(np.array(values), tmp_path / "new" / "h.png", label="difficulty", title="rows")
    picture = matplotlib.image.imread(tmp_path / "new" / "h.png")
    assert picture.shape == (600, 1200, 4) and [path.name for path in (tmp_path / "new").iterdir()] == ["h.png"]
    bars = (picture[..., :3] - [0.227, 0.431, 0.647]).__abs__().max(axis=-1) < 0.02
    assert bars.sum() > 100


@pytest.mark.parametrize("title", [r"lr $\\frac$ and 5$^$", "naïve_run", "100%"])
def test_a_title_is_no_formula(tmp_path: Path, title: str) -> None:
    """The name of a run may hold anything but separators; matplotlib takes what stands between $ for TeX."""
    loss_plot(rows(3), tmp_path / "loss.png", title=title)
    histogram_plot(np.arange(5), tmp_path / "h.png", label="difficulty", title=title)
