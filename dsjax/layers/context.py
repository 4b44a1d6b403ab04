"""Context of a layer beside its input. Every layer is called `layer(x, context)`.

Shapes: B rows, T positions, H heads, G heads of keys and values, K head size.
"""

import dataclasses
from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int, Key

from dsjax.layers.positions import Rotation
from dsjax.mesh.layout import ONE_DEVICE, Layout


class View(Protocol):
    """Which keys and values the queries of a layer meet: those of whole rows, or those of a cache."""

    @property
    def rotation(self) -> Rotation | None:
        """The turn of queries and new keys, or None."""
        ...

    def mix(
        self,
        q_BTHK: Float[Array, "B T H K"],
        k_BTGK: Float[Array, "B T G K"],
        v_BTGK: Float[Array, "B T G K"],
        context: "Context",
        *,
        dropout: float,
    ) -> tuple[Float[Array, "B T H K"], Any]:
        """Attend, and write to the cache if there is one.

        Args:
            q_BTHK: queries.
            k_BTGK: keys of the same positions.
            v_BTGK: values of the same positions.
            context: of the layer.
            dropout: rate at which attention weights are dropped where there are dropout keys.

        Returns:
            mixed values, and the layer's cache with these positions in it; None without a cache.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a layer computes, and for which rows.

    Attributes:
        layout: placement on a mesh; that of one device does nothing.
        keys: dropout keys, one a row, of the layer that is called (see layers/dropout.py); None: no dropout.
        number: of the layer in the model, from 0 on; traced inside a scan.
        valid: False where a position holds no real token, which no statistic may count; None: all are real.
        view: what attention sees; None where no layer attends.

    Example:
        >>> Context().keys is None
        True
    """

    layout: Layout = ONE_DEVICE
    keys: Key[Array, " B"] | None = None
    number: Int[Array, ""] | int = 0
    valid: Bool[Array, "B T"] | None = None
    view: View | None = None
