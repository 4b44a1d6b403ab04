"""The settings of models: of those of any family, of weights that exist, of adapters, and of dropped tokens."""

import dataclasses
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Union

from dsjax.models.families.config import Remat, Task
from dsjax.models.families.registry import FAMILIES


class ModelConfig(Protocol):
    """The settings of a model of any family, as the rooms above models ask for them; each is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def kind(self) -> str:
        """The family: a key of FAMILIES."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of different tokens that the model can read."""
        ...

    @property
    def num_layers(self) -> int:
        """The number of equal layers; parameters outside them are not counted to any."""
        ...

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """The numbers of layers that one loop computes; () when there is no stack of layers."""
        ...

    @property
    def filled_in(self) -> dict[str, int]:
        """The sizes that a field of 0 stands for, by the field's name."""
        ...

    @property
    def task(self) -> Task:
        """The head on top."""
        ...

    @property
    def num_labels(self) -> int:
        """Classes of the task `classification`."""
        ...

    @property
    def init_from(self) -> str:
        """Where the first weights come from; '' draws them."""
        ...

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of an activation."""
        ...

    @property
    def attention_dropout(self) -> float:
        """Probability of dropping an attention weight."""
        ...

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of the matrix products."""
        ...

    @property
    def remat(self) -> Remat:
        """Values that a layer recomputes in the backward pass."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedConfig:
    """The architecture of existing weights, and what is changed of it; resolved before anything else happens."""

    kind: Literal["pretrained"] = "pretrained"
    """Take the family from the weights."""
    init_from: str
    """A Hugging Face folder or a GGUF file."""
    task: Literal["as_stored", "language_model", "classification", "embedding"] = "as_stored"
    """The head on top; as_stored takes what the weights were made for."""
    num_labels: int = 2
    """Classes of the task `classification`."""
    dropout: float | None = None
    """See the families; null takes what the weights say."""
    attention_dropout: float | None = None
    """See the families; null takes what the weights say."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products."""
    remat: Remat = "none"
    """Values that a block recomputes in the backward pass."""
    segments: tuple[int, ...] = ()
    """Lengths of segments of layers, in order; () means (1, L-2, 1), below 4 layers all ones."""


# A run file may give any family's settings: for the type checker their common interface, for the loader their union.
if TYPE_CHECKING:
    AnyModelConfig = ModelConfig | PretrainedConfig
else:
    AnyModelConfig = Union[*(family.config for family in FAMILIES.values()), PretrainedConfig]


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
        """The factor of the adapter's part."""
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
        """The number of layers that see some tokens only (L_n).

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
