"""LayerNorm (arXiv 1607.06450): y = (x - mean) / sqrt(var + eps) * scale + bias, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.parameter import constant, use
from dsjax.mesh.layout import Layout


class LayerNorm(nnx.Module):
    """Normalises the last dimension; statistics and the affine map in float32, the result in x's dtype.

    Example:
        >>> float(LayerNorm(4, eps=1e-5)(jnp.arange(4.0), layout=None).sum())
        0.0
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        self.scale = constant(1.0, (dim,), ("embed",))
        self.bias = constant(0.0, (dim,), ("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"], *, layout: Layout | None) -> Float[Array, "*batch D"]:
        """X normalised over its last dimension."""
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centred = x32 - mean
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * use(self.scale, layout, jnp.float32) + use(self.bias, layout, jnp.float32)).astype(x.dtype)
