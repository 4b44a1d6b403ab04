"""The interface of an objective: its loss on a micro-batch, and what it makes of the layers' statistics.

A new objective is a file like labels.py, named in registry.py; its rows are those of the format that has its name in
data/rows/formats.py. Its loss is a sum over real targets: a step divides by
the number of those in the global batch, however it is cut. Losses made of statistics are not sums (a balancing loss is
a product of two means): each is that of one micro-batch, weighted by the micro-batch's share of the real targets, and
therefore depends on how many micro-batches there are (workers W times accumulation A), but not on the mesh otherwise.

B rows, T tokens, D model.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Key

from dsjax.layers.random_ltd import Dropping
from dsjax.layers.statistics import Auxiliary, Statistics
from dsjax.mesh.layout import ONE_DEVICE, Layout
from dsjax.models.config import ModelConfig

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]


class Objective(Protocol):
    """What a step minimises.

    Attributes:
        name: by which a run chooses it (data.task).
        targets: what is counted, in words, plural.
    """

    name: str
    targets: str

    def trains(self, config: ModelConfig) -> bool:
        """Whether it trains such a model."""
        ...

    def sums(
        self,
        model: Any,
        batch: Batch,
        *,
        keys: Key[Array, " B"] | None = None,
        dropping: Dropping | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Sums, Statistics]:
        """Sums over the real targets of some rows, and the layers' statistics.

        Args:
            model: a model that it trains.
            batch: arrays of its row format, [B, ...].
            keys: dropout keys, or None.
            dropping: the layers that see some tokens only, and how many; None: all see all.
            layout: placement on a mesh.

        Returns:
            sums: loss (float32), count (int32, the number of real targets), and what evaluation shows beside the loss
                as a share of the targets (int32).
            statistics: of the layers; empty if they have none.
        """
        ...

    def from_statistics(self, model: Any, statistics: Statistics) -> Auxiliary:
        """Losses and metrics of one micro-batch, of the statistics of all layers: those of the model's layer kinds."""
        return model.auxiliary(statistics)


def features(
    model: Any,
    batch: Batch,
    *,
    keys: Key[Array, " B"] | None,
    dropping: Dropping | None,
    layout: Layout,
) -> tuple[Float[Array, "B T D"], Statistics]:
    """Hidden states of a batch and the layers' statistics."""
    segments = batch.get("segments")
    return model.features(
        batch["tokens"],
        segments=segments,
        positions=batch.get("positions"),
        token_types=batch.get("token_types"),
        keys=keys,
        valid=None if segments is None else segments > 0,
        dropping=dropping,
        layout=layout,
    )
