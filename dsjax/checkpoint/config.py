"""When checkpoints are written and which are kept."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saving and keeping; the last step is always saved."""

    every: int = 100
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss kept, of those saved at a step that was evaluated."""
    keep_every: int = 0
    """Steps whose multiples are kept for good; 0 keeps none."""
    asynchronous: bool = True
    """Write in the background while training goes on."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"keep_last must be at least 1; got {self.keep_last}")
        if min(self.every, self.keep_best, self.keep_every) < 0:
            raise ValueError("every, keep_best and keep_every must be 0 or more")
