"""Settings of 0/1 Adam."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from dsjax.optimizers.kinds.one_bit import OneBitConfig

if TYPE_CHECKING:
    from dsjax.optimizers.algorithms.onebit_adam import Moments
    from dsjax.optimizers.algorithms.zero_one_adam import ZeroOneAdam
    from dsjax.optimizers.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ZeroOneAdamConfig(OneBitConfig):
    """0/1 Adam (arXiv 2202.06009): gradients at one bit a value from the start, later most rounds are left out."""

    freeze_key: ClassVar[str] = "var_freeze_step"
    """See OneBitConfig."""

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
        OneBitConfig.__post_init__(self)
        for name in ("var_update_scaler", "local_step_scaler", "local_step_clipper"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if self.var_freeze_step < 0:
            raise ValueError(f"var_freeze_step must be 0 or more; got {self.var_freeze_step}")

    def last_full(self, steps: int) -> int:
        """The last step at which the variance is learnt in a run of so many steps."""
        warmup = self.schedule.warmup if self.schedule.warmup_by == "steps" else 0
        return self.var_freeze_step or max(2, warmup, round(0.1 * steps))

    def algorithm(self, workers: "Workers", moments: "Moments", last_full: int) -> "ZeroOneAdam":
        """The stages and their updates."""
        from dsjax.optimizers.algorithms.zero_one_adam import ZeroOneAdam

        intervals = (self.var_update_scaler, self.local_step_scaler, self.local_step_clipper)
        return ZeroOneAdam(workers, moments, last_full, *intervals)
