"""Settings that all optimizers have: the schedule of the learning rate, and the base of their dataclasses."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from dsjax.optimizers.api import CreateInputs, StagedTransform

Clock = Literal["steps", "tokens", "layer_tokens"]
"""layer_tokens: tokens times the layers that see them, the clock of random-LTD's schedule (arXiv 2211.11586)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over time: linear warm-up to the peak, then `kind` down to min_ratio * peak."""

    kind: Literal["constant", "linear", "cosine", "exponential"] = "cosine"
    """The shape after the warm-up; exponential: times decay_rate every decay_every."""
    warmup: int = 0
    """Length of the warm-up, in warmup_by."""
    warmup_power: float = 1.0
    """The warm-up is (n / warmup) to this power: 1 is linear, 2 begins slowly."""
    warmup_by: Clock = "steps"
    """Unit of warmup."""
    decay: int = 0
    """Where the decay ends, counted from the start, in decay_by; 0: at the end of training, exponential never."""
    decay_by: Clock = "steps"
    """Unit of decay; with decay 0 the unit in which the end of training is given."""
    min_ratio: float = 0.1
    """The last learning rate as a share of the peak; of kind exponential the least."""
    decay_rate: float = 0.9
    """Of kind exponential: the factor of decay_every."""
    decay_every: int = 1000
    """Of kind exponential: how long it takes to fall by that factor, in decay_by."""
    offset: float = 0.0
    """Added to the learning rate in every step, the first one too."""

    def __post_init__(self) -> None:
        if self.decay_every < 1 or not 0 < self.decay_rate <= 1:
            raise ValueError(
                f"decay_every must be 1 or more and decay_rate in (0, 1]; got {self.decay_every} and {self.decay_rate}"
            )
        if self.warmup_power <= 0 or self.offset < 0:
            raise ValueError(
                f"warmup_power must be above 0 and offset 0 or more; got {self.warmup_power} and {self.offset}"
            )
        if self.warmup < 0 or self.decay < 0:
            raise ValueError(f"warmup and decay must be 0 or more; got {self.warmup} and {self.decay}")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio must be in [0, 1]; got {self.min_ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BaseConfig(abc.ABC):
    """Settings of every optimizer, and what a run asks of one; a new kind is a subclass in a file of its own."""

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

    @abc.abstractmethod
    def create(self, inputs: "CreateInputs") -> "StagedTransform":
        """The optimizer; JAX is imported here, not with the settings."""

    def frozen_at(self, steps: int) -> Self:
        """The same with its freeze as a step, in a run of so many.

        Example:
            >>> from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
            >>> OneBitAdamConfig().frozen_at(100).freeze_step
            20
        """
        return self

    def advice(self, *, workers: int, steps: int, growing_until: int = 0) -> list[str]:
        """Warnings about settings that a user may not have meant.

        Args:
            workers: size of the mesh's axis `data`.
            steps: of the whole run.
            growing_until: the step up to which rows become longer or more of their tokens are kept; 0 if they never do.

        Example:
            >>> from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
            >>> OneBitAdamConfig(freeze_step=10).advice(workers=1, steps=100)
            ['mesh.data = 1: there is one worker, and nothing is compressed']
        """
        return []
