"""One training step as two compiled programs: gradients of the global batch, then the optimizer's update.

The batch comes as [W, A, b, T]: W workers (mesh axis `data`), A parts that are accumulated, b rows over (`fsdp`,
`expert`), T tokens. Every worker's gradient is computed by a vmap over W, accumulated over A inside it, and reduced
over `data` once, after it: the bytes on `data` do not depend on A. (The usual auto-sharded accumulation puts the whole
all-reduce into the loop.)

Optimizers with compressed communication get the gradient of every worker, and reduce, clip and skip by themselves. In
their local and sync stages, which share the program "local", a worker's gradient is taken at its own parameters and is
the mean over its own targets: the number of the others' targets would take a message.

Otherwise the loss is the sum over all real targets of the global batch, divided by their number N, however the batch is
cut: worker w holds W/N times the gradient of its own sum, so that the mean over workers is the gradient.

Auxiliary losses and metrics (of what layers return beside their output) are those of single micro-batches: that of
micro-batch m, with N_m of the N targets, is weighted by N_m / N. They are not linear in its rows (a balancing loss is a
product of two means), so that the result depends on the number of micro-batches, W times A; on all meshes and
accumulations with the same W A it is equal. In a local program the share is that of the worker's own targets.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.layers.dropout import sample_keys
from dsjax.layers.random_ltd import Dropping
from dsjax.mesh.layout import BATCH_AXES, Layout
from dsjax.models.config import RandomLTDConfig
from dsjax.models.tree import ModelTree, joined
from dsjax.objectives.api import Batch, Objective, micro_batch_loss
from dsjax.optimizers.api import Measured, StagedTransform, Tree, UpdateInputs
from dsjax.optimizers.guard import first_not_finite
from dsjax.optimizers.workers import keep
from dsjax.setup.state import TrainState

BATCH_SPEC = PartitionSpec("data", None, BATCH_AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientInputs:
    """Arguments of a gradient program, one pytree.

    Attributes:
        params: what is trained.
        key: of the run.
        step: number of the step.
        batch: [W, A, b, ...].
        frozen: parameters that have no gradient; None when there are none.
        shift: difference between each worker's parameters and `params`, [W, ...] ([S, W, ...] for a stack); None when
            all have the same.
        counts: int32 [2], how many positions of a row are real and how many of these are kept; None when nothing is
            dropped.
    """

    params: Tree
    key: jax.Array
    step: jax.Array
    batch: Batch
    frozen: Tree | None = None
    shift: Tree | None = None
    counts: jax.Array | np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Choices of a run that change what a step computes.

    Attributes:
        objective: what is minimised.
        clip_norm: largest norm of the gradient, 0 for no bound.
        ema_decay: of the averaged parameters, 0 for none.
        dropout: whether to draw dropout keys.
        random_ltd: which layers drop tokens, None for none.
    """

    objective: Objective
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    dropout: bool = False
    random_ltd: RandomLTDConfig | None = None


