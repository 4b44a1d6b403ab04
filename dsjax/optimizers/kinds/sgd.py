"""Stochastic gradient descent."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from dsjax.optimizers.kinds.base import BaseConfig

if TYPE_CHECKING:
    from dsjax.optimizers.api import CreateInputs, StagedTransform


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SGDConfig(BaseConfig):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    """The optimizer."""
    momentum: float = 0.9
    """Decay rate of the velocity; 0 keeps none."""
    nesterov: bool = False
    """Look ahead along the velocity."""

    def create(self, inputs: "CreateInputs") -> "StagedTransform":
        """Optax's velocity, if any, then the decay."""
        import optax

        from dsjax.optimizers.api import lift

        velocity = optax.trace(self.momentum, nesterov=self.nesterov) if self.momentum else optax.identity()
        return lift(optax.chain(velocity, inputs.decay(self)))
