"""Settings of 1-bit Adam."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from dsjax.optimizers.kinds.one_bit import FreezingConfig

if TYPE_CHECKING:
    from dsjax.optimizers.algorithms.onebit_adam import Moments, OneBitAdam
    from dsjax.optimizers.workers import Workers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OneBitAdamConfig(FreezingConfig):
    """1-bit Adam (arXiv 2102.02888): after a warm-up momenta are averaged over `data` at one bit a value."""

    kind: Literal["onebit_adam"] = "onebit_adam"
    """The optimizer."""

    def algorithm(self, workers: "Workers", moments: "Moments", last_full: int) -> "OneBitAdam":
        """The stages and their updates."""
        from dsjax.optimizers.algorithms.onebit_adam import OneBitAdam

        return OneBitAdam(workers, moments, last_full)
