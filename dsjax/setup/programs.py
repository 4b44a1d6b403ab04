"""The jitted programs of a run: gradients, the updates of the optimizer's stages, evaluation (see step.py).

With random-LTD there is one gradient program per number of slots (`num_kept`), beside the one in which nothing is
dropped; how many tokens are kept in these slots, and how many of a row are real, is given to it (`counts`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jax.stages import Wrapped

from dsjax.mesh.layout import Layout
from dsjax.models.tree import ModelTree
from dsjax.objectives.api import Batch
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.setup.state import TrainState
from dsjax.setup.step import GradientInputs, StepOptions, make_evaluate, make_gradient, make_update


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a run.

    Attributes:
        gradient: GradientInputs -> (gradients, metrics), with nothing dropped.
        updates: stage -> (state, gradients, loss, learning rate) -> (state, metrics); the state is donated.
        evaluate: (params, batch) -> sums over the real targets.
        local: as gradient, for local and sync stages; None if there are none.
        dropping: num_kept -> (gradient, local) with as many slots, made by the first call; None without random-LTD.
        frozen: parameters that are not trained, None if there are none.
    """

    gradient: Wrapped
    updates: Mapping[str, Wrapped]
    evaluate: Callable
    local: Wrapped | None = None
    dropping: Callable[[int], tuple[Wrapped, Wrapped | None]] | None = None
    frozen: Tree | None = None

    def gradient_for(self, optimizer: StagedTransform, stage: str, *, num_kept: int | None = None) -> Wrapped:
        """The jitted program of the gradients that an update of this stage wants: one object for a stage and num_kept.

        Args:
            optimizer: the optimizer.
            stage: of its stages.
            num_kept: slots for the tokens that random-LTD's layers see, static; None: nothing is dropped.

        Raises:
            ValueError: num_kept is given, but these programs were made without random_ltd.
        """
        gradient, local = self.gradient, self.local
        if num_kept is not None:
            if self.dropping is None:
                raise ValueError(f"num_kept = {num_kept} drops tokens, but make_programs was given no random_ltd")
            gradient, local = self.dropping(num_kept)
        if stage not in optimizer.local:
            return gradient
        assert local is not None
        return local

    def gradient_inputs(
        self,
        optimizer: StagedTransform,
        stage: str,
        state: TrainState,
        batch: Batch,
        *,
        counts: jax.Array | np.ndarray | None = None,
    ) -> GradientInputs:
        """Arguments of `gradient_for`'s program; of shapes too, to lower it."""
        shift = None
        if stage in optimizer.local:
            assert optimizer.shift is not None
            shift = optimizer.shift(state.opt_state)
        return GradientInputs(state.params, state.key, state.step, batch, self.frozen, shift, counts)

    def with_frozen(self, frozen: Tree | None) -> "Programs":
        """The same with parameters that are not trained, which gradients and evaluate take beside params."""
        if frozen is None:
            return self
        evaluate = lambda params, batch: self.evaluate(params, batch, frozen)
        return dataclasses.replace(self, evaluate=evaluate, frozen=frozen)


def make_programs(
    model: ModelTree, optimizer: StagedTransform, layout: Layout, shardings: TrainState, options: StepOptions
) -> Programs:
    """Jit the programs with their layouts; each is compiled by its first call, or ahead, by setup/dispatch.py."""
    whole, each = layout.named(PartitionSpec()), layout.named(PartitionSpec("data"))

    @functools.cache
    def gradients(num_kept: int | None) -> tuple[Wrapped, Wrapped | None]:
        return _gradient_programs(model, optimizer, layout, options, num_kept)

    updates = {}
    for stage in optimizer.updates:
        update = make_update(model, optimizer, stage, clip_norm=options.clip_norm, ema_decay=options.ema_decay)
        metrics = whole
        if stage in optimizer.local:
            metrics = dict.fromkeys(("grad_norm", "finite", "first_bad"), each)
            metrics |= {} if stage in optimizer.no_collectives else {"worker_skips": whole}
        updates[stage] = jax.jit(update, donate_argnums=0, out_shardings=(shardings, metrics))
    evaluate = jax.jit(make_evaluate(model, layout, options.objective), out_shardings=whole)
    gradient, local = gradients(None)
    return Programs(gradient, updates, evaluate, local, None if options.random_ltd is None else gradients)


def _gradient_programs(
    model: ModelTree, optimizer: StagedTransform, layout: Layout, options: StepOptions, num_kept: int | None
) -> tuple[Wrapped, Wrapped | None]:
    """The gradient program, and that of local and sync stages, if there are such."""
    make = functools.partial(make_gradient, model, layout, options, num_kept=num_kept)
    per_worker = optimizer.gradients == "per_worker"
    gradient_shardings = jax.tree.map(
        lambda spec: layout.named(PartitionSpec("data", *spec) if per_worker else spec),
        model.specs(layout.gradient),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    whole, each = layout.named(PartitionSpec()), layout.named(PartitionSpec("data"))
    # Of the auxiliary metrics, whose names the objective gives, all alike.
    metrics = {"loss": whole, "worker_loss": each, "tokens": whole, "auxiliary": whole}
    gradient = jax.jit(make(per_worker=per_worker), out_shardings=(gradient_shardings, metrics))
    if not optimizer.local:
        return gradient, None
    local, metrics = make(per_worker=True, local=True), dict.fromkeys(("loss", "tokens", "auxiliary"), each)
    return gradient, jax.jit(local, out_shardings=(gradient_shardings, metrics))
