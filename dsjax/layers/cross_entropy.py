"""Cross-entropy over the vocabulary, straight from hidden states: logits = x E^T + b, loss = logsumexp(logits) -
logits[y]. Most models have no b.

The sum of the losses is a scalar, so its gradient is known up to one factor as soon as the logits are: softmax -
onehot. `summed_loss` therefore multiplies by it in the forward pass, a chunk of positions at a time, and keeps the
gradients of x [B, T, D] and E [V, D] instead of the logits [B, T, V], which exist for one chunk only and are computed
once. (The backward pass scales the two by the factor. Without differentiation nothing of this is computed.)

Shapes: B rows, T positions, D model, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsjax.mesh.layout import ONE_DEVICE, Layout

CHUNK_ELEMENTS = {"cpu": 1 << 20, "gpu": 1 << 28}
"""Logits of one chunk on one device: what stays in a CPU's cache (measured: 0.35 s in one piece, 0.18 s in pieces of
2^20, for 4,096 tokens x 4,096 words), what fills a GPU."""


def logits(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    bias_V: Float[Array, " V"] | None = None,
    *,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T V"]:
    """x E^T + b in float32, the vocabulary split over `tensor`."""
    out_BTV = jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)
    if bias_V is not None:
        out_BTV += bias_V
    return layout.activation(out_BTV, None, "vocab")


def token_losses(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    bias_V: Float[Array, " V"] | None = None,
    *,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "B T"]:
    """The loss of every position, in nats.

    Example:
        >>> x, table = jnp.zeros((1, 2, 4)), jnp.zeros((8, 4))
        >>> token_losses(x, table, jnp.zeros((1, 2), int))
        Array([[2.0794415, 2.0794415]], dtype=float32)
    """
    return _chunk(x_BTD, table_VD, bias_V, targets_BT, layout)[0]


def _chunk(x_BTD, table_VD, bias_V, targets_BT, layout: Layout):
    """Losses [B, T] and what their gradient is made of: softmax and onehot, both [B, T, V]."""
    z_BTV = logits(x_BTD, table_VD, bias_V, layout=layout)
    top_BT1 = jax.lax.stop_gradient(z_BTV.max(-1, keepdims=True))
    exp_BTV = jnp.exp(z_BTV - top_BT1)
    sum_BT1 = exp_BTV.sum(-1, keepdims=True)
    # A comparison, not a gather: a gather along the split vocabulary would collect all the logits.
    onehot_BTV = jnp.arange(z_BTV.shape[-1]) == targets_BT[..., None]
    target_BT = jnp.where(onehot_BTV, z_BTV, 0).sum(-1)
    loss_BT = (jnp.log(sum_BT1) + top_BT1)[..., 0] - target_BT
    return loss_BT, exp_BTV / sum_BT1, onehot_BTV


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def summed_loss(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    bias_V: Float[Array, " V"] | None = None,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, ""]:
    """Sum of the losses of the positions in the mask, in nats, float32.

    Example:
        >>> x, table = jnp.zeros((1, 2, 4)), jnp.zeros((8, 4))
        >>> round(float(summed_loss(x, table, jnp.zeros((1, 2), int), jnp.ones((1, 2), bool))), 4)
        4.1589
    """
    losses = token_losses(x_BTD, table_VD, targets_BT, bias_V, layout=layout)
    return jnp.where(mask_BT, losses, 0).sum()


def num_chunks(x_BTD: jax.Array, table_VD: jax.Array, layout: Layout) -> int:
    """The smallest divisor of T with which one chunk's logits on one device stay within CHUNK_ELEMENTS."""
    most = CHUNK_ELEMENTS[jax.default_backend()]
    rows, length, _ = x_BTD.shape
    local = rows * table_VD.shape[0] * length // (layout.size(layout.batch_axes) * layout.mesh.shape["tensor"])
    return next(n for n in range(1, length + 1) if length % n == 0 and (local // n <= most or n == length))


def _forward(x_BTD, table_VD, targets_BT, mask_BT, bias_V, layout: Layout):
    chunks = num_chunks(x_BTD, table_VD, layout)
    shards, place = layout.size(layout.batch_axes), layout.activation

    def chunk_gradient(grown, piece):
        x, targets, mask = piece
        losses, softmax, onehot = _chunk(x, table_VD, bias_V, targets, layout)
        delta = jnp.where(mask[..., None], softmax - onehot.astype(softmax.dtype), 0).astype(x.dtype)
        x_gradient = place(jnp.einsum("btv,vd->btd", delta, table_VD, preferred_element_type=x.dtype), None, None)
        # One sum per shard of rows, S of them: they stay where they are and are added up once, after the last chunk.
        delta, x = (a.reshape(shards, -1, *a.shape[1:]) for a in (delta, x))
        # [D, V]: XLA:CPU turns the left side of a product round to sum over rows, and x is smaller than delta.
        part_SDV = jnp.einsum("sbtd,sbtv->sdv", x, delta, preferred_element_type=jnp.float32)
        parts = [place(part_SDV, None, "vocab")]
        if bias_V is not None:
            parts.append(place(delta.astype(jnp.float32).sum((1, 2)), "vocab"))
        grown = [total + part for total, part in zip(grown, parts, strict=True)]
        return grown, (jnp.where(mask, losses, 0).sum(1), x_gradient)

    start = [place(jnp.zeros((shards, *table_VD.T.shape), jnp.float32), None, "vocab")]
    if bias_V is not None:
        start.append(place(jnp.zeros((shards, *bias_V.shape), jnp.float32), "vocab"))
    if chunks == 1:
        grown, (losses, x_gradient) = chunk_gradient(start, (x_BTD, targets_BT, mask_BT))
    else:
        cut = lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0)
        pieces = (cut(x_BTD), cut(targets_BT), cut(mask_BT))
        grown, (losses, x_gradients) = jax.lax.scan(chunk_gradient, start, pieces)
        x_gradient = jnp.moveaxis(x_gradients, 0, 1).reshape(x_BTD.shape)

    def reduced(grown_S, like, axes):
        return layout.hold_gradient(grown_S.sum(0).T, axes).astype(like.dtype)

    table_gradient = reduced(grown[0], table_VD, ("vocab", "embed"))
    bias_gradient = None if bias_V is None else reduced(grown[1], bias_V, ("vocab",))
    return losses.sum(), (x_gradient, table_gradient, bias_gradient)


def _backward(layout, residuals, cotangent):
    scaled = lambda gradient: (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)
    x_gradient, table_gradient, bias_gradient = jax.tree.map(scaled, residuals)
    return x_gradient, table_gradient, None, None, bias_gradient


summed_loss.defvjp(_forward, _backward)
