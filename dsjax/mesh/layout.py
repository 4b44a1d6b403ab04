"""Where tensors lie: logical axes -> mesh axes, and the ZeRO stages (arXiv 1910.02054) as PartitionSpecs.

Every parameter names its dimensions (`('embed', 'mlp')`). A `Layout` turns these names into two specs:
  gathered   as the layer computes with it: split over `tensor` only
  sharded    as ZeRO stores it: the same dimension split further, ('tensor', 'fsdp', 'expert'); of experts, which lie on
             `expert` already, over what is left: ('tensor', 'fsdp')
The tensor-parallel dimension carries both, in this order, because then going from one to the other is a single
all-gather; rows over one and columns over the other makes XLA rematerialise the whole tensor.

  ZeRO stage     parameters   gradients   optimizer state
  0              gathered     gathered    gathered
  1              gathered     gathered    sharded
  2              gathered     sharded     sharded
  3              sharded      sharded     sharded
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsjax.mesh.config import AXES

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head": None,
    "mlp": "tensor",
    "experts": "expert",
    "embed": None,
    "qkv": None,
    "positions": None,
    "out": None,
    "labels": None,
    "rank": None,
}
MAY_STAY_WHOLE = {"kv_heads"}
"""Dimensions that are not split where the mesh axis does not divide them: each device then holds all of it."""
BATCH_AXES = ("fsdp", "expert")
"""Mesh axes over which a worker's rows are split."""
ZERO_AXES = ("fsdp", "expert")
"""Mesh axes over which ZeRO splits what would lie on each alike. The same today, but a mesh axis may do one of both."""

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of parameters and activations on a mesh.

    Attributes:
        mesh: the devices.
        zero_stage: what ZeRO splits over fsdp (and expert), 0-3.
        batch_axes: mesh axes over which a worker's rows are split; `data` is added by the vmap over workers.
    """

    places: ClassVar[bool] = True
    """Whether it has an effect on a program at all."""

    mesh: Mesh | AbstractMesh
    zero_stage: int = 0
    batch_axes: tuple[str, ...] = BATCH_AXES

    def gathered(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of a parameter as a layer computes with it.

        Example:
            >>> from jax.sharding import AbstractMesh
            >>> layout = Layout(AbstractMesh((1, 2, 1, 2), ("data", "fsdp", "expert", "tensor")))
            >>> layout.gathered(("embed", "mlp"), (8, 32))
            P(None, 'tensor')
        """
        return PartitionSpec(*self._mesh_axes(axes, shape))

    def sharded(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """The spec of a parameter split by ZeRO: on its tensor dimension if that divides, else the largest that does.

        Of `fsdp` and `expert` it takes the axes that no dimension lies on: experts are split over `fsdp` alone. Where
        no dimension divides, it splits nothing (`dsjax plan --shardings` shows it).

        Example:
            >>> from jax.sharding import AbstractMesh
            >>> layout = Layout(AbstractMesh((1, 2, 2, 2), ("data", "fsdp", "expert", "tensor")))
            >>> layout.sharded(("embed", "mlp"), (8, 32))
            P(None, ('tensor', 'fsdp', 'expert'))
            >>> layout.sharded(("experts", "embed", "mlp"), (4, 8, 32))
            P('expert', None, ('tensor', 'fsdp'))
        """
        taken = self._mesh_axes(axes, shape)
        free = tuple(axis for axis in ZERO_AXES if axis not in taken)
        shards = self.size(free)
        dims = [dim for dim in range(len(axes)) if taken[dim] not in ZERO_AXES]  # a tensor is one expert's
        for dim in sorted(dims, key=lambda dim: (taken[dim] is None, -shape[dim])):
            axis = taken[dim]
            if free and shape[dim] % (shards * (self.mesh.shape[axis] if axis else 1)) == 0:
                spec: list[str | tuple[str, ...] | None] = [*taken]
                spec[dim] = (axis, *free) if axis else free
                return PartitionSpec(*spec)
        return PartitionSpec(*taken)

    def _mesh_axes(self, names: Sequence[str | None], shape: tuple[int, ...]) -> list[str | None]:
        """Per dimension the mesh axis that splits it; of two that want the same axis the first has it."""
        taken: list[str | None] = []
        for name, size in zip(names, shape, strict=True):
            axis = self._mesh_axis(name, size) if name else None
            taken.append(None if axis in taken else axis)
        return taken

    def _mesh_axis(self, name: str, size: int) -> str | None:
        """The mesh axis over which a dimension is split."""
        axis = RULES[name]
        return None if axis is not None and name in MAY_STAY_WHOLE and size % self.mesh.shape[axis] else axis

    def is_split(self, name: str, size: int) -> bool:
        """Whether a dimension of this name and size is split over a mesh axis.

        Example:
            >>> from jax.sharding import AbstractMesh
            >>> layout = Layout(AbstractMesh((1, 1, 1, 4), ("data", "fsdp", "expert", "tensor")))
            >>> layout.is_split("heads", 8), layout.is_split("kv_heads", 2)
            (True, False)
        """
        return self._mesh_axis(name, size) is not None

    def parameter(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """Where the stored parameter lies."""
        return self.sharded(axes, shape) if self.zero_stage >= 3 else self.gathered(axes, shape)

    def gradient(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """Where the accumulated gradient lies."""
        return self.sharded(axes, shape) if self.zero_stage >= 2 else self.gathered(axes, shape)

    def optimizer(self, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
        """Where the optimizer's per-parameter state lies."""
        return self.sharded(axes, shape) if self.zero_stage >= 1 else self.gathered(axes, shape)

    def size(self, mesh_axes: tuple[str, ...]) -> int:
        """The number of devices along some mesh axes together."""
        total = 1
        for axis in mesh_axes:
            total *= self.mesh.shape[axis]
        return total

    def named(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding of a spec on this layout's mesh."""
        return NamedSharding(self.mesh, spec)

    def gather(self, value: jax.Array, axes: Axes) -> jax.Array:
        """Gather a stored parameter for use; its gradient is reduced straight into the gradient's shards."""
        gathered, gradient = self.named(self.gathered(axes, value.shape)), self.named(self.gradient(axes, value.shape))
        # The name lets a remat policy gather again in the backward pass instead of keeping whole weights.
        return checkpoint_name(_gather(value, gathered, gradient), "gathered")

    def hold_gathered(self, value: jax.Array, axes: Axes) -> jax.Array:
        """Hold a gathered weight, and the gradient that comes back for it, to the gathered layout."""
        return jax.lax.with_sharding_constraint(value, self.named(self.gathered(axes, value.shape)))

    def hold_gradient(self, gradient: jax.Array, axes: Axes) -> jax.Array:
        """Hold a parameter's gradient to where gradients lie."""
        return jax.lax.with_sharding_constraint(gradient, self.named(self.gradient(axes, gradient.shape)))

    def activation(self, value: jax.Array, *dims: str | None) -> jax.Array:
        """Split an activation: first dimension over the batch axes, the named ones by the rules, the rest whole.

        Rows are split over those of the batch axes on which no other dimension lies.
        """
        taken = self._mesh_axes(dims, value.shape[1:])
        rows = tuple(axis for axis in self.batch_axes if axis not in taken)
        return jax.lax.with_sharding_constraint(value, self.named(PartitionSpec(rows, *taken)))


class _OneDevice(Layout):
    """Everything lies on the one device that there is: values are returned as they are, and a program shows nothing."""

    places: ClassVar[bool] = False

    def gather(self, value: jax.Array, axes: Axes) -> jax.Array:
        return value

    def hold_gathered(self, value: jax.Array, axes: Axes) -> jax.Array:
        return value

    def hold_gradient(self, gradient: jax.Array, axes: Axes) -> jax.Array:
        return gradient

    def activation(self, value: jax.Array, *dims: str | None) -> jax.Array:
        return value


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, of these sizes.

    Example:
        >>> abstract_mesh({"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}).size
        8
    """
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


ONE_DEVICE: Layout = _OneDevice(abstract_mesh(dict.fromkeys(AXES, 1)))
"""The layout of a program for one device."""


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(value: jax.Array, gathered: NamedSharding, gradient: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, gathered)


def _gather_forward(value: jax.Array, gathered: NamedSharding, gradient: NamedSharding) -> tuple[jax.Array, None]:
    # Not a call of _gather: a remat policy sees only a sharding constraint, not what is inside a custom_vjp.
    return jax.lax.with_sharding_constraint(value, gathered), None


def _gather_backward(
    gathered: NamedSharding, gradient: NamedSharding, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(cotangent, gradient),)


_gather.defvjp(_gather_forward, _gather_backward)
