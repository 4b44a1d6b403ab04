"""BLOOM's sizes and settings."""

import dataclasses
from typing import Literal

from dsjax.models.families.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BloomConfig(TransformerConfig):
    """BLOOM (arXiv 2211.05100): ALiBi, LayerNorm after the embedding, tied embedding."""

    kind: Literal["bloom"] = "bloom"
    """The family."""
    residual_after_norm: bool = False
    """Take the residual from the LayerNorm's output (apply_residual_connection_post_layernorm)."""
    tied_embedding: bool = True
    """Logits use the embedding's table."""
