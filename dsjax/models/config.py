"""The shape of a model, by family. `kind` chooses the family."""

import dataclasses
from typing import Literal

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """What every decoder-only family has in common."""

    vocab_size: int = 50257
    """Rows of the embedding; at least the tokenizer's number of tokens."""
    num_layers: int = 12
    """Transformer blocks."""
    model_dim: int = 768
    """Width of the residual stream (D)."""
    num_heads: int = 12
    """Attention heads (H); must divide model_dim."""
    mlp_dim: int = 0
    """Hidden width of the MLP (F); 0 means 4 * model_dim."""
    norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    scale_residual_init: bool = True
    """Divide the standard deviation of the two projections that end a block by sqrt(2 * num_layers)."""
    dropout: float = 0.0
    """Probability of dropping an element of the embedding and of each block's two outputs."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight; above 0 the fused attention kernels are not used."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; softmax, normalisation, logits and parameters stay float32."""
    remat: Remat = "none"
    """What a block recomputes in the backward pass: nothing, all but matrix products, or all."""
    segments: tuple[int, ...] = ()
    """Lengths of the scanned runs of layers, in order; () means (1, L-2, 1). All ones unrolls the stack."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.model_dim % self.num_heads:
            raise ValueError(f"num_heads must divide model_dim; got {self.num_heads} and {self.model_dim}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.segments and (min(self.segments) < 1 or sum(self.segments) != self.num_layers):
            raise ValueError(
                f"segments must be positive and add up to num_layers = {self.num_layers}; got {self.segments}"
            )

    @property
    def hidden_dim(self) -> int:
        """F, the MLP's hidden width, with the default filled in."""
        return self.mlp_dim or 4 * self.model_dim

    @property
    def layer_runs(self) -> tuple[int, ...]:
        """The segments with the default filled in, such as (1, 10, 1)."""
        if self.segments:
            return self.segments
        return (1,) * self.num_layers if self.num_layers < 4 else (1, self.num_layers - 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config(DecoderConfig):
    """GPT-2 (and GPT-3): learned positions, pre-LayerNorm, tanh GELU, tied embedding."""

    kind: Literal["gpt2"] = "gpt2"
    """The family."""
    max_positions: int = 1024
    """Rows of the position embedding: the longest sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BloomConfig(DecoderConfig):
    """BLOOM (arXiv 2211.05100): ALiBi, LayerNorm after the embedding, tied embedding."""

    kind: Literal["bloom"] = "bloom"
    """The family."""
    residual_after_norm: bool = False
    """Take the residual from the LayerNorm's output (apply_residual_connection_post_layernorm)."""


ModelConfig = GPT2Config | BloomConfig
