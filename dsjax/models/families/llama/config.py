"""Llama's sizes and settings."""

import dataclasses
from typing import Literal

from dsjax.models.families.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig(TransformerConfig):
    """Llama (arXiv 2302.13971, 2307.09288): RoPE, RMSNorm, SwiGLU, grouped queries, no biases."""

    kind: Literal["llama"] = "llama"
    """The family."""
    max_positions: int = 2048
    """The longest sequence."""
    num_kv_heads: int = 0
    """Heads of keys and values (G), each shared by num_heads / G heads; 0 means num_heads."""
    head_dim: int = 0
    """Size of a head (K); 0 means model_dim / num_heads."""
    tied_embedding: bool = False
    """Logits use the embedding's table."""
    rope_base: float = 10000.0
    """Base of RoPE's frequencies (rope_theta)."""
    rope_factor: float = 1.0
    """RoPE's frequencies are divided by it, to stretch the context."""
    rope_original_positions: int = 0
    """The context before stretching, of Llama 3.1's rule, which divides only slow frequencies; 0 divides all."""
    rope_low: float = 1.0
    """Frequencies that turn less often than this in the original context are divided."""
    rope_high: float = 4.0
    """Frequencies that turn more often than this in the original context stay."""

    def __post_init__(self) -> None:
        TransformerConfig.__post_init__(self)
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_dim must be even for RoPE; got {self.head_size}")
        if min(self.rope_base, self.rope_factor, self.rope_low) <= 0 or self.rope_high <= self.rope_low:
            raise ValueError("rope_base, rope_factor and rope_low must be above 0, and rope_high above rope_low")

    @property
    def head_size(self) -> int:
        """K, the size of a head."""
        return self.head_dim or self.model_dim // self.num_heads

    @property
    def heads_are_free(self) -> bool:
        """Whether the heads together may be wider or narrower than the residual stream."""
        return self.head_dim > 0

    @property
    def kv_heads(self) -> int:
        """G, with the default filled in."""
        return self.num_kv_heads or self.num_heads
