"""Counts of a whole run, across resumes."""

import dataclasses


@dataclasses.dataclass
class Counters:
    """Counts over a whole run, across resumes; saved in every checkpoint.

    Attributes:
        steps: optimizer steps, skipped ones included.
        tokens: effective tokens (see setup/schedule.py).
        layer_tokens: tokens times the layers that saw them.
        real_tokens: target tokens that counted in the loss.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: the last of them, up to now.
        best_validation: the lowest validation loss, nats per token; None before the first.
        seconds: time spent in steps, compilation and evaluation left out.
        freeze_step: the last step before the optimizer's freeze, if that was decided during the run.
        variance: what was seen of it at the last look.
    """

    steps: int = 0
    tokens: int = 0
    real_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_validation: float | None = None
    seconds: float = 0.0
    freeze_step: int | None = None
    variance: float | None = None
    layer_tokens: int = 0
