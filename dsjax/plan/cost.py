"""FLOPs of the steps of a run, beside dense steps of whole rows (formulas: observe/flops.py)."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float64

from dsjax.models.families.family import architecture_of
from dsjax.observe.flops import Matrices, training_flops
from dsjax.setup.assembly import Setup


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """FLOPs of each step, and of one in which nothing is left out.

    Attributes:
        flops: of each step.
        dense: of a step of whole rows whose layers see all tokens.
    """

    flops: Float64[np.ndarray, " n"]
    dense: float

    @classmethod
    def of(cls, setup: Setup) -> "Cost":
        """The cost of a run."""
        config, schedule, random_ltd = setup.config.model, setup.schedule, setup.config.random_ltd
        layers, others = setup.model.matrix_parameters(config.task)
        if setup.frozen is not None:  # no gradient: 4 FLOPs for each instead of 6
            more_layers, more_others = setup.frozen.matrix_parameters(config.task)
            layers, others = layers + 2 / 3 * more_layers, others + 2 / 3 * more_others
        matrices = Matrices(
            layer_parameters=layers / config.num_layers,
            other_parameters=others,
            num_layers=config.num_layers,
            attention_dim=architecture_of(config).attention_dim,
            dropping_layers=0 if random_ltd is None else len(random_ltd.layers(config.num_layers)),
        )
        rows, length = setup.config.train.batch_size, setup.config.data.sequence_length
        dense = float(training_flops(matrices, rows=rows, length=length, kept=length))
        return cls(training_flops(matrices, rows=schedule.rows, length=schedule.length, kept=schedule.kept), dense)

    @functools.cached_property
    def _spent(self) -> np.ndarray:
        return np.cumsum(self.flops)

    def saving(self, steps: int) -> float:
        """The share saved over the first steps, of as many dense ones."""
        return 1.0 - float(self._spent[steps - 1]) / (self.dense * steps)
