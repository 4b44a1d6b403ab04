"""A model as trees of its parameters: shapes, and what is known of each parameter."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.layers.weight import A, B, tensor_path
from dsjax.models.transformer import Transformer

Tree = Any


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
            names = tensor_path(jax.tree_util.keystr(path, simple=True, separator=".").split("."))
            kernel = names[-1] in ("kernel", A, B) and names[0] not in ("pooler", "classifier")
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
        elif keep(".".join(tensor_path(name.split(".")))):
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


class Names(tuple):
    """Names of dimensions, as one leaf: a plain tuple would be taken for a tree."""
