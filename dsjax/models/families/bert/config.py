"""BERT's sizes and settings."""

import dataclasses
from typing import Literal

from dsjax.models.families.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BertConfig(TransformerConfig):
    """BERT (arXiv 1810.04805): bidirectional, learned positions, LayerNorm after each residual, erf GELU.

    Its language model is trained on masked tokens.
    """

    kind: Literal["bert"] = "bert"
    """The family."""
    vocab_size: int = 30522
    """Rows of the embedding; at least the tokenizer's number of tokens."""
    max_positions: int = 512
    """Rows of the position embedding: the longest sequence."""
    token_types: int = 2
    """Rows of the segment embedding: texts of a pair."""
    tied_embedding: bool = True
    """Logits use the embedding's table."""
    norm_eps: float = 1e-12
    """Added to the variance in every norm."""
    scale_residual_init: bool = False
    """Divide the standard deviation of the two projections that end a block by sqrt(2 * num_layers)."""
