"""One training step as two compiled programs: gradients of the global batch, then the optimizer's update.

The batch comes as [W, A, b, T]: W workers (mesh axis `data`), A parts that are accumulated, b rows over (`fsdp`,
`expert`), T tokens. Every worker's gradient is computed by a vmap over W, accumulated over A inside it, and reduced
over `data` once, after it: the bytes on `data` do not depend on A. (The usual auto-sharded accumulation puts the whole
all-reduce into the loop.)

Optimizers that talk in bits get the gradient of every worker, and reduce, clip and skip by themselves. In the stages in
which workers do not talk at all ("local") a worker's gradient is taken at its own parameters and is the mean over its
own targets: to know the others' number would be a message.

Otherwise the loss is the sum over all real target tokens of the global batch, divided by their number N, however the
batch is cut: worker w holds W/N times the gradient of its own sum, so that the mean over workers is the gradient. Of a
classifier the targets are the rows' labels, and N is the number of rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.layers.cross_entropy import summed_loss
from dsjax.layers.dropout import sample_keys
from dsjax.layers.random_ltd import Dropping
from dsjax.mesh.layout import BATCH_AXES, Layout
from dsjax.models.config import RandomLTDConfig
from dsjax.models.tree import ModelTree, joined
from dsjax.optimizers.api import Measured, StagedTransform, Tree, UpdateInputs
from dsjax.optimizers.guard import first_not_finite
from dsjax.optimizers.workers import keep
from dsjax.setup.state import TrainState

BATCH_SPEC = PartitionSpec("data", None, BATCH_AXES)
Batch = Mapping[str, jax.Array]


def batch_loss(
    model: Any,
    batch: Batch,
    *,
    keys: jax.Array | None = None,
    dropping: Dropping | None = None,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses over real targets (float32) and their number (int32), for rows [B, T].

    Args:
        model: a Transformer.
        batch: tokens, targets [B, T] int32, loss_mask [B, T] bool; in packed rows also segments and positions. Of the
            task classification tokens, segments [B, T] int32, labels [B] int32, loss_mask [B] bool; of pairs of texts
            also token_types [B, T] int32.
        keys: dropout keys [B], or None.
        dropping: the layers that see some tokens only, and how many; None: all see all.
        layout: placement, or None on one device.
    """
    features = _features(model, batch, keys, layout, dropping)
    if model.config.task == "classification":
        losses, _ = _label_losses(model, features, batch, keys, layout)
        return losses.sum(), batch["loss_mask"].sum(dtype=jnp.int32)
    inputs, table, bias = model.logit_inputs(features, layout=layout)
    loss = summed_loss(inputs, table, batch["targets"], batch["loss_mask"], bias, layout)
    return loss, batch["loss_mask"].sum(dtype=jnp.int32)


def _features(
    model: Any, batch: Batch, keys: jax.Array | None, layout: Layout | None, dropping: Dropping | None = None
) -> jax.Array:
    return model.features(
        batch["tokens"],
        segments=batch.get("segments"),
        positions=batch.get("positions"),
        token_types=batch.get("token_types"),
        keys=keys,
        dropping=dropping,
        layout=layout,
    )


def _label_losses(
    model: Any, features: jax.Array, batch: Batch, keys: jax.Array | None, layout: Layout | None
) -> tuple[jax.Array, jax.Array]:
    """A classifier's loss of every row [B], 0 for rows that do not exist, and whether its likeliest class is right."""
    z_BC = model.classify(features, batch["segments"] > 0, keys=keys, layout=layout)
    onehot_BC = jnp.arange(z_BC.shape[-1]) == batch["labels"][:, None]
    losses = jax.nn.logsumexp(z_BC, axis=-1) - jnp.where(onehot_BC, z_BC, 0).sum(-1)
    right = (z_BC.argmax(-1) == batch["labels"]) & batch["loss_mask"]
    return jnp.where(batch["loss_mask"], losses, 0), right


