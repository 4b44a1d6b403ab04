"""The settings of optimizers as a run file gives them: `kind` chooses."""

from typing import TYPE_CHECKING, Union

from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.optimizers.kinds.base import BaseConfig
from dsjax.optimizers.registry import OPTIMIZERS

# For the type checker what all optimizers have in common, for the loader their union.
if TYPE_CHECKING:
    OptimizerConfig = BaseConfig
else:
    OptimizerConfig = Union[*OPTIMIZERS]

DEFAULT_OPTIMIZER = AdamWConfig
"""That of a run file that names none."""
