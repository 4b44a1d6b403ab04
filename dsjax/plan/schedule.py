"""The schedule of a run whose rows or kept tokens grow: as rows of metrics, and as a picture of characters."""

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsjax.plan.cost import Cost
from dsjax.setup.schedule import StepSchedule

_ROWS, _COLUMNS, _HEIGHT = 9, 80, 8


def schedule_rows(schedule: StepSchedule, cost: Cost) -> list[dict[str, Any]]:
    """Metrics at even distances over the run, the last step among them; one row for a run that never changes."""
    steps = (
        np.unique(np.linspace(0, schedule.num_steps - 1, _ROWS).astype(int))
        if _changes(schedule)
        else [schedule.num_steps - 1]
    )
    return [
        {
            "step": int(step) + 1,
            "rows": int(schedule.rows[step]),
            "length": int(schedule.length[step]),
            "kept": int(schedule.kept[step]),
            "program": int(schedule.bucket[step]) + 1,
            "tokens_of_step": int(schedule.tokens[step + 1] - schedule.tokens[step]),
            "tokens": int(schedule.tokens[step + 1]),
            "flops": float(cost.flops[step]),
            "saving": cost.saving(int(step) + 1),
        }
        for step in steps
    ]


def schedule_table(schedule: StepSchedule, cost: Cost) -> RenderableType | None:
    """The schedule for the terminal, at most 100 columns; None for a run that never changes."""
    if not _changes(schedule):
        return None
    table = Table(title=f"{schedule.num_steps:,} steps, {len(schedule.buckets)} programs", width=100)
    headings = ("step", "rows", "length", "kept", "program", "its tokens", "all tokens", "FLOPs", "saved")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in schedule_rows(schedule, cost):
        table.add_row(
            f"{row['step']:,}", f"{row['rows']:,}", f"{row['length']:,}", f"{row['kept']:,}", str(row["program"]),
            f"{row['tokens_of_step']:,}", f"{row['tokens']:,}", f"{row['flops']:.3g}", f"{row['saving']:.1%}",
        )  # fmt: skip
    left = int(schedule.left_out.max())
    ends = [
        f"FLOPs of the run: {cost.flops.sum():.4g}, of as many steps of whole rows "
        f"{cost.dense * schedule.num_steps:.4g}: "
        f"{cost.saving(schedule.num_steps):.1%} saved.",
        f"Filling up programs' sizes costs {schedule.waste:.1%} of the layers' tokens.",
    ]
    if left:
        ends.append(f"Of a row at most {left} tokens are left over when it is cut.")
    return Group(table, Text(picture(schedule)), Text("\n".join(ends)))


def picture(schedule: StepSchedule) -> str:
    """Length (#) and, below it, kept tokens (o) over the run, in characters.

    Example:
        >>> from dsjax.data.config import CurriculumConfig, FixedLinear, LengthConfig
        >>> from dsjax.setup.config import TrainConfig
        >>> from dsjax.setup.schedule import make_schedule
        >>> length = LengthConfig(min=8, schedule=FixedLinear(steps=50))
        >>> run = TrainConfig(steps=100)
        >>> schedule = make_schedule(run, CurriculumConfig(length=length), None, sequence_length=64, num_layers=2)
        >>> [line.count("#") for line in picture(schedule).splitlines()[:8]]
        [40, 46, 52, 57, 63, 68, 74, 80]
    """
    steps = np.linspace(0, schedule.num_steps - 1, _COLUMNS).astype(int)
    length, kept, top = schedule.length[steps], schedule.kept[steps], int(schedule.length.max())
    lines = []
    for level in range(_HEIGHT, 0, -1):
        reached = top * (level - 0.5) / _HEIGHT
        marks = np.where(kept >= reached, np.where(kept < length, "o", "#"), np.where(length >= reached, "#", " "))
        label = f"{round(top * level / _HEIGHT):>6,} " if level in (_HEIGHT, _HEIGHT // 2) else " " * 7
        lines.append(label + "".join(marks))
    lines.append(" " * 7 + f"1{schedule.num_steps:>{_COLUMNS - 1},}")
    lines.append(
        " " * 7
        + "# length"
        + ("   o tokens that middle layers keep" if (schedule.kept < schedule.length).any() else "")
    )
    return "\n".join(lines)


def _changes(schedule: StepSchedule) -> bool:
    return schedule.settled > 0 or bool((schedule.kept < schedule.length).any())
