"""The shape of a model, by family. `kind` chooses the family."""

import dataclasses
import numbers
import re
from typing import Any, Literal

_NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}
Remat = Literal["none", "dots", "full"]
Task = Literal["language_model", "classification", "embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """What every family has in common."""

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
    task: Task = "language_model"
    """What is on top: logits over the vocabulary, logits of classes, or one unit vector per text."""
    num_labels: int = 2
    """Classes of the task `classification`."""
    init_from: str = ""
    """Where the first weights come from: a Hugging Face folder or a GGUF file. '' draws them."""
    segments: tuple[int, ...] = ()
    """Lengths of the scanned runs of layers, in order; () means (1, L-2, 1). All ones unrolls the stack."""

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
    def segment_lengths(self) -> tuple[int, ...]:
        """The segments with the default filled in, such as (1, 10, 1)."""
        if self.segments:
            return self.segments
        return (1,) * self.num_layers if self.num_layers < 4 else (1, self.num_layers - 2, 1)


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BloomConfig(TransformerConfig):
    """BLOOM (arXiv 2211.05100): ALiBi, LayerNorm after the embedding, tied embedding."""

    kind: Literal["bloom"] = "bloom"
    """The family."""
    residual_after_norm: bool = False
    """Take the residual from the LayerNorm's output (apply_residual_connection_post_layernorm)."""
    tied_embedding: bool = True
    """Logits use the embedding's table."""


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedConfig:
    """The architecture of existing weights, and what is changed of it; resolved before anything else happens."""

    kind: Literal["pretrained"] = "pretrained"
    """Take the family from the weights."""
    init_from: str
    """A Hugging Face folder or a GGUF file."""
    task: Literal["as_stored", "language_model", "classification", "embedding"] = "as_stored"
    """What is on top; as_stored takes what the weights were made for."""
    num_labels: int = 2
    """Classes of the task `classification`."""
    dropout: float | None = None
    """See the families; null takes what the weights say."""
    attention_dropout: float | None = None
    """See the families; null takes what the weights say."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products."""
    remat: Remat = "none"
    """What a block recomputes in the backward pass."""
    segments: tuple[int, ...] = ()
    """Lengths of the scanned runs of layers, in order; () means (1, L-2, 1)."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): x W becomes x W + (alpha / rank) (x A) B, and only A and B are trained."""

    rank: int = 8
    """Columns of A and rows of B (r)."""
    alpha: float = 16.0
    """The adapter's part is multiplied by alpha / rank."""
    targets: str = r"attention\.(q|v|qkv)\.kernel"
    """Regular expression of the kernels that get an adapter: their whole names without layers.N."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank must be at least 1 and alpha above 0; got {self.rank} and {self.alpha}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets is not a regular expression: {self.targets!r}: {error}") from error

    @property
    def scale(self) -> float:
        """What the adapter's part is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RandomLTDConfig:
    """Random layerwise token dropping (arXiv 2211.11586): in training middle layers see some of a row's tokens."""

    min_kept: int = 128
    """Tokens of a row that the middle layers see in the first step."""
    max_kept: int = 0
    """Tokens that they see in the end; 0 means data.sequence_length: all."""
    steps: int
    """The step at which max_kept is reached; it grows evenly (require_steps)."""
    quantum: int = 16
    """Numbers of kept tokens are multiples of this (seq_per_step)."""
    first_layers: int = 1
    """Layers from the first on that always see all tokens."""
    last_layers: int = 1
    """Layers up to the last that always see all tokens."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.quantum < 1 or min(self.first_layers, self.last_layers) < 0:
            raise ValueError(
                "steps and quantum must be 1 or more, first_layers and last_layers 0 or more; got "
                f"{self.steps}, {self.quantum}, {self.first_layers} and {self.last_layers}"
            )
        if self.min_kept < self.quantum or (self.max_kept and self.max_kept < self.min_kept):
            raise ValueError(
                f"min_kept must be at least quantum and at most max_kept; got min_kept {self.min_kept}, quantum "
                f"{self.quantum} and max_kept {self.max_kept}"
            )

    def dropping_layers(self, num_layers: int) -> int:
        """How many of the layers see some tokens only (L_n).

        Raises:
            ValueError: there is none.
        """
        dropping = num_layers - self.first_layers - self.last_layers
        if dropping < 1:
            raise ValueError(
                f"random_ltd keeps the first {self.first_layers} and the last {self.last_layers} layers whole, but the "
                f"model has {num_layers}; use a deeper model, or fewer first_layers and last_layers"
            )
        return dropping

    def layers(self, num_layers: int) -> range:
        """Numbers of the layers that see some tokens only.

        Raises:
            ValueError: there is none.
        """
        return range(self.first_layers, self.first_layers + self.dropping_layers(num_layers))


ModelConfig = GPT2Config | BloomConfig | LlamaConfig | BertConfig
AnyModelConfig = ModelConfig | PretrainedConfig
"""What a run file may give."""
