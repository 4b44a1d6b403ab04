"""Token and position embeddings, and the logits of a tied one."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from dsjax.layers.context import Context
from dsjax.layers.parameter import normal, use


class Embedding(nnx.Module):
    """A table [N, D] of vectors, looked up by number.

    Example:
        >>> Embedding(7, dim=4, rows="vocab", key=jax.random.key(0), std=0.02)(
        ...     jax.numpy.zeros((2, 3), int), Context(), dtype="float32").shape
        (2, 3, 4)
    """

    def __init__(self, num_rows: int, *, dim: int, rows: str, key: jax.Array, std: float) -> None:
        self.table = normal(key, (num_rows, dim), (rows, "embed"), std=std)

    def __call__(self, ids: Int[Array, "*batch"], context: Context, *, dtype) -> Float[Array, "*batch D"]:
        """The rows `ids` of the table, in dtype."""
        # This holds the table's gradient too, which is then summed and reduced into its shards like any other. Left to
        # choose, XLA may gather the gradients of all devices' activations instead and sum them on each.
        return context.layout.whole(use(self.table, context, dtype), self.table.get_metadata("axes"))[ids]
