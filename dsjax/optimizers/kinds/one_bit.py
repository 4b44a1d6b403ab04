"""Settings that the optimizers with compressed communication share."""

import abc
import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from dsjax.optimizers.kinds.base import BaseConfig

if TYPE_CHECKING:
    from dsjax.optimizers.algorithms.algorithm import Algorithm
    from dsjax.optimizers.algorithms.onebit_adam import Moments
    from dsjax.optimizers.api import CreateInputs, FreezeRule, StagedTransform
    from dsjax.optimizers.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OneBitConfig(BaseConfig):
    """Settings of the optimizers with stages (dsjax/optimizers/algorithms)."""

    freeze_key: ClassVar[str] = "freeze_step"
    """The field with the last step of the full-precision stage."""

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
        BaseConfig.__post_init__(self)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.eps <= 0:
            raise ValueError(f"eps must be above 0; got {self.eps}")

    @abc.abstractmethod
    def last_full(self, steps: int) -> int:
        """The last step before the freeze in a run of so many steps."""

    @abc.abstractmethod
    def algorithm(self, workers: "Workers", moments: "Moments", last_full: int) -> "Algorithm":
        """The stages and their updates."""

    def freeze_rule(self) -> "FreezeRule | None":
        """The rule by which the freeze may be decided during the run; None: it is not."""
        return None

    def create(self, inputs: "CreateInputs") -> "StagedTransform":
        """A program for each stage, on the mesh of the run."""
        from dsjax.collectives.one_bit import Scheme
        from dsjax.optimizers.algorithms.onebit_adam import Moments
        from dsjax.optimizers.staged import staged
        from dsjax.optimizers.workers import Workers

        others = {axis: size for axis, size in inputs.mesh.shape.items() if axis != "data"}
        scheme, num = Scheme(self.scale, kernel=self.kernel), inputs.mesh.shape["data"]
        workers = Workers("data", num, others, inputs.specs, inputs.leading, self.granularity, scheme)
        decays = inputs.decays(self.decay_mask)
        moments = Moments(self.b1, self.b2, self.eps, self.bias_correction, self.weight_decay, decays)
        algorithm = self.algorithm(workers, moments, self.last_full(inputs.steps))
        return staged(algorithm, inputs.mesh, clip=self.clip, freeze=self.freeze_rule())

    def frozen_at(self, steps: int) -> Self:
        """The same with its freeze as a step."""
        return dataclasses.replace(self, **{self.freeze_key: self.last_full(steps)})

    def advice(self, *, workers: int, steps: int, growing_until: int = 0) -> list[str]:
        """Warnings about one worker, and about a freeze while gradients still change fast."""
        found = []
        if workers == 1:
            found.append("mesh.data = 1: there is one worker, and nothing is compressed")
        schedule, last = self.schedule, self.last_full(steps)
        if schedule.warmup_by == "steps" and last < schedule.warmup:
            found.append(
                f"optimizer.{self.freeze_key} = {last} lies inside the learning rate's warm-up of {schedule.warmup} "
                "steps: the variance is frozen while gradients still change fast; freeze after it"
            )
        if last < growing_until:
            found.append(
                f"optimizer.{self.freeze_key} = {last} lies before step {growing_until}, up to which rows or kept "
                "tokens grow: the variance of short rows is not that of long ones; freeze after it"
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FreezingConfig(OneBitConfig):
    """Settings of 1-bit Adam and 1-bit LAMB: when the variance is frozen."""

    freeze_lag: ClassVar[int] = 1
    """Steps from a look at the variance to the last step before the freeze: what the host can know by then.

    The host reads the metrics of step t when t + 1 is under way.
    """

    freeze_step: int = 0
    """Steps of the full-precision stage, after which the variance is frozen; 0 means a fifth of the run."""
    freeze_tolerance: float = 0.0
    """Freeze earlier: once the logarithm of the variance's sum changes by less than this in freeze_every steps."""
    freeze_every: int = 100
    """Steps between two looks at the variance."""

    def __post_init__(self) -> None:
        OneBitConfig.__post_init__(self)
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

    def freeze_rule(self) -> "FreezeRule | None":
        """By the variance's logarithm, where a tolerance is given."""
        from dsjax.optimizers.api import FreezeRule

        return FreezeRule(self.freeze_tolerance, self.freeze_every, self.freeze_lag) if self.freeze_tolerance else None