def make_gradient(
    model: ModelTree,
    layout: Layout,
    *,
    per_worker: bool,
    dropout: bool,
    local: bool = False,
    random_ltd: RandomLTDConfig | None = None,
    num_kept: int | None = None,
) -> Callable[..., tuple[Tree, dict[str, jax.Array]]]:
    """The gradient program: (params, run key, step, batch [W, A, b, T], frozen, shift, counts) -> (gradients, metrics).

    `frozen` are parameters that have no gradient, None when there are none; `shift` is what every worker's parameters
    differ by from `params`, [W, ...] ([S, W, ...] for a stack), None when they do not; `counts` is int32 [2], how many
    positions of a row are real and how many of these are kept, None when nothing is dropped.

    Args:
        model: the model taken apart.
        layout: the mesh and its ZeRO stage.
        per_worker: True: gradients keep their first dimension W, sharded over `data`, and nothing but scalars crosses
            `data`. False: they are averaged over it.
        dropout: whether to draw dropout keys.
        local: workers do not talk: loss and tokens are [W], a worker's gradient the mean over its own targets.
        random_ltd: which layers drop tokens.
        num_kept: slots for the tokens that these see, at most T; None: nothing is dropped.

    Returns:
        gradients in their ZeRO shards, and metrics: loss (mean over targets), worker_loss [W], tokens (number of real
        targets, int32).
    """
    gradient_specs, parameter_specs = model.specs(layout.gradient), model.specs(layout.parameter)

    def sharded(tree: Tree) -> Tree:
        return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, layout.named(s)), tree, gradient_specs)

    def loss(
        params: Tree, part: Batch, key: jax.Array, step: jax.Array, frozen: Tree | None, counts: jax.Array | None
    ) -> jax.Array:
        merged = nnx.merge(model.graph, joined(params, frozen))
        keys = sample_keys(key, step, part["sample_ids"]) if dropout or num_kept is not None else None
        dropping = None
        if num_kept is not None:
            assert keys is not None and random_ltd is not None and counts is not None
            layers = random_ltd.layers(merged.config.num_layers)
            dropping = Dropping(keys, layers, num_kept, length=counts[0], kept=counts[1])
        return batch_loss(merged, part, keys=keys if dropout else None, dropping=dropping, layout=layout)[0]

    def shifted(param: jax.Array, shift: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(param + shift, layout.named(spec))

    def worker(params: Tree, parts: Batch, shift: Tree | None, *same: Any) -> tuple[Tree, jax.Array]:
        """Gradient and loss of one worker's rows [A, b, T], as sums over its tokens; `same` as `loss` wants it."""
        if shift is not None:
            params = jax.tree.map(shifted, params, shift, parameter_specs)
        value_and_grad = jax.value_and_grad(loss)
        if parts["tokens"].shape[0] == 1:
            value, gradient = value_and_grad(params, {name: x[0] for name, x in parts.items()}, *same)
            return sharded(gradient), value

        def accumulate(total, part):
            value, gradient = value_and_grad(params, part, *same)
            return sharded(jax.tree.map(jnp.add, total, sharded(gradient))), value

        zeros = sharded(jax.tree.map(jnp.zeros_like, params))
        total, values = jax.lax.scan(accumulate, zeros, parts)
        return total, values.sum()

    def gradient(
        params: Tree,
        key: jax.Array,
        step: jax.Array,
        batch: Batch,
        frozen: Tree | None = None,
        shift: Tree | None = None,
        counts: jax.Array | None = None,
    ):
        num_workers, num_parts, rows = batch["tokens"].shape[:3]
        if dropout or num_kept is not None:
            ids = jnp.arange(num_workers * num_parts * rows, dtype=jnp.int32).reshape(num_workers, num_parts, rows)
            batch = {**batch, "sample_ids": jax.lax.with_sharding_constraint(ids, layout.named(BATCH_SPEC))}
        counted = tuple(range(int(local), batch["loss_mask"].ndim))
        tokens = batch["loss_mask"].sum(axis=counted, dtype=jnp.int32)
        per_token = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        workers_dim = None if shift is None else jax.tree.map(int, model.stacked)
        each_worker = jax.vmap(worker, in_axes=(None, 0, workers_dim, *[None] * 4), spmd_axis_name="data")
        gradients, losses = each_worker(params, batch, shift, key, step, frozen, counts)
        if local:
            each = lambda g: g * per_token.reshape(-1, *[1] * (g.ndim - 1))
            return jax.tree.map(each, gradients), {"loss": losses * per_token, "tokens": tokens}
        if per_worker:
            gradients = jax.tree.map(lambda g: g * (num_workers * per_token), gradients)
        else:
            gradients = sharded(jax.tree.map(lambda g: g.sum(0) * per_token, gradients))
        metrics = {"loss": losses.sum() * per_token, "worker_loss": losses * per_token * num_workers, "tokens": tokens}
        return gradients, metrics

    return gradient


def squared_norms(model: ModelTree, gradients: Tree) -> Tree:
    """The squared norm of every tensor, float32; of a stack one number per layer."""

    def squares(gradient: jax.Array, is_stack: bool) -> jax.Array:
        dims = tuple(range(int(is_stack), gradient.ndim))
        return jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=dims)

    return jax.tree.map(squares, gradients, model.stacked)


def make_update(
    model: ModelTree, optimizer: StagedTransform, stage: str, *, clip_norm: float, ema_decay: float
) -> Callable[[TrainState, Tree, jax.Array, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """The update program of a stage: (state, gradients, loss, learning rate) -> (state, metrics).

    A step whose gradient or loss is not finite changes nothing but the step's number. Figures: grad_norm (before
    clipping), finite (bool), first_bad (number of the first tensor that is not finite, -1 if all are), and what
    Measured has beside these. In a stage in which workers do not talk they are [W], and a worker skips by itself.
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
        metrics |= {name: figure for name, figure in optional.items() if figure is not None}
        return TrainState(state.step + 1, params, opt_state, state.key, ema), metrics

    return update


def make_evaluate(model: ModelTree, layout: Layout) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """The evaluation program: (params, rows [B, T] over data, fsdp, expert) -> sums over the real targets.

    These are loss, count (the number of targets) and, of a classifier, correct (how many are the likeliest class).
    """
    rows_everywhere = dataclasses.replace(layout, batch_axes=("data", *BATCH_AXES))

    def evaluate(params: Tree, batch: Batch, frozen: Tree | None = None) -> dict[str, jax.Array]:
        merged = nnx.merge(model.graph, joined(params, frozen))
        if merged.config.task != "classification":
            loss, count = batch_loss(merged, batch, layout=rows_everywhere)
            return {"loss": loss, "count": count}
        features = _features(merged, batch, None, rows_everywhere)
        losses, right = _label_losses(merged, features, batch, None, rows_everywhere)
        sums = {"count": batch["loss_mask"], "correct": right}
        return {"loss": losses.sum(), **{name: x.sum(dtype=jnp.int32) for name, x in sums.items()}}

    return evaluate
