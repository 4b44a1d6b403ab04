"""Tables of the placement of tensors: tensor, shape, spec, bytes per device."""

import dataclasses
import math

import jax
from jax.sharding import NamedSharding
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class TensorPlacement:
    """One tensor: its name, global shape, dtype, spec and the bytes that one device holds."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def path_name(path: tuple) -> str:
    """A readable name of a leaf, such as 'segments/1/mlp/up/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def placements(tree) -> list[TensorPlacement]:
    """One row per leaf of a tree of arrays or ShapeDtypeStructs with NamedShardings.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.sharding import Mesh, PartitionSpec
        >>> sharding = NamedSharding(Mesh(jax.devices()[:1], "data"), PartitionSpec())
        >>> placements({"w": jax.device_put(jnp.zeros((2, 3)), sharding)})[0].bytes_per_device
        24
    """
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        local = leaf.sharding.shard_shape(leaf.shape)
        spec = str(tuple(leaf.sharding.spec)) if isinstance(leaf.sharding, NamedSharding) else "-"
        size = math.prod(local) * leaf.dtype.itemsize
        rows.append(TensorPlacement(path_name(path), tuple(leaf.shape), str(leaf.dtype), spec, size))
    return rows


def placement_table(tree, *, title: str = "Parameters", most: int = 40) -> Table:
    """A table for the terminal, at most 100 columns; the largest `most` tensors and the sum of all."""
    rows = sorted(placements(tree), key=lambda row: -row.bytes_per_device)
    table = Table(title=title)
    for heading in ("tensor", "shape", "spec"):
        table.add_column(heading, overflow="fold")
    table.add_column("bytes/device", justify="right")
    for row in rows[:most]:
        table.add_row(row.name, "x".join(map(str, row.shape)) or "()", row.spec, f"{row.bytes_per_device:,}")
    if len(rows) > most:
        table.add_row(f"and {len(rows) - most} more", "", "", f"{sum(r.bytes_per_device for r in rows[most:]):,}")
    table.add_section()
    table.add_row("all", "", "", f"{sum(row.bytes_per_device for row in rows):,}")
    return table
