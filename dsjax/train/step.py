"""One training step as two compiled programs: gradients of the global batch, then the optimizer's update.

The batch comes as [W, A, b, T]: W workers (mesh axis `data`), A parts that are accumulated, b rows over (`fsdp`,
`expert`), T tokens. Every worker's gradient is computed by a vmap over W, accumulated over A inside it, and reduced
over `data` once, after it: the bytes on `data` do not depend on A. (The usual auto-sharded accumulation puts the whole
all-reduce into the loop.)

Optimizers that talk in bits get the gradient of every worker, and reduce, clip and skip by themselves. In the stages in
which workers do not talk at all ("alone") a worker's gradient is taken at its own parameters and is the mean over its
own targets: to know the others' number would be a message.

Otherwise the loss is the sum over all real target tokens of the global batch, divided by their number N, however the
batch is cut: worker w holds W/N times the gradient of its own sum, so that the mean over workers is the gradient. Of a
classifier the targets are the rows' labels, and N is the number of rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.layers.cross_entropy import summed_loss
from dsjax.layers.dropout import sample_keys
from dsjax.mesh.layout import BATCH_AXES, Layout
from dsjax.optimizers.api import Measured, StagedTransform, Tree, UpdateInputs
from dsjax.optimizers.guard import first_not_finite
from dsjax.optimizers.workers import keep
from dsjax.train.state import ModelTree, TrainState, joined

BATCH_SPEC = PartitionSpec("data", None, BATCH_AXES)
Batch = Mapping[str, jax.Array]


def batch_loss(
    model: Any, batch: Batch, *, keys: jax.Array | None = None, layout: Layout | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses over real targets (float32) and their number (int32), for rows [B, T].

    Args:
        model: a Transformer.
        batch: tokens, targets [B, T] int32, loss_mask [B, T] bool; in packed rows also segments and positions. Of the
            task classification tokens, segments [B, T] int32, labels [B] int32, loss_mask [B] bool; of pairs of texts
            also token_types [B, T] int32.
        keys: dropout keys [B], or None.
        layout: placement, or None on one device.
    """
    features = _features(model, batch, keys, layout)
    if model.config.task == "classification":
        losses, _ = _label_losses(model, features, batch, keys, layout)
        return losses.sum(), batch["loss_mask"].sum(dtype=jnp.int32)
    inputs, table, bias = model.logit_inputs(features, layout=layout)
    loss = summed_loss(inputs, table, batch["targets"], batch["loss_mask"], bias, layout)
    return loss, batch["loss_mask"].sum(dtype=jnp.int32)


