"""Kinds of feed-forward layers: the dataclass of a kind -> its module."""

import jax

from dsjax.layers.feed_forward import Dense, DenseSpec, FeedForward, FeedForwardSpec

FEED_FORWARDS: dict[type, type[FeedForward]] = {DenseSpec: Dense}


def make_feed_forward(
    spec: FeedForwardSpec, dim: int, *, key: jax.Array, std: float, residual_scale: float
) -> FeedForward:
    """A feed-forward layer with fresh parameters.

    Args:
        spec: its settings.
        dim: width of the residual stream.
        key: of the draws.
        std: standard deviation of the weights.
        residual_scale: factor of it for the projection that ends the layer.

    Raises:
        ValueError: a kind that is not registered.

    Example:
        >>> make_feed_forward(DenseSpec(32), 8, key=jax.random.key(0), std=0.02, residual_scale=1.0).up.kernel.shape
        (8, 32)
    """
    if type(spec) not in FEED_FORWARDS:
        known = ", ".join(sorted(kind.__name__ for kind in FEED_FORWARDS))
        raise ValueError(
            f"{type(spec).__name__} is no registered feed-forward; there are {known}; name it in FEED_FORWARDS of "
            "dsjax/models/feed_forwards.py"
        )
    return FEED_FORWARDS[type(spec)](spec, dim, key=key, std=std, residual_scale=residual_scale)
