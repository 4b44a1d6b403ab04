"""Validation while training."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Validation loss on a fixed set of rows."""

    every: int = 100
    """Steps between evaluations; 0 evaluates only at the end."""
    rows: int = 64
    """Rows of the validation set that are used, always the same; 0 means all."""
    batch_size: int = 0
    """Rows at a time; 0 means one training micro-batch over all devices."""
