"""The transformer's perceptron: act(x W1 + b1) W2 + b2, or gated (arXiv 2002.05202): (act(x G) * (x W1)) W2."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.context import Context
from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive

Activation = Literal["gelu_tanh", "gelu", "silu"]


def keeping_slope(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function that keeps a single array for the backward pass, its derivative.

    JAX by itself keeps each intermediate of its formula: five arrays of the hidden size for GELU's.

    Example:
        >>> float(jax.grad(keeping_slope(jnp.square))(3.0))
        6.0
    """
    with_slope = jax.custom_jvp(function)

    @with_slope.defjvp
    def rule(primals, tangents):
        (x,), (tangent,) = primals, tangents
        y, slope = jax.jvp(function, (x,), (jnp.ones_like(x),))
        return y, slope * tangent

    return with_slope


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": keeping_slope(partial(jax.nn.gelu, approximate=True)),
    "gelu": keeping_slope(partial(jax.nn.gelu, approximate=False)),
    "silu": keeping_slope(jax.nn.silu),
}


class MLP(nnx.Module):
    """D -> F -> D; the hidden dimension F is the tensor-parallel one."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        key: jax.Array,
        std: float,
        residual_scale: float,
        activation: Activation = "gelu_tanh",
        gated: bool = False,
        use_bias: bool = True,
    ) -> None:
        wide = partial(Linear, (dim, hidden_dim), ("embed", "mlp"), std=std, use_bias=use_bias)
        self.gate = wide(key=derive(key, "gate")) if gated else None
        self.up = wide(key=derive(key, "up"))
        self.down = Linear(
            (hidden_dim, dim), ("mlp", "embed"), key=derive(key, "down"), std=std * residual_scale, use_bias=use_bias
        )
        self.activation = activation

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """The perceptron of every position."""
        act = ACTIVATIONS[self.activation]
        h_BTF = self.up(x_BTD, context)
        h_BTF = act(h_BTF) if self.gate is None else act(self.gate(x_BTD, context)) * h_BTF
        return self.down(context.layout.activation(h_BTF, None, "mlp"), context)


def residual_scale(num_layers: int, enabled: bool) -> float:
    """GPT-2's factor for the projections that end a block: 1 / sqrt(2 L), or 1 when not enabled.

    Example:
        >>> residual_scale(8, True)
        0.25
    """
    return 1 / math.sqrt(2 * num_layers) if enabled else 1.0
