"""Feed-forward layers: the interface of all kinds, and the dense perceptron.

A kind is a frozen dataclass with its settings and the module that is made from it; models/feed_forwards.py names both.
The dense one is act(x W1 + b1) W2 + b2, or gated (arXiv 2002.05202): (act(x G) * (x W1)) W2.

Shapes: B rows, T positions, D model, F hidden.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.context import Context
from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive
from dsjax.layers.statistics import Auxiliary, Statistics

Activation = Literal["gelu_tanh", "gelu", "silu"]


class FeedForwardSpec(Protocol):
    """Settings of one kind: a frozen dataclass, which is compared and hashed by its values."""

    def on_one_device(self, tensor: int) -> "FeedForwardSpec":
        """The part that one of `tensor` devices computes."""
        ...

    def from_statistics(self, statistics: Statistics) -> Auxiliary:
        """Losses and metrics of one micro-batch, from statistics [layers of this kind, ...]."""
        ...


class FeedForward(Protocol):
    """A feed-forward layer of any kind; made as `kind(spec, dim, key=..., std=..., residual_scale=...)`."""

    def __init__(self, spec: Any, dim: int, *, key: jax.Array, std: float, residual_scale: float) -> None: ...

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Statistics]:
        """The output of every position, and the layer's statistics."""
        ...


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


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """Settings of the dense perceptron.

    Attributes:
        hidden_dim: F.
        activation: of the hidden layer.
        gated: whether a gate multiplies the hidden layer.
        use_bias: whether the projections have biases.
    """

    hidden_dim: int
    activation: Activation = "gelu_tanh"
    gated: bool = False
    use_bias: bool = True

    def on_one_device(self, tensor: int) -> "DenseSpec":
        """The part that one of `tensor` devices computes."""
        return dataclasses.replace(self, hidden_dim=self.hidden_dim // tensor)

    def from_statistics(self, statistics: Statistics) -> Auxiliary:
        """Nothing: the dense layer has no statistics."""
        return Auxiliary()


class Dense(nnx.Module):
    """D -> F -> D; the hidden dimension F is the tensor-parallel one."""

    def __init__(self, spec: DenseSpec, dim: int, *, key: jax.Array, std: float, residual_scale: float) -> None:
        hidden_dim, use_bias = spec.hidden_dim, spec.use_bias
        wide = partial(Linear, (dim, hidden_dim), ("embed", "mlp"), std=std, use_bias=use_bias)
        self.gate = wide(key=derive(key, "gate")) if spec.gated else None
        self.up = wide(key=derive(key, "up"))
        self.down = Linear(
            (hidden_dim, dim), ("mlp", "embed"), key=derive(key, "down"), std=std * residual_scale, use_bias=use_bias
        )
        self.activation = spec.activation

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Statistics]:
        """The perceptron of every position; it has no statistics."""
        act = ACTIVATIONS[self.activation]
        h_BTF = self.up(x_BTD, context)
        h_BTF = act(h_BTF) if self.gate is None else act(self.gate(x_BTD, context)) * h_BTF
        return self.down(context.layout.activation(h_BTF, None, "mlp"), context), {}


def residual_scale(num_layers: int, enabled: bool) -> float:
    """GPT-2's factor for the projections that end a block: 1 / sqrt(2 L), or 1 when not enabled.

    Example:
        >>> residual_scale(8, True)
        0.25
    """
    return 1 / math.sqrt(2 * num_layers) if enabled else 1.0
