"""What the steps of a run cost in FLOPs, beside dense steps of whole rows (formulas: observe/flops.py)."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float64

from dsjax.models.config import ModelConfig, RandomLTDConfig
from dsjax.models.tree import ModelTree
from dsjax.observe.flops import training_flops
from dsjax.setup.schedule import StepSchedule


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
    def of(
        cls,
        config: ModelConfig,
        model: ModelTree,
        frozen: ModelTree | None,
        schedule: StepSchedule,
        random_ltd: RandomLTDConfig | None,
        *,
        rows: int,
        sequence_length: int,
    ) -> "Cost":
        """The cost of a run.

        Args:
            config: the model.
            model: what is trained of it.
            frozen: the rest, None when all is trained.
            schedule: of the run.
            random_ltd: which layers drop tokens.
            rows: of a whole step.
            sequence_length: of a whole row.
        """
        layers, others = model.matrix_parameters(config.task)
        if frozen is not None:  # no gradient: 4 FLOPs for each instead of 6
            more_layers, more_others = frozen.matrix_parameters(config.task)
            layers, others = layers + 2 / 3 * more_layers, others + 2 / 3 * more_others
        flops = functools.partial(
            training_flops,
            layer_parameters=layers / config.num_layers,
            other_parameters=others,
            num_layers=config.num_layers,
            dropping_layers=0 if random_ltd is None else len(random_ltd.layers(config.num_layers)),
            attention_dim=config.num_heads * config.head_size,
        )
        dense = float(flops(rows=rows, length=sequence_length, kept=sequence_length))
        return cls(flops(rows=schedule.rows, length=schedule.length, kept=schedule.kept), dense)

    @functools.cached_property
    def _spent(self) -> np.ndarray:
        return np.cumsum(self.flops)

    def saving(self, steps: int) -> float:
        """The share saved over the first steps, of as many dense ones."""
        return 1.0 - float(self._spent[steps - 1]) / (self.dense * steps)
