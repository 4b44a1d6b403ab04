"""What a layer is told beside its input. Every layer is called `layer(x, context)`.

Shapes: B rows, T positions.
"""

import dataclasses

from jaxtyping import Array, Bool, Int, Key

from dsjax.mesh.layout import ONE_DEVICE, Layout


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a layer computes, and for which rows.

    Attributes:
        layout: placement on a mesh; that of one device does nothing.
        keys: dropout keys, one a row, of the layer that is called (see layers/dropout.py); None: no dropout.
        number: of the layer in the model, from 0 on; traced inside a scan.
        valid: False where a position holds no real token, which no statistic may count; None: all are real.

    Example:
        >>> Context().keys is None
        True
    """

    layout: Layout = ONE_DEVICE
    keys: Key[Array, " B"] | None = None
    number: Int[Array, ""] | int = 0
    valid: Bool[Array, "B T"] | None = None
