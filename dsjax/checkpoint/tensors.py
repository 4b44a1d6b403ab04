"""tensors.json: the contents of a checkpoint by name, so that an error lists all differences from a tree."""

import math
from pathlib import Path
from typing import Any

import jax

from dsjax.checkpoint.manifest import read_json

TENSORS_FILE = "tensors.json"


def describe(tree: Any) -> dict[str, tuple[list[int], str]]:
    """Name -> (shape, dtype) of every leaf of a tree of jax.Array or jax.ShapeDtypeStruct.

    Raises:
        ValueError: a leaf that a checkpoint cannot hold.

    Example:
        >>> describe({"layers": {"0": jax.numpy.zeros((2, 3))}})
        {'layers/0': ([2, 3], 'float32')}
    """
    described = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or leaf.sharding is None:
            kind = "a ShapeDtypeStruct without one" if isinstance(leaf, jax.ShapeDtypeStruct) else type(leaf).__name__
            raise ValueError(f"{name}: expected a jax.Array, or a ShapeDtypeStruct with a sharding; got {kind}")
        if math.prod(leaf.shape) == 0:
            raise ValueError(f"{name}: shape {leaf.shape} has no elements and cannot be stored; leave it out")
        described[name] = (list(leaf.shape), str(leaf.dtype))
    if not described:
        raise ValueError("the tree holds no arrays")
    return described


def read_tensors(folder: Path) -> dict[str, tuple[list[int], str]]:
    """The same of the tensors in one checkpoint's folder.

    Raises:
        ValueError: its tensors.json is missing or damaged.
    """
    if not (folder / TENSORS_FILE).is_file():
        raise ValueError(f"{folder}: no {TENSORS_FILE}: the checkpoint is incomplete")
    return {name: (shape, dtype) for name, (shape, dtype) in read_json(folder / TENSORS_FILE).items()}


def differences(
    saved: dict[str, tuple[list[int], str]], asked: dict[str, tuple[list[int], str]], *, partial: bool
) -> list[str]:
    """One line per tensor that is missing, different or (unless `partial`) not asked for.

    Example:
        >>> differences({"w": ([2], "float32"), "old": ([1], "int32")}, {"w": ([3], "float32")}, partial=False)
        ['only in the checkpoint: old', 'different: w: the checkpoint has float32[2], the model float32[3]']
    """
    lines = [f"missing from the checkpoint: {name}" for name in asked if name not in saved]
    if not partial:
        lines += [f"only in the checkpoint: {name}" for name in saved if name not in asked]
    lines += [
        f"different: {name}: the checkpoint has {_show(*saved[name])}, the model {_show(*asked[name])}"
        for name in asked
        if name in saved and saved[name] != asked[name]
    ]
    return lines


def _show(shape: list[int], dtype: str) -> str:
    return f"{dtype}{shape}"
