"""OptimizerConfig -> optimizer."""

import jax
import optax

from dsjax.optimizers.api import StagedTransform, Tree, lift
from dsjax.optimizers.config import AdamWConfig, LambConfig, OptimizerConfig, SGDConfig
from dsjax.optimizers.lamb import scale_by_layer_trust_ratio


def create_optimizer(config: OptimizerConfig, params: Tree, stacked: Tree) -> StagedTransform:
    """The optimizer of a run; the learning rate comes from outside, step by step.

    Args:
        config: which, and its constants.
        params: the parameters or their shapes; only ranks are looked at.
        stacked: tree of bools, True where the first dimension counts layers.
    """
    decays = jax.tree.map(lambda p, s: config.decay_mask == "all" or p.ndim - s >= 2, params, stacked)
    decay = optax.add_decayed_weights(config.weight_decay, mask=decays)
    match config:
        case AdamWConfig():
            return lift(optax.chain(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), decay))
        case LambConfig():
            adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
            return lift(optax.chain(adam, decay, scale_by_layer_trust_ratio(stacked)))
        case SGDConfig():
            velocity = optax.trace(config.momentum, nesterov=config.nesterov) if config.momentum else optax.identity()
            return lift(optax.chain(velocity, decay))
