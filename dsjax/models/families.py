"""The families that there are: a config's kind -> its file."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from dsjax.models import bloom, gpt2
from dsjax.models.config import ModelConfig
from dsjax.models.decoder import Decoder

FAMILIES: dict[str, ModuleType] = {"bloom": bloom, "gpt2": gpt2}
"""kind (also Hugging Face's model_type) -> module with architecture, entries, from_hf, to_hf, IGNORED, PREFIX."""


def create(config: ModelConfig, *, key: jax.Array) -> Decoder:
    """A model with fresh float32 parameters on the default device."""
    return Decoder(config, FAMILIES[config.kind].architecture(config), key=key)


def abstract(config: ModelConfig) -> Decoder:
    """The model with ShapeDtypeStructs for parameters; nothing is allocated."""
    return nnx.eval_shape(lambda: create(config, key=jax.random.key(0)))


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model config in a Hugging Face config.json.

    Raises:
        ValueError: an unknown model_type, or a key that is missing.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"config.json: model_type is {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    try:
        return FAMILIES[kind].from_hf(hf)
    except KeyError as missing:
        raise ValueError(f"config.json of a {kind} model lacks the key {missing}") from missing
