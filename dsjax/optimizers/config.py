"""Optimizers and learning-rate schedules, as a user names them. `kind` chooses."""

import dataclasses
from typing import Literal

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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _OneBit(_Common):
    b1: float = 0.9
    """Decay rate of the momentum."""
    b2: float = 0.999
    """Decay rate of the variance."""
    eps: float = 1e-8
    """Added to the root of the variance."""
    bias_correction: bool = True
    """Divide moments by 1 - b^t."""
    granularity: Literal["fused", "tensor", "group"] = "fused"
    """A scale per tensor in one message, a message per tensor, or one scale for all tensors of a device."""
    scale: Literal["l2", "l1"] = "l2"
    """The scale of a tensor's signs: the root of its mean square, or its mean absolute value."""
    kernel: Literal["auto", "xla", "mosaic"] = "auto"
    """Passes over memory: XLA's, or the Mosaic kernels for GPUs; auto is XLA as long as no GPU has run the kernels."""
    clip: Literal["mean", "local"] = "mean"
    """In compressed steps: clip all workers by the root mean square of their norms, or each by its own norm."""

    def __post_init__(self) -> None:
        _Common.__post_init__(self)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.eps <= 0:
            raise ValueError(f"eps must be above 0; got {self.eps}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Freezing(_OneBit):
    freeze_step: int = 0
    """Steps of the full-precision stage, after which the variance is frozen; 0 means a fifth of the run."""
    freeze_tolerance: float = 0.0
    """Freeze earlier: once the logarithm of the variance's sum changes by less than this in freeze_every steps."""
    freeze_every: int = 100
    """Steps between two looks at the variance."""

    def __post_init__(self) -> None:
        _OneBit.__post_init__(self)
        if self.freeze_step < 0 or self.freeze_tolerance < 0 or self.freeze_every < 1:
            raise ValueError(
                "freeze_step and freeze_tolerance must be 0 or more and freeze_every 1 or more; got "
                f"{self.freeze_step}, {self.freeze_tolerance} and {self.freeze_every}"
            )

    def last_full(self, steps: int) -> int:
        """The last step of the full-precision stage in a run of so many steps.

        Raises:
            ValueError: the run ends before it.
        """
        if self.freeze_step >= steps > 0 and not self.freeze_tolerance:
            raise ValueError(
                f"optimizer.freeze_step = {self.freeze_step} is not before the end of the run, {steps} steps: nothing "
                "would be compressed; give 15 to 25 % of the steps, or 0 for a fifth of them"
            )
        return self.freeze_step or max(2, round(0.2 * steps))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OneBitAdamConfig(_Freezing):
    """1-bit Adam (arXiv 2102.02888): after a warm-up momenta are averaged over `data` at one bit a value."""

    kind: Literal["onebit_adam"] = "onebit_adam"
    """The optimizer."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OneBitLambConfig(_Freezing):
    """1-bit LAMB (arXiv 2104.06069): the same for LAMB, for large batches."""

    kind: Literal["onebit_lamb"] = "onebit_lamb"
    """The optimizer."""
    max_coeff: float = 10.0
    """Upper bound of |w| / |update| in the warm-up."""
    min_coeff: float = 0.01
    """Lower bound of it."""
    coeff_beta: float = 0.9
    """Decay rate of that coefficient's average, which is used afterwards."""
    factor_max: float = 4.0
    """Upper bound of the factor on it in the compressed stage."""
    factor_min: float = 0.5
    """Lower bound of that factor."""
    factor_threshold: float = 0.1
    """By which share the factor may change in a step."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ZeroOneAdamConfig(_OneBit):
    """0/1 Adam (arXiv 2202.06009): gradients at one bit a value from the start, later most rounds are left out."""

    kind: Literal["zero_one_adam"] = "zero_one_adam"
    """The optimizer."""
    var_freeze_step: int = 0
    """The last step at which the variance is learnt; 0: the end of the warm-up, at least a tenth of the run.

    A number beyond the run is allowed: then workers never leave each other.
    """
    var_update_scaler: int = 16
    """Updates of the variance after which the interval between them doubles (kappa)."""
    local_step_scaler: int = 32678
    """Steps after which the interval between syncs doubles."""
    local_step_clipper: int = 16
    """The longest interval between syncs (H)."""

    def __post_init__(self) -> None:
        _OneBit.__post_init__(self)
        for name in ("var_update_scaler", "local_step_scaler", "local_step_clipper"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if self.var_freeze_step < 0:
            raise ValueError(f"var_freeze_step must be 0 or more; got {self.var_freeze_step}")

    def last_full(self, steps: int) -> int:
        """The last step at which the variance is learnt in a run of so many steps."""
        warmup = self.schedule.warmup if self.schedule.warmup_by == "steps" else 0
        return self.var_freeze_step or max(2, warmup, round(0.1 * steps))


OptimizerConfig = AdamWConfig | LambConfig | SGDConfig | OneBitAdamConfig | OneBitLambConfig | ZeroOneAdamConfig


def frozen_at(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The same with its freeze as a step, in a run of so many.

    Example:
        >>> frozen_at(OneBitAdamConfig(), 100).freeze_step
        20
    """
    match config:
        case OneBitAdamConfig() | OneBitLambConfig():
            return dataclasses.replace(config, freeze_step=config.last_full(steps))
        case ZeroOneAdamConfig():
            return dataclasses.replace(config, var_freeze_step=config.last_full(steps))
        case _:
            return config
