"""Heads after the blocks: BERT's masked-word head and pooler (arXiv 1810.04805), mean pooling (1908.10084)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dsjax.layers.context import Context
from dsjax.layers.feed_forward import ACTIVATIONS, Activation
from dsjax.layers.linear import Linear
from dsjax.layers.norm import Norm
from dsjax.layers.parameter import constant, derive


class MaskedHead(nnx.Module):
    """norm(act(x W + b)), and the bias of the logits [V]."""

    def __init__(
        self, dim: int, vocab_size: int, *, activation: Activation, eps: float, std: float, key: jax.Array
    ) -> None:
        self.dense = Linear((dim, dim), ("embed", "out"), std=std, key=derive(key, "dense"))
        self.norm = Norm(dim, "layer", eps=eps)
        self.bias = constant(0.0, (vocab_size,), ("vocab",))
        self.activation = activation

    def __call__(self, x_BTD: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        """The features that are multiplied with the embedding."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(x_BTD, context)), context)


class Pooler(nnx.Module):
    """tanh(x W + b) of one position."""

    def __init__(self, dim: int, *, std: float, key: jax.Array) -> None:
        self.dense = Linear((dim, dim), ("embed", "out"), std=std, key=derive(key, "dense"))

    def __call__(self, x_BD: Float[Array, "B D"], context: Context) -> Float[Array, "B D"]:
        """The text's vector."""
        return jnp.tanh(self.dense(x_BD, context))


def mean_pooled(x_BTD: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B D"]:
    """The mean of the real positions as a vector of length 1, float32.

    Example:
        >>> mean_pooled(jnp.array([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]]), jnp.array([[True, True, False]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    real = mask[..., None].astype(jnp.float32)
    mean = (x_BTD.astype(jnp.float32) * real).sum(1) / jnp.maximum(real.sum(1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
