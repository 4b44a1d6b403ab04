"""The settings of the training loop: its length, batch, clipping, bounds and average of the parameters."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = 0
    """Optimizer steps; give this or tokens."""
    tokens: int = 0
    """Effective tokens; training ends at the first step that reaches them."""
    batch_size: int = 32
    """Rows a step over all devices; divisible by data * accumulation * fsdp * expert."""
    accumulation: int = 1
    """Parts into which a step's rows are cut to save memory; the result is that of the whole."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    max_nonfinite_steps: int = 10
    """Stop after this many steps in a row with a gradient that is not finite; such steps change nothing."""
    max_programs: int = 16
    """Most sizes of rows and of kept tokens for which programs are compiled; what lies between is filled up."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the parameters with this decay and evaluate it; 0 keeps none."""

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.tokens > 0):
            raise ValueError(f"give steps or tokens, one of them above 0; got steps {self.steps}, tokens {self.tokens}")
        if self.accumulation < 1 or self.batch_size < 1:
            raise ValueError(
                f"batch_size and accumulation must be at least 1; got {self.batch_size}, {self.accumulation}"
            )
        if self.max_programs < 1:
            raise ValueError(f"max_programs must be 1 or more; got {self.max_programs}")
        if self.clip_norm < 0 or not 0 <= self.ema_decay < 1 or self.max_nonfinite_steps < 1:
            raise ValueError(
                "clip_norm must be 0 or more, ema_decay in [0, 1), max_nonfinite_steps at least 1; got "
                f"{self.clip_norm}, {self.ema_decay}, {self.max_nonfinite_steps}"
            )
