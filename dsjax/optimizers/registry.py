"""The optimizers that there are: a name for each. To add one, write its file in kinds/ and name its dataclass here.

Nothing here imports JAX: the loader of run files makes the union of `optimizer` from this tuple.
"""

from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.optimizers.kinds.base import BaseConfig
from dsjax.optimizers.kinds.lamb import LambConfig
from dsjax.optimizers.kinds.onebit_adam import OneBitAdamConfig
from dsjax.optimizers.kinds.onebit_lamb import OneBitLambConfig
from dsjax.optimizers.kinds.sgd import SGDConfig
from dsjax.optimizers.kinds.zero_one_adam import ZeroOneAdamConfig

OPTIMIZERS: tuple[type[BaseConfig], ...] = (
    AdamWConfig,
    LambConfig,
    SGDConfig,
    OneBitAdamConfig,
    OneBitLambConfig,
    ZeroOneAdamConfig,
)
"""In the order of the reference of keys; the default of a dataclass's `kind` is the optimizer's name."""
