"""TrainState: everything a run needs to go on, as one tree of arrays, made on its shards."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsjax.mesh.layout import Layout
from dsjax.models.tree import ModelTree
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.optimizers.config import OptimizerConfig
from dsjax.optimizers.create import create_optimizer


@dataclasses.dataclass(frozen=True)
class TrainState:
    """State that a training step reads and replaces.

    Attributes:
        step: steps done, int32 scalar.
        params: float32 parameters, nested dicts.
        opt_state: the optimizer's state.
        key: the run's key, from which dropout and dropped tokens are derived; never split.
        ema: moving average of the parameters, or None.
    """

    step: Any
    params: Tree
    opt_state: Tree
    key: Any
    ema: Tree = None


jax.tree_util.register_dataclass(TrainState, data_fields=["step", "params", "opt_state", "key", "ema"], meta_fields=[])


def make_optimizer(config: OptimizerConfig, model: ModelTree, layout: Layout, *, steps: int) -> StagedTransform:
    """The optimizer of a run of so many steps on a layout's mesh."""
    specs = model.specs(layout.optimizer)
    return create_optimizer(config, model.shapes, model.leading, mesh=layout.mesh, specs=specs, steps=steps)


def state_specs(layout: Layout, model: ModelTree, optimizer: StagedTransform, *, ema: bool) -> TrainState:
    """A TrainState of PartitionSpecs; the layout's mesh need not have devices."""
    opt_state = jax.eval_shape(optimizer.init, model.shapes)
    by_zero = model.specs(layout.optimizer)
    return TrainState(
        step=PartitionSpec(),
        params=model.specs(layout.parameter),
        opt_state=optimizer.state_specs(opt_state, by_zero),
        key=PartitionSpec(),
        ema=by_zero if ema else None,
    )


def placed(layout: Layout, specs: Tree) -> Tree:
    """The NamedShardings of a tree of PartitionSpecs."""
    return jax.tree.map(layout.named, specs, is_leaf=is_spec)


def is_spec(leaf: Any) -> bool:
    """Whether it is a PartitionSpec, a leaf of the trees here."""
    return isinstance(leaf, PartitionSpec)


def new_state(params: Tree, optimizer: StagedTransform, run_key: jax.Array, *, ema: bool) -> TrainState:
    """The state before the first step, from its parameters; to be traced.

    Args:
        params: float32.
        optimizer: the optimizer.
        run_key: of dropout and dropped tokens.
        ema: whether an average of the parameters is kept.
    """
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), run_key, average)


def init_state(
    make_params: Callable[[jax.Array], Tree],
    optimizer: StagedTransform,
    shardings: TrainState,
    *,
    seed: int,
) -> TrainState:
    """A fresh state, every array computed where it will lie; equal on every mesh.

    Args:
        make_params: key -> parameters (traced).
        optimizer: the optimizer.
        shardings: of the state; ema None means that none is kept.
        seed: of the initial weights, of dropout and dropped tokens.
    """

    def make() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return new_state(make_params(init_key), optimizer, run_key, ema=shardings.ema is not None)

    return jax.jit(make, out_shardings=shardings)()


def state_around(params: Tree, optimizer: StagedTransform, shardings: TrainState, *, seed: int) -> TrainState:
    """A state that starts from given parameters, which are on their shards already and are donated.

    Args:
        params: float32, in the layout of `shardings.params`.
        optimizer: the optimizer.
        shardings: as for `init_state`.
        seed: of dropout and dropped tokens.
    """

    def make(params: Tree) -> TrainState:
        run_key = jax.random.split(jax.random.key(seed))[1]
        return new_state(params, optimizer, run_key, ema=shardings.ema is not None)

    return jax.jit(make, donate_argnums=0, out_shardings=shardings)(params)


def abstract_state(model: ModelTree, optimizer: StagedTransform, shardings: TrainState) -> TrainState:
    """The state's shapes with their shardings, for restoring into."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=model.shapes,
        opt_state=jax.eval_shape(optimizer.init, model.shapes),
        key=key,
        ema=None if shardings.ema is None else model.shapes,
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
