"""Statistics that layers return beside their output, and what becomes of them after the stack.

A layer returns sums and counts by name over the tokens of one micro-batch; the scan over the layers keeps them per
layer, name -> [layers that have it, ...]. The layer's kind turns those of all its layers into losses and metrics.
"""

import dataclasses
from collections.abc import Mapping, Sequence

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


def merged(parts: Sequence[Auxiliary]) -> Auxiliary:
    """The losses and metrics of several kinds of layers.

    Raises:
        ValueError: two kinds give the same name.

    Example:
        >>> import jax.numpy as jnp
        >>> both = merged([Auxiliary({"balance": jnp.ones(())}), Auxiliary(metrics={"dropped": jnp.zeros(())})])
        >>> list(both.losses), list(both.metrics)
        (['balance'], ['dropped'])
    """
    names = [name for part in parts for name in (*part.losses, *part.metrics)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two losses or metrics of layers have one name, {', '.join(twice)}: rename one of each")
    losses = {name: loss for part in parts for name, loss in part.losses.items()}
    return Auxiliary(losses, {name: metric for part in parts for name, metric in part.metrics.items()})
