"""AdamW."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from dsjax.optimizers.kinds.base import BaseConfig

if TYPE_CHECKING:
    from dsjax.optimizers.api import CreateInputs, StagedTransform


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig(BaseConfig):
    """Adam with decoupled weight decay (arXiv 1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    """The optimizer."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def create(self, inputs: "CreateInputs") -> "StagedTransform":
        """Optax's Adam, then the decay."""
        import optax

        from dsjax.optimizers.api import lift

        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return lift(optax.chain(adam, inputs.decay(self)))
