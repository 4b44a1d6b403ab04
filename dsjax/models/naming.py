"""Names of tensors outside the program: one per layer, with the layer's number.

Inside, the layers at one position of a segment are one array of a stack ('segments', 1, 0, 'mlp', 'up', 'kernel'); in
checkpoints and in Hugging Face folders there is 'layers.3.mlp.up.kernel', so that a model may be cut anew.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from dsjax.layers.weight import tensor_path
from dsjax.mesh.tree import Tree
from dsjax.models.stack import Segments, layer_numbers


def leaf_names(tree: Tree, segments: Segments) -> list[tuple[list[str], bool]]:
    """For each leaf its names in a checkpoint (one a layer) and whether its first dimension counts layers."""
    numbers, names = layer_numbers(segments), []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        parts = tensor_path(jax.tree_util.keystr(path, simple=True, separator=".").split("."))
        if "segments" not in parts:
            names.append(([".".join(parts)], False))
            continue
        at = parts.index("segments")
        head, (i, j), tail = parts[:at], map(int, parts[at + 1 : at + 3]), parts[at + 3 :]
        names.append(([".".join([*head, "layers", str(number), *tail]) for number in numbers[i][j]], True))
    return names


def to_named(tree: Tree, segments: Segments) -> dict[str, jax.Array]:
    """A tree as a flat dict of one layer's tensors by name; new buffers, so the tree may be donated afterwards."""
    names = leaf_names(tree, segments)

    @jax.jit
    def split(leaves):
        flat = {}
        for (layers, is_stack), leaf in zip(names, leaves, strict=True):
            flat.update({name: leaf[i] if is_stack else _copy(leaf) for i, name in enumerate(layers)})
        return flat

    return split(jax.tree.leaves(tree))


def _copy(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.copy(jax.random.key_data(leaf)))
    return jnp.copy(leaf)


def abstract_named(tree: Tree, segments: Segments) -> dict[str, jax.ShapeDtypeStruct]:
    """The result of `to_named` as shapes with shardings."""
    flat = {}
    for (layers, is_stack), leaf in zip(leaf_names(tree, segments), jax.tree.leaves(tree), strict=True):
        sharding, shape = leaf.sharding, leaf.shape
        if is_stack:
            sharding, shape = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])), shape[1:]
        flat.update({name: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding) for name in layers})
    return flat


def from_named(take: Callable[[str], jax.Array], abstract: Tree, segments: Segments) -> Tree:
    """The inverse of `to_named`, onto the shardings of `abstract`.

    A stack is filled in place, layer by layer: beside it only one layer's tensor is held.

    Args:
        take: gives a tensor by its name, once, and does not keep it.
        abstract: the tree, as shapes with shardings.
        segments: of the model.
    """
    leaves = []
    for (layers, is_stack), leaf in zip(leaf_names(abstract, segments), jax.tree.leaves(abstract), strict=True):
        if not is_stack:
            leaves.append(jax.device_put(take(layers[0]), leaf.sharding))
            continue
        stack = _empty(leaf.shape, leaf.dtype, leaf.sharding)
        for i, name in enumerate(layers):
            stack = _filled(stack, take(name), np.int32(i), leaf.sharding)
        leaves.append(stack)
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _filled(stack: jax.Array, layer: jax.Array, i: jax.Array, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0), sharding)