def make_gradient(
    model: ModelTree,
    layout: Layout,
    options: StepOptions,
    *,
    per_worker: bool,
    local: bool = False,
    num_kept: int | None = None,
) -> Callable[[GradientInputs], tuple[Tree, dict[str, Any]]]:
    """Make the gradient program: GradientInputs -> (gradients, metrics).

    Args:
        model: the model taken apart.
        layout: the mesh and its ZeRO stage.
        options: what is minimised, and how.
        per_worker: True: gradients keep their first dimension W, sharded over `data`, and nothing but scalars crosses
            `data`. False: they are averaged over it.
        local: for local and sync stages: loss and tokens are [W], a worker's gradient the mean over its own targets.
        num_kept: slots for the tokens that the layers of random-LTD see, at most T; None: nothing is dropped.

    Returns:
        gradients in their ZeRO shards, and metrics: loss (mean over targets, without auxiliary losses), worker_loss
        ([W], but not of a local program; only tests read it), tokens (number of real targets, int32), auxiliary (losses
        and metrics of the layers' statistics by name, each weighted as above).
    """
    sharded = _sharded(model, layout)
    worker = _worker_gradient(model, layout, _loss(model, layout, options, num_kept))

    def gradient(inputs: GradientInputs) -> tuple[Tree, dict[str, Any]]:
        batch = inputs.batch
        num_workers, num_parts, rows = batch["tokens"].shape[:3]
        if options.dropout or num_kept is not None:
            ids = jnp.arange(num_workers * num_parts * rows, dtype=jnp.int32).reshape(num_workers, num_parts, rows)
            batch = {**batch, "sample_ids": jax.lax.with_sharding_constraint(ids, layout.named(BATCH_SPEC))}
        counted = tuple(range(int(local), batch["loss_mask"].ndim))
        tokens = batch["loss_mask"].sum(axis=counted, dtype=jnp.int32)
        per_token = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        workers_dim = None if inputs.shift is None else model.leading
        # in_axes of the vmap, in the shape of its argument: only batch (and shift) have a dimension of workers.
        mapped = GradientInputs(None, None, None, 0, shift=workers_dim)  # pyright: ignore
        each_worker = jax.vmap(worker, in_axes=(mapped,), spmd_axis_name="data")
        gradients, sums = each_worker(dataclasses.replace(inputs, batch=batch))
        losses = sums.pop("loss")
        if local:
            each = lambda g: g * per_token.reshape(-1, *[1] * (g.ndim - 1))
            gradients = jax.tree.map(each, gradients)
            auxiliary = {name: x * per_token for name, x in sums.items()}
            return gradients, {"loss": losses * per_token, "tokens": tokens, "auxiliary": auxiliary}
        if per_worker:
            gradients = jax.tree.map(lambda g: g * (num_workers * per_token), gradients)
        else:
            gradients = sharded(jax.tree.map(lambda g: g.sum(0) * per_token, gradients))
        metrics = {"loss": losses.sum() * per_token, "worker_loss": losses * per_token * num_workers, "tokens": tokens}
        return gradients, metrics | {"auxiliary": {name: x.sum() * per_token for name, x in sums.items()}}

    return gradient


def _sharded(model: ModelTree, layout: Layout) -> Callable[[Tree], Tree]:
    """Make the function that constrains gradients to their ZeRO shards."""
    specs = model.specs(layout.gradient)
    return lambda tree: jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, layout.named(s)), tree, specs)


Loss = Callable[[Tree, Batch, GradientInputs], tuple[jax.Array, dict[str, jax.Array]]]


