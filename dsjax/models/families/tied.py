"""The table of a language model's logits: the embedding's own (tied), or one that the model has besides."""

from dsjax.checkpoint.tensor_map import Entry, Unread
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig


def untied_head(config: GPT2Config | BloomConfig | LlamaConfig) -> tuple[Entry, ...]:
    """The logits' own table; a folder may have one also where no logits are asked for.

    Example:
        >>> [entry.theirs for entry in untied_head(GPT2Config(tied_embedding=False))], untied_head(GPT2Config())
        (['lm_head.weight'], ())
    """
    if config.tied_embedding and config.task == "language_model":
        return ()
    return (Entry(("unembed", "table"), "lm_head.weight", optional=config.task != "language_model", prefixed=False),)


def copied_head(config: GPT2Config | BloomConfig | LlamaConfig, table: str) -> tuple[Unread, ...]:
    """The embedding's table, called `table`, that some writers store a second time as that of the logits."""
    return () if untied_head(config) else (Unread("lm_head.weight", same_as=table),)
