"""Language modelling: the cross-entropy of the next token."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from dsjax.layers.cross_entropy import summed_loss
from dsjax.layers.random_ltd import Dropping
from dsjax.layers.statistics import Statistics
from dsjax.mesh.layout import ONE_DEVICE, Layout
from dsjax.models.config import ModelConfig
from dsjax.models.families.family import architecture_of
from dsjax.objectives.api import Batch, Objective, Sums, features


class LanguageModel(Objective):
    """The next token of every position that counts."""

    name = "language_model"
    targets = "tokens"

    def trains(self, config: ModelConfig) -> bool:
        """See `Objective`."""
        return config.task == "language_model" and architecture_of(config).causal

    def sums(
        self,
        model: Any,
        batch: Batch,
        *,
        keys: Key[Array, " B"] | None = None,
        dropping: Dropping | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Sums, Statistics]:
        """See `Objective`."""
        x_BTD, statistics = features(model, batch, keys=keys, dropping=dropping, layout=layout)
        inputs, table, bias = model.logit_inputs(x_BTD, layout=layout)
        loss = summed_loss(inputs, table, batch["targets"], batch["loss_mask"], bias, layout)
        return {"loss": loss, "count": batch["loss_mask"].sum(dtype=jnp.int32)}, statistics
