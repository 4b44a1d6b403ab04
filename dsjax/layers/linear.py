"""y = x W + b, with the dimensions of W named; with low-rank adapters (arXiv 2106.09685) y = x W + b + s (x A) B.

(x A) B beside x W, not x (W + s A B): W may be frozen, and no gradient and no copy of its size is ever made.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.context import Context
from dsjax.layers.parameter import constant, normal, use
from dsjax.mesh.layout import Axes


class Linear(nnx.Module):
    """Multiplies the last dimension of x by a kernel; the kernel may have several output dimensions.

    Example:
        >>> layer = Linear((4, 3, 2), ("embed", "qkv", "heads"), key=jax.random.key(0), std=0.02)
        >>> layer(jnp.ones((1, 5, 4)), Context()).shape
        (1, 5, 3, 2)
    """

    def __init__(
        self, shape: tuple[int, ...], axes: Axes, *, key: jax.Array, std: float, use_bias: bool = True
    ) -> None:
        self.kernel = normal(key, shape, axes, std=std)
        self.bias = constant(0.0, shape[1:], axes[1:]) if use_bias else None
        self.lora_a: nnx.Param | None = None
        self.lora_b: nnx.Param | None = None
        self.lora_scale = 1.0

    def __call__(self, x: Float[Array, "*batch _"], context: Context) -> Float[Array, "*batch _"]:
        """X times the kernel plus the bias, in x's dtype."""
        kernel = use(self.kernel, context, x.dtype)
        y = jnp.tensordot(x, kernel, axes=1)
        if self.lora_a is not None and self.lora_b is not None:
            a, b = (use(factor, context, x.dtype) for factor in (self.lora_a, self.lora_b))
            y += self.lora_scale * jnp.tensordot(jnp.tensordot(x, a, axes=1), b, axes=1)
        return y if self.bias is None else y + use(self.bias, context, x.dtype)
