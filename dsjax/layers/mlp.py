"""The transformer's two-layer perceptron: gelu(x W1 + b1) W2 + b2, gelu in its tanh form."""

import math

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive
from dsjax.mesh.layout import Layout


class MLP(nnx.Module):
    """D -> F -> D; the hidden dimension F is the tensor-parallel one."""

    def __init__(self, dim: int, hidden_dim: int, *, key: jax.Array, std: float, residual_scale: float) -> None:
        self.up = Linear((dim, hidden_dim), ("embed", "mlp"), key=derive(key, "up"), std=std)
        self.down = Linear((hidden_dim, dim), ("mlp", "embed"), key=derive(key, "down"), std=std * residual_scale)

    def __call__(self, x_BTD: Float[Array, "B T D"], *, layout: Layout | None) -> Float[Array, "B T D"]:
        """The perceptron of every position."""
        h_BTF = jax.nn.gelu(self.up(x_BTD, layout=layout), approximate=True)
        if layout is not None:
            h_BTF = layout.activation(h_BTF, None, "mlp")
        return self.down(h_BTF, layout=layout)


def residual_scale(num_layers: int, enabled: bool) -> float:
    """GPT-2's factor for the projections that end a block: 1 / sqrt(2 L), or 1 when not enabled.

    Example:
        >>> residual_scale(8, True)
        0.25
    """
    return 1 / math.sqrt(2 * num_layers) if enabled else 1.0
