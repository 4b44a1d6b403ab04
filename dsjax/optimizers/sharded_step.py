"""Helpers for your own training step inside `jax.shard_map`, beside an optimizer of transforms.py.

The gradient of this worker alone, the specs of a state that is partly each worker's own, and the parameters at which a
worker takes its gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.collectives.one_bit import Feedback
from dsjax.optimizers.algorithms.zero_one_adam import Displaced
from dsjax.optimizers.workers import Tree


@dataclasses.dataclass(frozen=True)
class PerWorker:
    """A tree of arrays that differ between workers, with a dimension W in front: see `per_worker`."""

    value: Tree


jax.tree_util.register_dataclass(PerWorker)


def worker_grads(loss: Callable, axis: str = "data") -> Callable:
    """Like jax.value_and_grad, but inside a shard_map the gradient of this worker's loss alone.

    `jax.grad` of parameters that all workers share is summed over them in float32 before it is returned, and there is
    nothing left to compress.

    Args:
        loss: (params, ...) -> scalar, of this worker's part of the batch.
        axis: the workers' mesh axis.

    Returns:
        (params, ...) -> (loss, gradients).
    """

    def value_and_grad(params: Tree, *args: Any, **kwargs: Any) -> tuple[jax.Array, Tree]:
        varying = jax.tree.map(
            lambda p: p if axis in jax.typeof(p).manual_axis_type.varying else jax.lax.pcast(p, axis, to="varying"),
            params,
        )
        return jax.value_and_grad(loss)(varying, *args, **kwargs)

    return value_and_grad


def state_specs(state: Tree, *, axis: str = "data") -> Tree:
    """The PartitionSpecs of an optimizer's state: what differs between workers is split over their axis.

    Args:
        state: from `init`; also of optax wrappers around one of these transforms.
        axis: the workers' mesh axis.
    """
    apart = lambda node: isinstance(node, Feedback | Displaced | PerWorker)
    split = lambda node: jax.tree.map(lambda _: PartitionSpec(axis), node)
    return jax.tree.map(lambda node: split(node) if apart(node) else PartitionSpec(), state, is_leaf=apart)


def state_shardings(state: Tree, mesh: Mesh, *, axis: str = "data") -> Tree:
    """The same as NamedShardings, for `jax.device_put`, `jax.jit` and checkpoints."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state, axis=axis), is_leaf=is_spec)


def worker_params(params: Tree, state: Tree) -> Tree:
    """The parameters at which this worker takes its gradient: with 0/1 Adam its own, else those that all share.

    Args:
        params: the shared parameters.
        state: the optimizer's state, inside the shard_map.
    """
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Displaced))
    for node in nodes:
        if isinstance(node, Displaced):
            return jax.tree.map(lambda p, shift: (p + shift.squeeze(0)).astype(p.dtype), params, node.shift)
    return params


def per_worker(tx: optax.GradientTransformation, num_workers: int) -> optax.GradientTransformationExtraArgs:
    """Give the gradients that optax.MultiSteps accumulates a dimension of workers, since each has its own.

    Example:
        >>> tx = per_worker(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), 4)
        >>> tx.init({"w": jnp.ones(3)}).acc_grads.value["w"].shape
        (4, 3)
    """
    inner = optax.with_extra_args_support(tx)
    is_multi = lambda node: isinstance(node, optax.MultiStepsState)

    def change(state: Tree, how: Callable[[Any], Any]) -> Tree:
        swap = lambda node: node._replace(acc_grads=how(node.acc_grads)) if is_multi(node) else node
        return jax.tree.map(swap, state, is_leaf=is_multi)

    def init(params: Tree) -> Tree:
        wide = lambda x: jnp.zeros((num_workers, *x.shape), x.dtype)
        return change(inner.init(params), lambda grads: PerWorker(jax.tree.map(wide, grads)))

    def update(updates: Tree, state: Tree, params: Tree | None = None, **extra: Any) -> tuple[Tree, Tree]:
        own = change(state, lambda grads: jax.tree.map(lambda x: x.squeeze(0), grads.value))
        updates, own = inner.update(updates, own, params, **extra)
        return updates, change(own, lambda grads: PerWorker(jax.tree.map(lambda x: x[None], grads)))

    return optax.GradientTransformationExtraArgs(init, update)
