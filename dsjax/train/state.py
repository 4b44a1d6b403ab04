"""TrainState: everything a run needs to go on, as one tree of arrays; made on its shards, named for checkpoints."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.mesh.layout import Layout
from dsjax.models.transformer import Transformer
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.optimizers.config import OptimizerConfig
from dsjax.optimizers.create import create_optimizer


@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training step reads and replaces.

    Attributes:
        step: steps done, int32 scalar.
        params: float32 parameters, nested dicts.
        opt_state: the optimizer's state.
        key: the run's key, from which dropout is derived; never split.
        ema: moving average of the parameters, or None.
    """

    step: Any
    params: Tree
    opt_state: Tree
    key: Any
    ema: Tree = None


jax.tree_util.register_dataclass(TrainState, data_fields=["step", "params", "opt_state", "key", "ema"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class ModelTree:
    """A model taken apart: its graph, its parameters' shapes, and what is known of each parameter.

    Attributes:
        graph: nnx graph definition; `nnx.merge(graph, params)` is the model.
        shapes: tree of ShapeDtypeStructs.
        axes: tree of the names of each parameter's dimensions, without the layer dimension of a stack.
        stacked: tree of bools, True where the first dimension counts layers.
    """

    graph: Any
    shapes: Tree
    axes: Tree
    stacked: Tree

    @classmethod
    def of(cls, model: Transformer) -> "ModelTree":
        """Take a model (abstract or real) apart."""
        graph, state = nnx.split(model, nnx.Param)
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
        axes = nnx.to_pure_dict(
            jax.tree.map(lambda v: v.replace(Names(v.get_metadata("axes"))), state, is_leaf=is_variable)
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
        stacked = jax.tree.map(lambda names, shape: len(shape.shape) == len(names) + 1, axes, shapes)
        return cls(graph, shapes, axes, stacked)

    def part(self, keep: Callable[[str], bool]) -> "ModelTree":
        """The same model's graph with some of its parameters only; `keep` sees names such as "classifier.kernel"."""
        return ModelTree(self.graph, *(part_of(tree, keep) for tree in (self.shapes, self.axes, self.stacked)))

    def specs(self, choose: Callable[[tuple[str, ...], tuple[int, ...]], PartitionSpec]) -> Tree:
        """One spec per parameter; `choose(axes, shape)` sees one layer's tensor, a stack gets None in front."""

        def spec(names, shape, is_stack):
            one = choose(tuple(names), shape.shape[is_stack:])
            return PartitionSpec(None, *one) if is_stack else one

        return jax.tree.map(spec, self.axes, self.shapes, self.stacked)

    def matrix_parameters(self, task: str) -> tuple[int, int]:
        """How many parameters every token is multiplied with, in the layers and outside: N of observe/flops.py.

        All kernels and adapters but those that see one position of a row (pooler, classifier), and of a language model
        the table of the logits, also where it is the embedding's.

        Args:
            task: of the model's config.
        """
        tables = {"language_model": "unembed" if "unembed" in self.shapes else "embed"}
        in_layers = outside = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.shapes):
            names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
            kernel = names[-1] in ("kernel", "lora_a", "lora_b") and names[0] not in ("pooler", "classifier")
            if kernel and names[0] == "segments":
                in_layers += math.prod(leaf.shape)
            elif kernel or names == [tables.get(task), "table"]:
                outside += math.prod(leaf.shape)
        return in_layers, outside


def count_parameters(model: ModelTree) -> int:
    """How many numbers its tensors hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))


def part_of(tree: Tree, keep: Callable[[str], bool], *, prefix: str = "") -> Tree:
    """Some leaves of nested dicts, chosen by name.

    Example:
        >>> part_of({"a": {"b": 1, "c": 2}, "d": {"b": 3}}, lambda name: name != "d.b" and name != "a.c")
        {'a': {'b': 1}}
    """
    kept = {}
    for key, branch in tree.items():
        name = f"{prefix}{key}"
        if isinstance(branch, dict):
            branch = part_of(branch, keep, prefix=f"{name}.")
            if branch:
                kept[key] = branch
        elif keep(name):
            kept[key] = branch
    return kept


def joined(first: Tree, second: Tree | None) -> Tree:
    """Two parts of nested dicts as one; None has no leaves.

    Example:
        >>> joined({"a": {"b": 1}}, {"a": {"c": 2}, "d": 3})
        {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    if second is None:
        return first
    whole = dict(first)
    for key, branch in second.items():
        whole[key] = joined(whole[key], branch) if key in whole else branch
    return whole


def make_optimizer(config: OptimizerConfig, model: ModelTree, layout: Layout, *, steps: int) -> StagedTransform:
    """The optimizer of a run of so many steps on a layout's mesh."""
    specs = model.specs(layout.optimizer)
    return create_optimizer(config, model.shapes, model.stacked, mesh=layout.mesh, specs=specs, steps=steps)


class Names(tuple):
    """Names of dimensions, as one leaf: a plain tuple would be taken for a tree."""


def state_shardings(layout: Layout, model: ModelTree, optimizer: StagedTransform, *, ema: bool) -> TrainState:
    """A TrainState of NamedShardings."""
    params = model.specs(layout.parameter)
    opt_state = jax.eval_shape(optimizer.init, model.shapes)
    specs = TrainState(
        step=PartitionSpec(),
        params=params,
        opt_state=optimizer.state_specs(opt_state, model.specs(layout.optimizer)),
        key=PartitionSpec(),
        ema=model.specs(layout.optimizer) if ema else None,
    )
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), specs, is_leaf=is_spec)


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
        shardings: from `state_shardings`; ema None means that none is kept.
        seed: of the initial weights and of dropout.
    """

    def make() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = make_params(init_key)
        ema = None if shardings.ema is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), run_key, ema)

    return jax.jit(make, out_shardings=shardings)()


def state_around(params: Tree, optimizer: StagedTransform, shardings: TrainState, *, seed: int) -> TrainState:
    """A state that starts from given parameters, which are on their shards already and are donated.

    Args:
        params: float32, in the layout of `shardings.params`.
        optimizer: the optimizer.
        shardings: as for `init_state`.
        seed: of dropout.
    """

    def make(params: Tree) -> TrainState:
        run_key = jax.random.split(jax.random.key(seed))[1]
        ema = None if shardings.ema is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), run_key, ema)

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
