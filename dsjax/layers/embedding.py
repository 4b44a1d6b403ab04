"""Tables of vectors: tokens, positions, token types."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.layers.context import Context
from dsjax.layers.weight import FloatWeight, Weight


class Embedding(nnx.Module):
    """A table [N, D] of vectors, looked up by number.

    Example:
        >>> Embedding(7, dim=4, rows="vocab", key=jax.random.key(0), std=0.02)(
        ...     jax.numpy.zeros((2, 3), int), Context(), dtype="float32").shape
        (2, 3, 4)
    """

    def __init__(self, num_rows: int, *, dim: int, rows: str, key: jax.Array, std: float) -> None:
        self.table: Weight = FloatWeight.normal(key, (num_rows, dim), (rows, "embed"), std=std)

    def __call__(self, ids: Int[Array, "*batch"], context: Context, *, dtype: DTypeLike) -> Float[Array, "*batch D"]:
        """The rows `ids` of the table, in dtype."""
        return self.table.rows(ids, context, dtype=dtype)
