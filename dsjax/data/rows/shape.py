"""The shape of a step's batch; apart from pipeline.py, so that a schedule needs no reader of data."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class BatchShape:
    """The global batch of one step.

    Example:
        >>> BatchShape(rows=8, length=80, width=128)  # 80 tokens of each row in the program for 128
        BatchShape(rows=8, length=80, width=128)
    """

    rows: int
    """Rows; more than the batch draws when each of these is cut into pieces (reshape)."""
    length: int
    """Columns that hold the text."""
    width: int
    """Columns of the arrays, those behind `length` blank."""
