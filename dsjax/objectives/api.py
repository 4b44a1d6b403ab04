"""The interface of an objective: its loss on a micro-batch, and what it makes of the layers' statistics.

A new objective is a file like labels.py, named in registry.py; its rows are those of the format that has its name in
data/rows/formats.py. Its loss is a sum over real targets: a step divides by the number of those in the global batch,
however it is cut. Losses made of statistics are not sums: each is that of one micro-batch (setup/step.py says how they
are weighted).

B rows, T tokens, D model.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dsjax.layers.random_ltd import Dropping
from dsjax.layers.statistics import Auxiliary, Statistics
from dsjax.mesh.layout import ONE_DEVICE, Layout
from dsjax.models.config import ModelConfig

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]


class Objective(Protocol):
    """Objective of a step.

    Attributes:
        name: by which a run chooses it (data.task).
        targets: what is counted, in words, plural.
    """

    name: str
    targets: str

    def trains(self, config: ModelConfig) -> bool:
        """Whether it trains such a model."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Refuse settings of such a model that cannot be trained.

        Raises:
            ValueError: which, and what to do.
        """

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
            sums: loss (float32), count (int32, the number of real targets), and others (int32), whose share of the
                targets evaluation shows: `accuracy` as validation_accuracy.
            statistics: of the layers; empty if they have none.
        """
        ...

    def from_statistics(self, model: Any, statistics: Statistics) -> Auxiliary:
        """Losses and metrics of one micro-batch, of the statistics of all layers: those of the model's layer kinds."""
        return model.auxiliary(statistics)


TAKEN = frozenset(
    {
        "step", "loss", "worker_loss", "grad_norm", "learning_rate", "tokens", "real_tokens", "step_seconds",
        "data_seconds", "tokens_per_second", "validation_loss", "validation_accuracy", "length", "kept", "difficulty",
        "saving", "stall_seconds", "compiled", "mfu", "finite", "first_bad", "first_bad_tensor", "variance", "skipped",
        "worker_skips", "stop",
    }
)  # fmt: skip
"""Names of metrics that a run may have, and that its layers therefore cannot give."""


def micro_batch_loss(
    objective: Objective,
    model: Any,
    batch: Batch,
    *,
    keys: Key[Array, " B"] | None,
    dropping: Dropping | None,
    layout: Layout,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of one micro-batch, summed over its real targets, with the losses of its statistics.

    Returns:
        loss: of the targets, and each auxiliary loss times the number of targets (see setup/step.py).
        shown: the loss of the targets alone, `loss`, and the auxiliary losses and metrics times the number of targets.

    Raises:
        ValueError: a metric has the name of another one.
    """
    sums, statistics = objective.sums(model, batch, keys=keys, dropping=dropping, layout=layout)
    if not statistics:
        return sums["loss"], {"loss": sums["loss"]}
    # A micro-batch without targets has no share, and its statistics may hold no tokens, by whose number losses divide.
    some, count = sums["count"] > 0, sums["count"].astype(jnp.float32)
    found = objective.from_statistics(model, {name: jnp.where(some, x, 1) for name, x in statistics.items()})
    if clash := (TAKEN & {*found.losses, *found.metrics}) | (found.losses.keys() & found.metrics.keys()):
        raise ValueError(f"metrics of layers have names that are taken, {', '.join(sorted(clash))}: rename them")
    weighted = lambda x: jnp.where(some, x.astype(jnp.float32) * count, 0)
    losses = {name: weighted(x) for name, x in found.losses.items()}
    metrics = {name: weighted(x) for name, x in found.metrics.items()}
    return sums["loss"] + sum(losses.values()), {"loss": sums["loss"], **losses, **metrics}


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
    # Rows that tell no documents apart say only where targets are.
    valid = batch["loss_mask"] if segments is None else segments > 0
    return model.features(
        batch["tokens"],
        segments=segments,
        positions=batch.get("positions"),
        token_types=batch.get("token_types"),
        keys=keys,
        valid=valid,
        dropping=dropping,
        layout=layout,
    )
