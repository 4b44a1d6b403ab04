"""The settings that all transformers have in common; each family has a dataclass of its own in its folder."""

import dataclasses
import numbers
from typing import Any, Literal

_NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
Remat = Literal["none", "dots", "full"]
Task = Literal["language_model", "classification", "embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Settings of a transformer of any family."""

    kind: str
    """The family."""
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
    """Values of a block recomputed in the backward pass: none but gathered weights, all but matrix products, or all."""
    task: Task = "language_model"
    """The head on top: logits over the vocabulary, logits of classes, or one unit vector per text."""
    num_labels: int = 2
    """Classes of the task `classification`."""
    init_from: str = ""
    """Where the first weights come from: a Hugging Face folder or a GGUF file. '' draws them."""
    segments: tuple[int, ...] = ()
    """Lengths of segments of layers, in order; () means (1, L-2, 1), below 4 layers all ones, which are not scanned."""

    def __post_init__(self) -> None:
        self._check_types()
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.head_size * self.num_heads != self.model_dim and not self.heads_are_free:
            raise ValueError(f"num_heads must divide model_dim; got {self.num_heads} and {self.model_dim}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.segments and (min(self.segments) < 1 or sum(self.segments) != self.num_layers):
            raise ValueError(
                f"segments must be positive and add up to num_layers = {self.num_layers}; got {self.segments}"
            )

    def _check_types(self) -> None:
        """A run file's values are checked when it is read; those of a config.json come here as they are."""
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), _NUMBERS.get(field.type)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be true or false; got {value!r}")
            if wanted and (not isinstance(value, wanted) or isinstance(value, bool)):
                kind = "whole number" if field.type is int else "number"
                raise ValueError(f"{field.name} must be a {kind}; got {value!r}")

    @property
    def head_size(self) -> int:
        """K, the size of a head."""
        return self.model_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """G, the number of heads of keys and values."""
        return self.num_heads

    @property
    def heads_are_free(self) -> bool:
        """Whether the heads together may be wider or narrower than the residual stream."""
        return False

    @property
    def hidden_dim(self) -> int:
        """F, the MLP's hidden width, with the default filled in."""
        return self.mlp_dim or 4 * self.model_dim

    @property
    def filled_in(self) -> dict[str, int]:
        """The sizes whose 0 means another size, by their keys; a family need not have all of these."""
        return {"mlp_dim": self.hidden_dim, "num_kv_heads": self.kv_heads, "head_dim": self.head_size}

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """The segments with the default filled in, such as (1, 10, 1)."""
        if self.segments:
            return self.segments
        return (1,) * self.num_layers if self.num_layers < 4 else (1, self.num_layers - 2, 1)
