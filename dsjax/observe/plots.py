"""The loss curve of a run, and how values are spread, as pictures."""

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_INK, _TRAIN, _VALIDATION, _RATE = "#2b2d42", "#3a6ea5", "#d1495b", "#8d99ae"
_MOST_BARS = 80
_REFERENCES = ("#6a994e", "#bc6c25", "#7b2cbf", "#457b9d")


def loss_plot(
    rows: Sequence[Mapping[str, float | int | str]],
    path: Path,
    *,
    references: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """Draws training loss (each step thin, smoothed bold), validation loss and, below, the learning rate.

    Steps whose loss is not finite leave a gap. The file is replaced in one move.

    Args:
        rows: as from `read_metrics`: `step`, and where there are any `loss`, `validation_loss`, `learning_rate`.
        path: the PNG to write.
        references: losses to compare with, drawn as horizontal lines: {"unigram": 7.1, "bigram": 5.9}.
        title: over the picture.

    Raises:
        ValueError: no row has a finite loss.
    """
    from matplotlib.figure import Figure

    steps, losses = _column(rows, "loss")
    if not any(map(math.isfinite, losses)):
        raise ValueError(f"nothing to plot: none of {len(rows)} rows has a finite 'loss'")
    rate_steps, rates = _column(rows, "learning_rate")
    figure = Figure(figsize=(8.0, 5.0), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    heights = (5.0, 1.0) if rates else (1.0,)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_losses(panels[0], steps, losses, _column(rows, "validation_loss"), references or {})
    if rates:
        panels[1].plot(rate_steps, rates, "o" if len(rates) == 1 else "", color=_RATE, linewidth=1.4)
        panels[1].set_ylim(0, max(rates) * 1.15 or 1.0)
        panels[1].set_ylabel("learning rate", color=_INK, fontsize=8)
        panels[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        panels[1].locator_params(axis="y", nbins=3)
    for panel in panels:
        _plain_axes(panel)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    panels[-1].set_xlabel("step", color=_INK, fontsize=9)
    if title:
        _set_title(panels[0], title)
    _save(figure, path)


def histogram_plot(values: np.ndarray, path: Path, *, label: str, title: str = "") -> None:
    """Draws a histogram of whole numbers. The file is replaced in one move.

    Args:
        values: the numbers.
        path: the PNG to write.
        label: what they are.
        title: over the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    panel = figure.subplots()
    least, most = int(values.min()), int(values.max())
    width = -(-(most - least + 1) // _MOST_BARS)  # a whole one: bars of equally many values
    panel.hist(values, bins=(np.arange(least, most + width + 1, width) - 0.5).tolist(), color=_TRAIN)
    panel.set_xlabel(label, color=_INK, fontsize=9)
    panel.set_ylabel("rows", color=_INK, fontsize=9)
    _plain_axes(panel)
    _set_title(panel, title)
    _save(figure, path)


def require_plots() -> None:
    """Refuse to go on where nothing can be drawn: called before the work that the picture shows.

    Raises:
        ValueError: matplotlib is not there, or does not work.
    """
    try:
        importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError as error:
        raise ValueError(f"pictures need matplotlib: {error}; pip install --force-reinstall matplotlib") from error


def _set_title(panel, title: str) -> None:
    # No formula: the name of a run may hold $.
    panel.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", parse_math=False)


def _plain_axes(panel) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#c5c9d3")
    panel.tick_params(colors=_INK, labelsize=8, length=3)
    panel.yaxis.get_offset_text().set_size(7)
    panel.grid(axis="y", color="#eceff4", linewidth=0.8)
    panel.set_axisbelow(True)


def _save(figure, path: Path) -> None:
    # No pyplot: it would choose a display and keep the figure in a global list.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    FigureCanvasAgg(figure).print_png(str(partial))
    os.replace(partial, path)


def _draw_losses(panel, steps, losses, validation, references: Mapping[str, float]) -> None:
    panel.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=0.7)
    smooth = smoothed(losses)
    alone = "o" if len(steps) == 1 else ""  # a line of one point is invisible
    panel.plot(steps, smooth, alone, color=_TRAIN, linewidth=1.9, label="training")
    validation_steps, validation_losses = validation
    if validation_losses:
        panel.plot(
            validation_steps, validation_losses, "o-", color=_VALIDATION, markersize=4.5, linewidth=0.9,
            markeredgecolor="white", markeredgewidth=0.8, label="validation",
        )  # fmt: skip
    for (name, value), color in zip(references.items(), _REFERENCES * len(references), strict=False):
        panel.axhline(value, color=color, linewidth=1.1, linestyle=(0, (4, 3)), label=f"{name} {value:.3f}")
    # The curves fill the panel; a single spike of one step does not flatten them.
    shown = [v for v in (*smooth, *validation_losses, *references.values(), losses[0]) if math.isfinite(v)]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.5
    panel.set_ylim(low - margin, high + margin)
    panel.set_ylabel("loss (nats per token)", color=_INK, fontsize=9)
    panel.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper right")


def smoothed(values: Sequence[float]) -> list[float]:
    """The straight line that fits each point's neighbours best (a twentieth of the run), at that point; gaps stay gaps.

    Unlike a running mean it does not trail behind a falling loss.

    Example:
        >>> smoothed([4.0, 3.0, math.nan, 1.0])
        [4.0, 3.0, nan, 1.0]
    """
    y = np.asarray(values, np.float64)
    x = np.arange(len(y), dtype=np.float64)
    here = np.isfinite(y)
    half = max(1, len(y) // 40)
    low, high = np.maximum(x - half, 0).astype(int), np.minimum(x + half + 1, len(y)).astype(int)

    def window_sum(terms: np.ndarray) -> np.ndarray:
        sums = np.concatenate([[0.0], np.cumsum(np.where(here, terms, 0.0))])
        return sums[high] - sums[low]

    # Positions and values from their means over the run: the sums then lose no digits to a large offset.
    centre, offset = x.mean() if len(x) else 0.0, y[here].mean() if here.any() else 0.0
    u, v = x - centre, np.where(here, y, 0.0) - offset
    n, s_u, s_v = window_sum(np.ones_like(y)), window_sum(u), window_sum(v)
    s_uu, s_uv = window_sum(u * u), window_sum(u * v)
    spread = n * s_uu - s_u * s_u
    slope = np.divide(n * s_uv - s_u * s_v, spread, out=np.zeros_like(y), where=spread > 1e-9 * n * n)
    fit = np.divide(s_v - slope * s_u, n, out=np.zeros_like(y), where=n > 0) + slope * u + offset
    return np.where(here, fit, math.nan).round(9).tolist()


def _column(rows: Sequence[Mapping[str, float | int | str]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that hold a metric; what is not finite becomes a gap."""
    pairs = [(float(row["step"]), float(row[name])) for row in rows if name in row]
    return [step for step, _ in pairs], [value if math.isfinite(value) else math.nan for _, value in pairs]
