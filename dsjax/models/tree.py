"""A model as trees of its parameters: shapes, and what is known of each parameter."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.layers.weight import A, B, tensor_path
from dsjax.mesh.tree import Tree
from dsjax.models.model import Model
from dsjax.models.naming import leaf_names
from dsjax.models.stack import Segments


@dataclasses.dataclass(frozen=True)
class ModelTree:
    """A model taken apart: its graph, its parameters' shapes, and what is known of each parameter.

    Attributes:
        graph: nnx graph definition; `nnx.merge(graph, params)` is the model.
        shapes: tree of ShapeDtypeStructs.
        axes: tree of the names of each parameter's dimensions, without the first one of layers, which counts them.
        leading: tree of ints, how many of the first dimensions count tensors: a tensor is one layer's, one expert's.
        segments: kinds and numbers of its layers; () of a model without a stack of layers.
    """

    graph: Any
    shapes: Tree
    axes: Tree
    leading: Tree
    segments: Segments = ()

    @classmethod
    def of(cls, model: Model) -> "ModelTree":
        """Take a model (abstract or real) apart."""
        graph, state = nnx.split(model, nnx.Param)
        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
        axes = nnx.to_pure_dict(
            jax.tree.map(lambda v: v.replace(Names(v.get_metadata("axes"))), state, is_leaf=is_variable)
        )
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.to_pure_dict(state))
        return cls(graph, shapes, axes, jax.tree.map(_leading, axes, shapes), model.segment_specs)

    def part(self, keep: Callable[[str], bool]) -> "ModelTree":
        """The same model's graph with some of its parameters only; `keep` sees names such as "classifier.kernel"."""
        shapes, axes, leading = (part_of(tree, keep) for tree in (self.shapes, self.axes, self.leading))
        return dataclasses.replace(self, shapes=shapes, axes=axes, leading=leading)

    def split(self, trained: Callable[[str], bool] = lambda name: True) -> "tuple[ModelTree, ModelTree | None]":
        """The parts that are trained and that are frozen; None: nothing is frozen. What is not float never is trained.

        Args:
            trained: sees names such as "classifier.kernel", those of a stack as "segments.0.0.mlp.up.kernel".
        """
        floats = {
            _name(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.shapes)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        }
        chosen = lambda name: name in floats and trained(name)
        frozen = self.part(lambda name: not chosen(name))
        return self.part(chosen), frozen if frozen.shapes else None

    def specs(self, choose: Callable[[tuple[str, ...], tuple[int, ...]], PartitionSpec]) -> Tree:
        """One spec per parameter; `choose(axes, shape)` sees one layer's array, a stack gets None in front."""

        def spec(names, shape):
            layers = _layer_dims(names, shape)
            return PartitionSpec(*[None] * layers, *choose(tuple(names), shape.shape[layers:]))

        return jax.tree.map(spec, self.axes, self.shapes)

    def tensor_names(self) -> list[str]:
        """Names of all tensors in the order in which reports count them: one a layer, of experts one each.

        Example:
            >>> from dsjax.models.families.gpt2.config import GPT2Config
            >>> from dsjax.models.families.build import abstract
            >>> ModelTree.of(abstract(GPT2Config(num_layers=12))).tensor_names()[1:4]
            ['final_norm.bias', 'final_norm.scale', 'positions.table']
        """
        names = []
        counted = zip(leaf_names(self.shapes, self.segments), jax.tree.leaves(self.shapes), strict=True)
        for ((layers, is_stack), leaf), leading in zip(counted, jax.tree.leaves(self.leading), strict=True):
            experts = leaf.shape[is_stack:leading]
            names += [name + f"[{','.join(map(str, at))}]" * bool(at) for name in layers for at in np.ndindex(experts)]
        return names

    def matrix_parameters(self, task: str) -> tuple[int, int]:
        """Count the parameters that every token is multiplied with, in the layers and outside: N of observe/flops.py.

        All kernels and adapters but those that see one position of a row (pooler, classifier), and of a language model
        the table of the logits, also where it is the embedding's.

        Args:
            task: of the model's config.
        """
        tables = {"language_model": "unembed" if "unembed" in self.shapes else "embed"}
        in_layers = outside = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.shapes):
            names = _name(path).split(".")
            # A kernel may consist of several arrays.
            kernel = (names[-1] in (A, B) or "kernel" in names[-2:]) and names[0] not in ("pooler", "classifier")
            if kernel and names[0] == "segments":
                in_layers += math.prod(leaf.shape)
            elif kernel or names == [tables.get(task), "table"]:
                outside += math.prod(leaf.shape)
        return in_layers, outside


def count_parameters(model: ModelTree) -> int:
    """The number of values in its tensors."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))


def _name(path: tuple[Any, ...]) -> str:
    """The name of a leaf as `part_of` sees it."""
    return ".".join(tensor_path(jax.tree_util.keystr(path, simple=True, separator=".").split(".")))


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


def _leading(names: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> int:
    """The number of a parameter's first dimensions that count tensors: those of layers and of experts."""
    return _layer_dims(names, shape) + int(names[:1] == ("experts",))


def _layer_dims(names: tuple[str, ...], shape: jax.ShapeDtypeStruct) -> int:
    """1 where a parameter has a first dimension of layers, which has no name, else 0."""
    return len(shape.shape) - len(names)


class Names(tuple):
    """Names of dimensions, as one leaf: a plain tuple would be taken for a tree."""
