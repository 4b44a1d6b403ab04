"""The interface of a model, of a Transformer or any other: what the rooms above `models` ask of one.

Its settings are a `dsjax.models.config.ModelConfig`. Before it is built it has a `Description`, from which `plan` and
the checks of mesh and rows take what they need. Built, it is a `Model`: an `nnx.Module` whose parameters name their
dimensions (layers/parameter.py), which is enough for ModelTree, shardings, checkpoints and optimizers. Objectives ask
for more: all of them for `features` and, where layers give statistics, `auxiliary`; those of language models for
`logit_inputs`, that of classes for `classify`. models/transformer.py has all four.
"""

from typing import Protocol, Self

from dsjax.mesh.layout import Layout
from dsjax.models.config import ModelConfig
from dsjax.models.families.config import Remat
from dsjax.models.stack import Segments


class Description(Protocol):
    """All that is known of a model without building it; an Architecture is that of a Transformer."""

    @property
    def max_positions(self) -> int:
        """The longest row; 0 when there is no limit."""
        ...

    @property
    def causal(self) -> bool:
        """Whether a position sees only those before it, so that a language model predicts the next token."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the logits use the table embed.table, whose gradient then has two parts."""
        ...

    @property
    def model_dim(self) -> int:
        """D, width of the features of a position."""
        ...

    @property
    def attention_dim(self) -> int:
        """H * K, over which the scores of a layer are sums; 0 when nothing grows with the square of the length."""
        ...

    def segments(self, lengths: tuple[int, ...]) -> Segments:
        """Kinds and numbers of its layers, cut as the config's `segment_lengths` say; () without a stack of layers."""
        ...

    @property
    def divided_by_tensor(self) -> dict[str, int]:
        """The sizes that mesh.tensor has to divide, by their keys in the config."""
        ...

    def on_one_device(self, tensor: int) -> Self:
        """The part that one of `tensor` devices computes."""
        ...

    def sums_over_tensor(self, layout: Layout, *, remat: Remat) -> float:
        """The activations [b, T, D] that a micro-batch sums over `tensor`, forward and backward."""
        ...


class Model(Protocol):
    """A model that is built, or abstract."""

    @property
    def config(self) -> ModelConfig:
        """Its settings."""
        ...

    @property
    def segment_specs(self) -> Segments:
        """Kinds and numbers of its layers, whose parameters are at ('segments', i, j, ...); () without such a stack."""
        ...
