"""Learning rates as pure functions of the clocks, evaluated on the host and handed to the step as a scalar."""

import dataclasses
import math

from dsjax.optimizers.config import Clock, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Clocks:
    """How far training is: steps done and effective tokens seen, as exact Python ints."""

    steps: int = 0
    tokens: int = 0

    def read(self, unit: Clock) -> int:
        """The clock in one unit."""
        return self.steps if unit == "steps" else self.tokens


def learning_rate(config: ScheduleConfig, peak: float, *, after: Clocks, end: Clocks) -> float:
    """The learning rate of one step.

    Args:
        config: the schedule.
        peak: the largest learning rate.
        after: the clocks as they will stand after the step, so that the first step of a warm-up of N has peak / N.
        end: the clocks at the end of training, where the decay ends unless config.decay says otherwise.

    Example:
        >>> config = ScheduleConfig(kind="linear", warmup=2, decay=6, min_ratio=0.0)
        >>> [round(learning_rate(config, 1.0, after=Clocks(step), end=Clocks(6)), 2) for step in range(1, 8)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    now = after.read(config.warmup_by)
    if now < config.warmup:
        return peak * now / config.warmup
    if config.kind == "constant":
        return peak
    stop = config.decay or end.read(config.decay_by)
    # A warm-up in another unit has no place on this clock; the decay is then counted from the start.
    start = config.warmup if config.warmup_by == config.decay_by else 0
    share = min(1.0, max(0.0, (after.read(config.decay_by) - start) / max(1, stop - start)))
    shape = 1 - share if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return peak * (config.min_ratio + (1 - config.min_ratio) * shape)
