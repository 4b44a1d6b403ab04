"""GPT-2's sizes and settings."""

import dataclasses
from typing import Literal

from dsjax.models.families.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config(TransformerConfig):
    """GPT-2 (and GPT-3): learned positions, pre-LayerNorm, tanh GELU, tied embedding."""

    kind: Literal["gpt2"] = "gpt2"
    """The family."""
    max_positions: int = 1024
    """Rows of the position embedding: the longest sequence."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """Of the MLP: GELU by its tanh approximation, or by the error function."""
    scores_by_layer: bool = False
    """Divide attention scores of layer i, counted from 0, by i + 1 (scale_attn_by_inverse_layer_idx)."""
    tied_embedding: bool = True
    """Logits use the embedding's table."""