def _features(model: Any, batch: Batch, keys: jax.Array | None, layout: Layout | None) -> jax.Array:
    return model.features(
        batch["tokens"],
        segments=batch.get("segments"),
        positions=batch.get("positions"),
        token_types=batch.get("token_types"),
        keys=keys,
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
    model: ModelTree, layout: Layout, *, per_worker: bool, dropout: bool, alone: bool = False
) -> Callable[..., tuple[Tree, dict[str, jax.Array]]]:
    """The gradient program: (params, run key, step, batch [W, A, b, T], frozen, shift) -> (gradients, figures).

    `frozen` are parameters that have no gradient, None when there are none; `shift` is what every worker's parameters
    differ by from `params`, [W, ...] ([S, W, ...] for a stack), None when they do not.

    Args:
        model: the model taken apart.
        layout: the mesh and its ZeRO stage.
        per_worker: True: gradients keep their first dimension W, sharded over `data`, and nothing but scalars crosses
            `data`. False: they are averaged over it.
        dropout: whether to draw dropout keys.
        alone: workers do not talk: loss and tokens are [W], a worker's gradient the mean over its own targets.

    Returns:
        gradients in their ZeRO shards, and figures: loss (mean over targets), worker_loss [W], tokens (number of real
        targets, int32).
    """
    gradient_specs, parameter_specs = model.specs(layout.gradient), model.specs(layout.parameter)

    def sharded(tree: Tree) -> Tree:
        return jax.tree.map(lambda x, s: jax.lax.with_sharding_constraint(x, layout.named(s)), tree, gradient_specs)

    def loss(params: Tree, part: Batch, key: jax.Array, step: jax.Array, frozen: Tree | None) -> jax.Array:
        keys = sample_keys(key, step, part["sample_ids"]) if dropout else None
        return batch_loss(nnx.merge(model.graph, joined(params, frozen)), part, keys=keys, layout=layout)[0]

    def shifted(param: jax.Array, shift: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(param + shift, layout.named(spec))

    def worker(
        params: Tree, key: jax.Array, step: jax.Array, parts: Batch, frozen: Tree | None, shift: Tree | None
    ) -> tuple[Tree, jax.Array]:
        """Gradient and loss of one worker's rows [A, b, T], as sums over its tokens."""
        if shift is not None:
            params = jax.tree.map(shifted, params, shift, parameter_specs)
        value_and_grad = jax.value_and_grad(loss)
        if parts["tokens"].shape[0] == 1:
            value, gradient = value_and_grad(params, {name: x[0] for name, x in parts.items()}, key, step, frozen)
            return sharded(gradient), value

        def accumulate(total, part):
            value, gradient = value_and_grad(params, part, key, step, frozen)
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
    ):
        num_workers, num_parts, rows = batch["tokens"].shape[:3]
        if dropout:
            ids = jnp.arange(num_workers * num_parts * rows, dtype=jnp.int32).reshape(num_workers, num_parts, rows)
            batch = {**batch, "sample_ids": jax.lax.with_sharding_constraint(ids, layout.named(BATCH_SPEC))}
        counted = tuple(range(int(alone), batch["loss_mask"].ndim))
        tokens = batch["loss_mask"].sum(axis=counted, dtype=jnp.int32)
        per_token = 1 / jnp.maximum(tokens, 1).astype(jnp.float32)
        workers_dim = None if shift is None else jax.tree.map(int, model.stacked)
        gradients, losses = jax.vmap(worker, in_axes=(None, None, None, 0, None, workers_dim), spmd_axis_name="data")(
            params, key, step, batch, frozen, shift
        )
        if alone:
            each = lambda g: g * per_token.reshape(-1, *[1] * (g.ndim - 1))
            return jax.tree.map(each, gradients), {"loss": losses * per_token, "tokens": tokens}
        if per_worker:
            gradients = jax.tree.map(lambda g: g * (num_workers * per_token), gradients)
        else:
            gradients = sharded(jax.tree.map(lambda g: g.sum(0) * per_token, gradients))
        figures = {"loss": losses.sum() * per_token, "worker_loss": losses * per_token * num_workers, "tokens": tokens}
        return gradients, figures

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
    """The update program of a stage: (state, gradients, loss, learning rate) -> (state, figures).

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
        # Workers that are alone leave what they share alone; their sync is always done.
        done = jnp.bool_(True) if stage in optimizer.alone else found.finite
        params, ema = state.params, state.ema
        if changes is not None:
            params = keep(done, jax.tree.map(jnp.add, params, changes), params)
        if ema is not None:
            ema = keep(done, jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params), ema)
        figures = {"grad_norm": found.norm, "finite": found.finite, "first_bad": found.first_bad}
        optional = {"variance": found.variance, "worker_skips": found.worker_skips}
        figures |= {name: figure for name, figure in optional.items() if figure is not None}
        return TrainState(state.step + 1, params, opt_state, state.key, ema), figures

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


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs of a run.

    Attributes:
        gradient: (params, key, step, batch) -> (gradients, figures).
        updates: stage -> (state, gradients, loss, learning rate) -> (state, figures); the state is donated.
        evaluate: (params, batch) -> sums over the real targets.
        alone: (params, key, step, batch, shift) -> (gradients, figures), of workers that do not talk; None if there is
            no such stage.
    """

    gradient: Callable
    updates: Mapping[str, Callable]
    evaluate: Callable
    alone: Callable | None = None

    def gradient_of(self, optimizer: StagedTransform, stage: str, state: TrainState, batch: Batch) -> tuple[Tree, dict]:
        """The gradients that an update of this stage wants, and figures."""
        if stage not in optimizer.alone:
            return self.gradient(state.params, state.key, state.step, batch)
        assert self.alone is not None and optimizer.shift is not None
        return self.alone(state.params, state.key, state.step, batch, optimizer.shift(state.opt_state))

    def beside(self, frozen: Tree | None) -> "Programs":
        """The same with parameters that are not trained, which gradient and evaluate take beside params."""
        if frozen is None:
            return self
        return dataclasses.replace(
            self,
            gradient=lambda params, key, step, batch: self.gradient(params, key, step, batch, frozen),
            alone=self.alone and partial(self.alone, frozen=frozen),
            evaluate=lambda params, batch: self.evaluate(params, batch, frozen),
        )


def make_programs(
    model: ModelTree,
    optimizer: StagedTransform,
    layout: Layout,
    shardings: TrainState,
    *,
    clip_norm: float,
    ema_decay: float,
    dropout: bool,
) -> Programs:
    """Jit the programs with their layouts; nothing is compiled until the first call."""
    per_worker = optimizer.gradients == "per_worker"
    specs = model.specs(layout.gradient)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    gradient_shardings = jax.tree.map(
        lambda spec: layout.named(PartitionSpec("data", *spec) if per_worker else spec), specs, is_leaf=is_spec
    )
    whole = layout.named(PartitionSpec())
    figures = {"loss": whole, "worker_loss": layout.named(PartitionSpec("data")), "tokens": whole}
    gradient = jax.jit(
        make_gradient(model, layout, per_worker=per_worker, dropout=dropout),
        out_shardings=(gradient_shardings, figures),
    )
    each = layout.named(PartitionSpec("data"))
    updates = {}
    for stage in optimizer.updates:
        update = make_update(model, optimizer, stage, clip_norm=clip_norm, ema_decay=ema_decay)
        figures = whole
        if stage in optimizer.alone:
            figures = dict.fromkeys(("grad_norm", "finite", "first_bad"), each)
            figures |= {} if stage in optimizer.silent else {"worker_skips": whole}
        updates[stage] = jax.jit(update, donate_argnums=0, out_shardings=(shardings, figures))
    evaluate = jax.jit(make_evaluate(model, layout), out_shardings=whole)
    if not optimizer.alone:
        return Programs(gradient, updates, evaluate)
    by_itself = make_gradient(model, layout, per_worker=True, dropout=dropout, alone=True)

    def of_one(params: Tree, key: jax.Array, step: jax.Array, batch: Batch, shift: Tree, frozen: Tree | None = None):
        return by_itself(params, key, step, batch, frozen, shift)

    alone = jax.jit(of_one, out_shardings=(gradient_shardings, {"loss": each, "tokens": each}))
    return Programs(gradient, updates, evaluate, alone)
