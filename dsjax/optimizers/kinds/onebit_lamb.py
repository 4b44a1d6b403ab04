"""Settings of 1-bit LAMB."""

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

from dsjax.optimizers.kinds.one_bit import FreezingConfig

if TYPE_CHECKING:
    from dsjax.optimizers.algorithms.onebit_adam import Moments
    from dsjax.optimizers.algorithms.onebit_lamb import OneBitLamb
    from dsjax.optimizers.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OneBitLambConfig(FreezingConfig):
    """1-bit LAMB (arXiv 2104.06069): the same for LAMB, for large batches."""

    freeze_lag: ClassVar[int] = 2
    """The last full-precision step is a program of its own."""

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

    def algorithm(self, workers: "Workers", moments: "Moments", last_full: int) -> "OneBitLamb":
        """The stages and their updates."""
        from dsjax.optimizers.algorithms.onebit_lamb import OneBitLamb

        bounds = (self.max_coeff, self.min_coeff, self.coeff_beta)
        factors = (self.factor_max, self.factor_min, self.factor_threshold)
        return OneBitLamb(workers, moments, last_full, *bounds, *factors)

    def advice(self, *, workers: int, steps: int, growing_until: int = 0) -> list[str]:
        """Also about a freeze before the coefficients' average has settled."""
        found = FreezingConfig.advice(self, workers=workers, steps=steps, growing_until=growing_until)
        last = self.last_full(steps)
        if last * (1 - self.coeff_beta) < 1:
            found.append(
                f"optimizer.freeze_step = {last} is fewer steps than the coefficients' average needs, "
                f"1 / (1 - coeff_beta) = {1 / (1 - self.coeff_beta):.0f}"
            )
        return found
