"""y = x W + b, with the dimensions of W named."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.context import Context
from dsjax.layers.parameter import constant, use
from dsjax.layers.weight import FloatWeight, Weight
from dsjax.mesh.layout import Axes


class Linear(nnx.Module):
    """Multiplies the last dimension of x by a weight, which may have several output dimensions.

    Example:
        >>> layer = Linear((4, 3, 2), ("embed", "qkv", "heads"), key=jax.random.key(0), std=0.02)
        >>> layer(jax.numpy.ones((1, 5, 4)), Context()).shape
        (1, 5, 3, 2)
    """

    def __init__(
        self, shape: tuple[int, ...], axes: Axes, *, key: jax.Array, std: float, use_bias: bool = True
    ) -> None:
        self.kernel: Weight = FloatWeight.normal(key, shape, axes, std=std)
        self.bias = constant(0.0, shape[1:], axes[1:]) if use_bias else None

    def __call__(self, x: Float[Array, "*batch _"], context: Context) -> Float[Array, "..."]:
        """X times the weight plus the bias, in x's dtype."""
        y = self.kernel.apply(x, context)
        return y if self.bias is None else y + use(self.bias, context, x.dtype)
