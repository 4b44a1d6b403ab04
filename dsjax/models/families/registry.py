"""The families that there are: a line for each. To add one, write its folder and its line.

Nothing here imports JAX: the loader of run files makes the union of `model` from these lines.
"""

import dataclasses

from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Registered:
    """Where the two halves of a family are.

    Attributes:
        config: its dataclass, whose field `kind` has the family's name as the default.
        module: dotted name of the module whose FAMILY is the rest (`dsjax.models.families.family.Family`).
    """

    config: type
    module: str


FAMILIES: dict[str, Registered] = {
    "gpt2": Registered(GPT2Config, "dsjax.models.families.gpt2.model"),
    "bloom": Registered(BloomConfig, "dsjax.models.families.bloom.model"),
    "llama": Registered(LlamaConfig, "dsjax.models.families.llama.model"),
    "bert": Registered(BertConfig, "dsjax.models.families.bert.model"),
}
"""kind (where there is one, also Hugging Face's model_type) -> the family."""
