"""LayerNorm (arXiv 1607.06450) and RMSNorm (arXiv 1910.07467), computed in float32.

LayerNorm: y = (x - mean) / sqrt(var + eps) * scale + bias.    RMSNorm: y = x / sqrt(mean(x^2) + eps) * scale.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsjax.layers.context import Context
from dsjax.layers.parameter import constant, use

NormKind = Literal["layer", "rms"]


class Norm(nnx.Module):
    """Normalises the last dimension; statistics and the affine map in float32, the result in x's dtype.

    Example:
        >>> float(Norm(4, "layer", eps=1e-5)(jnp.arange(4.0), Context()).sum())
        0.0
        >>> Norm(2, "rms", eps=0.0)(jnp.array([1.0, 7.0]), Context()).tolist()
        [0.20000000298023224, 1.399999976158142]
    """

    def __init__(self, dim: int, kind: NormKind, *, eps: float) -> None:
        self.scale = constant(1.0, (dim,), ("embed",))
        if kind == "layer":
            self.bias = constant(0.0, (dim,), ("embed",))
        self.kind, self.eps = kind, eps

    def __call__(self, x: Float[Array, "*batch D"], context: Context) -> Float[Array, "*batch D"]:
        """X normalised over its last dimension."""
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - x32.mean(-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        y = y * use(self.scale, context, jnp.float32)
        if self.kind == "layer":
            y = y + use(self.bias, context, jnp.float32)
        return y.astype(x.dtype)
