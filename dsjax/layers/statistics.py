"""Statistics that layers return beside their output, and what becomes of them after the stack.

A layer returns sums and counts by name over the tokens of one micro-batch; the scan over the layers keeps them per
layer, name -> [layers that have it, ...]. The layer's kind turns those of all its layers into losses and metrics.
"""

import dataclasses
from collections.abc import Mapping

from jaxtyping import Array, Float

Statistics = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """Losses and metrics of one micro-batch, made of its statistics.

    Attributes:
        losses: scalars by name that are added to the mean loss of the micro-batch, with their coefficients; they are
            metrics too.
        metrics: scalars by name that are only shown.
    """

    losses: Mapping[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Float[Array, ""]] = dataclasses.field(default_factory=dict)
