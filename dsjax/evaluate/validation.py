"""Validation loss during a run: always the same rows, over all devices."""

import dataclasses
import math
from typing import Any

import jax

from dsjax.data.corpus.build import Corpus
from dsjax.data.rows.pipeline import validation_rows
from dsjax.evaluate.config import EvaluateConfig
from dsjax.mesh.layout import Layout
from dsjax.setup.assembly import Setup
from dsjax.setup.config import TrainConfig
from dsjax.setup.placement import Placement, evaluation_placement
from dsjax.setup.programs import Programs
from dsjax.setup.state import TrainState


def validation_placement(config: EvaluateConfig, train: TrainConfig, layout: Layout) -> Placement:
    """Where a batch of validation rows lies; as large as a micro-batch unless the config says otherwise.

    Raises:
        ValueError: the devices cannot share it evenly.
    """
    return evaluation_placement(layout, batch_size=config.batch_size or train.batch_size // train.accumulation)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Metrics of a state over the fixed validation rows; of the averaged parameters if there are.

    Attributes:
        batches: the rows, placed on the devices.
        programs: of the run.
    """

    batches: list[Any]
    programs: Programs

    def __call__(self, state: TrainState) -> dict[str, float]:
        """validation_loss, in nats per target, and what else the objective counts, as a share of the targets."""
        sums = self._sums(state, self.batches)
        total = {name: math.fsum(float(batch[name]) for batch in sums) for name in sums[0]}
        count = max(1.0, total.pop("count"))
        return {f"validation_{name}": total.pop(name) / count for name in ("loss", *sorted(total.keys() - {"loss"}))}

    def rehearse(self, state: TrainState) -> None:
        """Evaluate one batch: what does not compile or does not fit is found before the first step, not at the last."""
        self._sums(state, self.batches[:1])

    def _sums(self, state: TrainState, batches: list[Any]) -> list[dict[str, Any]]:
        params = state.params if state.ema is None else state.ema
        return jax.device_get([self.programs.evaluate(params, batch) for batch in batches])


def make_validation(setup: Setup, corpus: Corpus, programs: Programs) -> Validation | None:
    """The validation of a run; None when the data has no validation rows.

    Args:
        setup: the run.
        corpus: its data.
        programs: of the run, with the parameters that are not trained.
    """
    config = setup.config
    placement = validation_placement(config.evaluate, config.train, setup.layout)
    (batch_size,), rows = placement.grid, config.evaluate.rows
    positions = placement.positions
    fixed = validation_rows(corpus, config.data, batch_size=batch_size, num_rows=rows, positions=positions)
    batches = [placement(batch) for batch in fixed]
    return Validation(batches, programs) if batches else None
