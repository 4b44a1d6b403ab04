"""Optimizers and learning-rate schedules, as a user names them. `kind` chooses."""

import dataclasses
from typing import Literal

Clock = Literal["steps", "tokens"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over time: linear warm-up to the peak, then `kind` down to min_ratio * peak."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape after the warm-up."""
    warmup: int = 0
    """Length of the warm-up, in warmup_by."""
    warmup_by: Clock = "steps"
    """Unit of warmup."""
    decay: int = 0
    """Where the decay ends, counted from the start of training, in decay_by; 0 means the end of training."""
    decay_by: Clock = "steps"
    """Unit of decay; with decay 0 the unit in which the end of training is given."""
    min_ratio: float = 0.1
    """The last learning rate as a share of the peak."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.decay < 0:
            raise ValueError(f"warmup and decay must be 0 or more; got {self.warmup} and {self.decay}")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio must be in [0, 1]; got {self.min_ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Common:
    learning_rate: float = 3e-4
    """The peak of the schedule."""
    weight_decay: float = 0.1
    """Decoupled decay, multiplied by the learning rate."""
    decay_mask: Literal["matrices", "all"] = "matrices"
    """Which tensors decay: those with two or more dimensions, or all of them."""
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    """The learning rate over time."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0; got {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be 0 or more; got {self.weight_decay}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig(_Common):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    """The optimizer."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LambConfig(_Common):
    """LAMB (arXiv 1904.00962): Adam's direction scaled by |w| / |update| per tensor."""

    kind: Literal["lamb"] = "lamb"
    """The optimizer."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.999
    """Decay rate of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SGDConfig(_Common):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    """The optimizer."""
    momentum: float = 0.9
    """Decay rate of the velocity; 0 keeps none."""
    nesterov: bool = False
    """Look ahead along the velocity."""


OptimizerConfig = AdamWConfig | LambConfig | SGDConfig
