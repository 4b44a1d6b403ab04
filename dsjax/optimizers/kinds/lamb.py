"""LAMB."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from dsjax.optimizers.kinds.base import BaseConfig

if TYPE_CHECKING:
    from dsjax.optimizers.api import CreateInputs, StagedTransform


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LambConfig(BaseConfig):
    """LAMB (arXiv 1904.00962): Adam's direction scaled by |w| / |update| per tensor."""

    kind: Literal["lamb"] = "lamb"
    """The optimizer."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.999
    """Decay rate of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""

    def create(self, inputs: "CreateInputs") -> "StagedTransform":
        """Optax's Adam, the decay, and the trust ratio of every tensor."""
        import optax

        from dsjax.optimizers.api import lift
        from dsjax.optimizers.lamb import scale_by_layer_trust_ratio

        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return lift(optax.chain(adam, inputs.decay(self), scale_by_layer_trust_ratio(inputs.leading)))
