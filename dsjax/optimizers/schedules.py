"""Learning rates as pure functions of the clocks, evaluated on the host and handed to the step as a scalar.

After n of the N steps of a warm-up (in steps, tokens or layer tokens) the rate is peak (n / N)^power; then, with x the
share of the decay that is done and m the least share of the peak,

    constant      peak
    linear        peak (m + (1 - m) (1 - x))
    cosine        peak (m + (1 - m) (1 + cos(pi x)) / 2)
    exponential   peak max(m, rate^((n - N) / every))

and an offset is added to all. Exponential with power 1 is the schedule "LE" of Microsoft's BERT recipes, with power 2
"EE" (DeepSpeedExamples 45b4b71, training/bing_bert: warmup_linear_decay_exp and warmup_exp_decay_exp with degree 2,
lr_offset), where the first step is numbered 0; here it is 1.
"""

import dataclasses
import math

from dsjax.optimizers.kinds.base import Clock, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Clocks:
    """Progress of training: steps done, effective tokens and layer tokens seen, as exact Python ints."""

    steps: int = 0
    tokens: int = 0
    layer_tokens: int = 0

    def read(self, unit: Clock) -> int:
        """The clock in one unit."""
        return {"steps": self.steps, "tokens": self.tokens, "layer_tokens": self.layer_tokens}[unit]


def learning_rate(
    config: ScheduleConfig, peak: float, *, after: Clocks, end: Clocks, warmed: Clocks = Clocks()
) -> float:
    """The learning rate of one step.

    Args:
        config: the schedule.
        peak: the largest learning rate.
        after: the clocks as they will stand after the step, so that the first step of a warm-up of N has peak / N.
        end: the clocks at the end of training, where the decay ends unless config.decay says otherwise.
        warmed: the clocks where the warm-up ends: the decay begins there, also when it is counted in another unit (a
            warm-up in steps and a decay in tokens, as curricula want it).

    Example:
        >>> config = ScheduleConfig(kind="linear", warmup=2, decay=6, min_ratio=0.0)
        >>> [round(learning_rate(config, 1.0, after=Clocks(step), end=Clocks(6)), 2) for step in range(1, 8)]
        [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return config.offset + peak * _share_of_peak(config, after, end, warmed)


def _share_of_peak(config: ScheduleConfig, after: Clocks, end: Clocks, warmed: Clocks) -> float:
    now = after.read(config.warmup_by)
    if now < config.warmup:
        return (now / config.warmup) ** config.warmup_power
    if config.kind == "constant":
        return 1.0
    start = config.warmup if config.warmup_by == config.decay_by else warmed.read(config.decay_by)
    since = after.read(config.decay_by) - start
    if config.kind == "exponential":
        since = min(since, config.decay - start) if config.decay else since
        return max(config.min_ratio, config.decay_rate ** (max(0, since) / config.decay_every))
    stop = config.decay or end.read(config.decay_by)
    share = min(1.0, max(0.0, since / max(1, stop - start)))
    shape = 1 - share if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return config.min_ratio + (1 - config.min_ratio) * shape
