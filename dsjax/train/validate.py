"""Validation loss during a run: always the same rows, over all devices."""

import math
from collections.abc import Callable

import jax

from dsjax.data.build import Corpus
from dsjax.data.config import DataConfig
from dsjax.data.pipeline import validation_rows
from dsjax.mesh.layout import Layout
from dsjax.train.config import EvaluateConfig, TrainConfig
from dsjax.train.place import Placement, evaluation_placement
from dsjax.train.programs import Programs
from dsjax.train.state import TrainState


def validation_placement(config: EvaluateConfig, train: TrainConfig, layout: Layout) -> Placement:
    """Where a batch of validation rows lies; as large as a micro-batch unless the config says otherwise.

    Raises:
        ValueError: the devices cannot share it evenly.
    """
    return evaluation_placement(layout, batch_size=config.batch_size or train.batch_size // train.accumulation)


def make_validation(
    corpus: Corpus, data: DataConfig, *, num_rows: int, placement: Placement, programs: Programs
) -> Callable[[TrainState], dict[str, float]] | None:
    """State -> figures over the fixed validation rows; of the averaged parameters if there are.

    These are validation_loss, in nats per target, and of a classifier validation_accuracy. None when the data has no
    validation rows.

    Args:
        corpus: the data.
        data: its config.
        num_rows: how many are used; 0 means all.
        placement: of a batch of them.
        programs: of the run.
    """
    (batch_size,) = placement.grid
    fixed = validation_rows(corpus, data, batch_size=batch_size, num_rows=num_rows, positions=placement.positions)
    batches = [placement(batch) for batch in fixed]
    if not batches:
        return None

    def evaluate(state: TrainState) -> dict[str, float]:
        params = state.params if state.ema is None else state.ema
        sums = jax.device_get([programs.evaluate(params, batch) for batch in batches])
        total = {name: math.fsum(float(batch[name]) for batch in sums) for name in sums[0]}
        count = max(1.0, total["count"])
        names = {"loss": "validation_loss", "correct": "validation_accuracy"}
        return {names[name]: total[name] / count for name in names if name in total}

    return evaluate
