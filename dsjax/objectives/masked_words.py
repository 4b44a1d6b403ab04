"""Masked language modelling (arXiv 1810.04805): the cross-entropy of hidden tokens; data/rows/masked.py hides them."""

from dsjax.models.config import ModelConfig
from dsjax.models.families.family import architecture_of
from dsjax.objectives.language_model import LanguageModel


class MaskedWords(LanguageModel):
    """The hidden tokens, which a model that sees both sides guesses: the loss of a language model on other rows."""

    name = "masked"
    targets = "hidden tokens"

    def trains(self, config: ModelConfig) -> bool:
        """See `Objective`."""
        return config.task == "language_model" and not architecture_of(config).causal