def _loss(model: ModelTree, layout: Layout, options: StepOptions, num_kept: int | None) -> Loss:
    """Make the loss of one micro-batch [b, T] as sums over its targets: see `micro_batch_loss`."""

    def loss(params: Tree, part: Batch, inputs: GradientInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        module = nnx.merge(model.graph, joined(params, inputs.frozen))
        drawn = options.dropout or num_kept is not None
        keys = sample_keys(inputs.key, inputs.step, part["sample_ids"]) if drawn else None
        dropping = None
        if num_kept is not None:
            assert keys is not None and options.random_ltd is not None and inputs.counts is not None
            layers, counts = options.random_ltd.layers(module.config.num_layers), inputs.counts
            dropping = Dropping(keys, layers, num_kept, length=counts[0], kept=counts[1])
        keys = keys if options.dropout else None
        return micro_batch_loss(options.objective, module, part, keys=keys, dropping=dropping, layout=layout)

    return loss


def _worker_gradient(
    model: ModelTree, layout: Layout, loss: Loss
) -> Callable[[GradientInputs], tuple[Tree, dict[str, jax.Array]]]:
    """Make the gradient and losses of one worker's rows [A, b, T], as sums over its targets."""
    sharded, specs, gradient_of = _sharded(model, layout), model.specs(layout.parameter), jax.grad(loss, has_aux=True)

    def shifted(param: jax.Array, shift: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(param + shift, layout.named(spec))

    def worker(inputs: GradientInputs) -> tuple[Tree, dict[str, jax.Array]]:
        params, parts = inputs.params, inputs.batch
        if inputs.shift is not None:
            params = jax.tree.map(shifted, params, inputs.shift, specs)
        if parts["tokens"].shape[0] == 1:
            gradient, sums = gradient_of(params, {name: x[0] for name, x in parts.items()}, inputs)
            return sharded(gradient), sums

        def accumulate(total: Tree, part: Batch) -> tuple[Tree, dict[str, jax.Array]]:
            gradient, sums = gradient_of(params, part, inputs)
            return sharded(jax.tree.map(jnp.add, total, sharded(gradient))), sums

        total, sums = jax.lax.scan(accumulate, sharded(jax.tree.map(jnp.zeros_like, params)), parts)
        return total, {name: x.sum() for name, x in sums.items()}

    return worker


def squared_norms(model: ModelTree, gradients: Tree) -> Tree:
    """The squared norm of every tensor, float32: of the layers of a stack and of experts one number each."""

    def squares(gradient: jax.Array, first: int) -> jax.Array:
        dims = tuple(range(first, gradient.ndim))
        return jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=dims)

    return jax.tree.map(squares, gradients, model.leading)


def make_update(
    model: ModelTree, optimizer: StagedTransform, stage: str, *, clip_norm: float, ema_decay: float
) -> Callable[[TrainState, Tree, jax.Array, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """The update program of a stage: (state, gradients, loss, learning rate) -> (state, metrics).

    A step whose gradient or loss is not finite changes nothing but the step's number. Metrics: grad_norm (before
    clipping), finite (bool), first_bad (number of the first tensor that is not finite, -1 if all are), and what
    Measured has beside these. [W] in local and sync stages (but for worker_skips), where a worker skips by itself.
    """

    def of_mean(gradients: Tree, state: Tree, inputs: UpdateInputs, loss: jax.Array) -> tuple[Tree, Tree, Measured]:
        squares = squared_norms(model, gradients)
        norm = jnp.sqrt(sum(jnp.sum(x) for x in jax.tree.leaves(squares)))
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        changes, new = optimizer.updates[stage](gradients, state, inputs)
        return changes, keep(finite, new, state), Measured(norm, finite, first_not_finite(jax.tree.leaves(squares)))

    def update(state: TrainState, gradients: Tree, loss: jax.Array, learning_rate: jax.Array):
        inputs = UpdateInputs(params=state.params, learning_rate=learning_rate)
        if optimizer.gradients == "mean":
            changes, opt_state, found = of_mean(gradients, state.opt_state, inputs, loss)
        else:
            changes, opt_state, found = optimizer.updates[stage](gradients, state.opt_state, inputs, loss, clip_norm)
        # Local stages leave shared parameters unchanged; their sync always applies.
        done = jnp.bool_(True) if stage in optimizer.local else found.finite
        params, ema = state.params, state.ema
        if changes is not None:
            params = keep(done, jax.tree.map(jnp.add, params, changes), params)
        if ema is not None:
            ema = keep(done, jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params), ema)
        metrics = {"grad_norm": found.norm, "finite": found.finite, "first_bad": found.first_bad}
        optional = {"variance": found.variance, "worker_skips": found.worker_skips}
        metrics |= {name: metric for name, metric in optional.items() if metric is not None}
        return TrainState(state.step + 1, params, opt_state, state.key, ema), metrics

    return update


def make_evaluate(
    model: ModelTree, layout: Layout, objective: Objective
) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """Make the evaluation program: (params, rows [B, T] over data, fsdp, expert) -> the objective's sums."""
    rows_everywhere = dataclasses.replace(layout, batch_axes=("data", *BATCH_AXES))

    def evaluate(params: Tree, batch: Batch, frozen: Tree | None = None) -> dict[str, jax.Array]:
        module = nnx.merge(model.graph, joined(params, frozen))
        return objective.sums(module, batch, layout=rows_everywhere)[0]

    return evaluate
