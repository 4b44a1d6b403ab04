"""Classification of texts: the cross-entropy of each row's label.

B rows, C classes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from dsjax.layers.random_ltd import Dropping
from dsjax.layers.statistics import Statistics
from dsjax.mesh.layout import ONE_DEVICE, Layout
from dsjax.models.config import ModelConfig
from dsjax.objectives.api import Batch, Objective, Sums, features


class Labels(Objective):
    """The label of every row; the targets are rows."""

    name = "classification"
    targets = "labels"

    def trains(self, config: ModelConfig) -> bool:
        """See `Objective`."""
        return config.task == "classification"

    def check(self, config: ModelConfig) -> None:
        """Refuse fewer than two classes.

        Raises:
            ValueError: says how many there are.
        """
        if config.num_labels < 2:
            raise ValueError(f"classification needs model.num_labels of at least 2; got {config.num_labels}")

    def sums(
        self,
        model: Any,
        batch: Batch,
        *,
        keys: Key[Array, " B"] | None = None,
        dropping: Dropping | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Sums, Statistics]:
        """See `Objective`; `accuracy` is the number of rows whose likeliest class is right."""
        x_BTD, statistics = features(model, batch, keys=keys, dropping=dropping, layout=layout)
        z_BC = model.classify(x_BTD, batch["segments"] > 0, keys=keys, layout=layout)
        onehot_BC = jnp.arange(z_BC.shape[-1]) == batch["labels"][:, None]
        losses = jax.nn.logsumexp(z_BC, axis=-1) - jnp.where(onehot_BC, z_BC, 0).sum(-1)
        right = (z_BC.argmax(-1) == batch["labels"]) & batch["loss_mask"]
        sums = {
            "loss": jnp.where(batch["loss_mask"], losses, 0).sum(),
            "count": batch["loss_mask"].sum(dtype=jnp.int32),
            "accuracy": right.sum(dtype=jnp.int32),
        }
        return sums, statistics
