"""LAMB (arXiv 1904.00962, algorithm 2), per tensor also where one array is that of a stack of layers or of experts.

  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  r = m^ / (sqrt(v^) + eps),  u = r + decay * w
  w <- w - lr * (|w| / |u|) u        with |w| / |u| = 1 where either is 0
The norms are of one layer's tensor: a scanned segment stacks n layers along the first dimension, and a norm over the
whole stack would tie its layers together and change with the way the model is segmented.
"""

import jax
import jax.numpy as jnp
import optax


def scale_by_layer_trust_ratio(leading) -> optax.GradientTransformation:
    """Scale every tensor's update by |w| / |u|.

    Args:
        leading: tree of ints like the parameters: how many of the first dimensions count tensors (layers, experts).

    Example:
        >>> scale = scale_by_layer_trust_ratio({"w": 1})
        >>> w = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
        >>> scale.update({"w": jnp.ones((2, 2))}, scale.init(w), w)[0]["w"]
        Array([[3.5355..., 3.5355...],
               [1.    ..., 1.    ...]], dtype=float32)
    """

    def scaled(update: jax.Array, weight: jax.Array, first: int) -> jax.Array:
        dims = tuple(range(first, weight.ndim))
        norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=dims, keepdims=True))
        weight_norm, update_norm = norm(weight), norm(update)
        usable = (weight_norm > 0) & (update_norm > 0)
        return update * jnp.where(usable, weight_norm / jnp.where(usable, update_norm, 1), 1)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("the trust ratio needs the parameters: call update(updates, state, params)")
        return jax.tree.map(scaled, updates, params, leading), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
