"""The families that there are: a config's kind -> architecture."""

import jax
from flax import nnx

from dsjax.models.config import BloomConfig, GPT2Config, ModelConfig
from dsjax.models.decoder import Architecture, Decoder


def architecture(config: ModelConfig) -> Architecture:
    """What sets the config's family apart.

    Example:
        >>> architecture(BloomConfig()).positions
        'alibi'
    """
    match config:
        case GPT2Config():
            return Architecture(positions="learned", max_positions=config.max_positions)
        case BloomConfig():
            return Architecture(positions="alibi", embedding_norm=True, residual_after_norm=config.residual_after_norm)


def create(config: ModelConfig, *, key: jax.Array) -> Decoder:
    """A model with fresh float32 parameters on the default device."""
    return Decoder(config, architecture(config), key=key)


def abstract(config: ModelConfig) -> Decoder:
    """The model with ShapeDtypeStructs for parameters; nothing is allocated."""
    return nnx.eval_shape(lambda: create(config, key=jax.random.key(0)))
