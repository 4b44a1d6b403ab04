"""A training step as one device sees it, traced from the step's own code: its buffers, residuals and FLOPs.

The model is the config's with heads, hidden width and vocabulary divided by `tensor`, the batch one device's rows; ZeRO
stays in the sharding constraints. Nothing is allocated and no device is touched.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsjax.data.rows.format import RowFormat
from dsjax.mesh.config import AXES
from dsjax.mesh.layout import ZERO_AXES, Layout, abstract_mesh
from dsjax.models.adapters import with_adapters
from dsjax.models.families.build import abstract
from dsjax.models.tree import ModelTree, joined
from dsjax.objectives.api import micro_batch_loss
from dsjax.optimizers.api import Tree, UpdateInputs
from dsjax.plan.jaxpr import aval_bytes, dot_flops, flatten
from dsjax.plan.memory import peak_bytes, residual_bytes
from dsjax.setup.assembly import Setup
from dsjax.setup.state import abstract_state, is_spec, placed, state_specs
from dsjax.setup.step import GradientInputs, StepOptions, make_gradient, make_update

Shapes = dict[str, jax.ShapeDtypeStruct]
_SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def abstract_layout(sizes: dict[str, int], zero_stage: int) -> Layout:
    """A Layout on a mesh without devices."""
    return Layout(abstract_mesh(sizes), zero_stage)


def batch_shapes(format: RowFormat, batch_size: int, *, workers: int, accumulation: int) -> Shapes:
    """The arrays [W, A, b, ...] of a step's batch.

    Example:
        >>> from dsjax.data.rows.packed import PackedFormat
        >>> batch_shapes(PackedFormat(sequence_length=16), 8, workers=2, accumulation=2)["tokens"].shape
        (2, 2, 2, 16)
    """
    spec = format.spec((workers, accumulation, batch_size // (workers * accumulation)))
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in spec.items()}


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The model and the layout of one device: everything divided but by ZeRO.

    Attributes:
        model: the model taken apart, with the shapes that `tensor` leaves.
        layout: a mesh of which only the axes of ZeRO have a size; rows are not split any further.
        batch: one device's rows, [1, A, b, T].
        frozen: the part of the model that is not trained, with its shapes; None when all of it is.
    """

    model: ModelTree
    layout: Layout
    batch: Shapes
    frozen: ModelTree | None = None

    @classmethod
    def of(cls, setup: Setup, batch: Shapes) -> "OneDevice":
        """Divide a run's model and its global batch by the mesh."""
        config, layout, lora = setup.config.model, setup.layout, setup.config.lora
        sizes = dict(layout.mesh.shape)
        tensor = sizes["tensor"]
        graph = setup.model.graph
        if tensor > 1:
            narrow = abstract(config, tensor=tensor)
            graph = ModelTree.of(narrow if lora is None else with_adapters(narrow, lora)).graph
        # What lies on `expert` is divided as ZeRO divides, after the trace: a layer computes with all of its experts.
        left = {axis: 1 if axis in ZERO_AXES else size for axis, size in sizes.items()}
        divided = lambda part: dataclasses.replace(
            part, graph=graph, shapes=local_shapes(part.shapes, part.specs(layout.gathered), left)
        )
        zero = abstract_layout(dict.fromkeys(AXES, 1) | {a: sizes[a] for a in ZERO_AXES}, layout.zero_stage)
        rows = {
            name: jax.ShapeDtypeStruct(
                (1, x.shape[1], x.shape[2] // layout.size(layout.batch_axes), *x.shape[3:]), x.dtype
            )
            for name, x in batch.items()
        }
        return cls(
            divided(setup.model),
            dataclasses.replace(zero, batch_axes=()),
            rows,
            None if setup.frozen is None else divided(setup.frozen),
        )


@dataclasses.dataclass(frozen=True)
class Traced:
    """Measurements of one device's traces.

    Attributes:
        residuals: bytes kept from the forward to the backward pass of one micro-batch.
        gradient_temporary: most bytes that the gradient program holds beside its arguments and results.
        update_temporary: the same of the update program, the largest over the optimizer's stages.
        flops: of the matrix products of a step, with all that is computed again.
    """

    residuals: int
    gradient_temporary: int
    update_temporary: int
    flops: int


def trace(setup: Setup, one: OneDevice) -> Traced:
    """Trace the gradient, the loss's vjp and the updates of one device of a run."""
    model, layout, optimizer = one.model, one.layout, setup.optimizer
    key, step = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
    # Gradients per worker only leave out the sum over the first dimension, which is 1 here.
    gradient = make_gradient(model, layout, setup.options, per_worker=False)
    frozen, frozen_divisors = _frozen(one)
    jaxpr = jax.make_jaxpr(gradient)(GradientInputs(model.shapes, key, step, one.batch, frozen)).jaxpr  # pyright: ignore
    parameters = zero_divisors(model.specs(layout.parameter), layout)
    rest = [*[1] * (len(jaxpr.invars) - len(parameters) - len(frozen_divisors)), *frozen_divisors]
    mean = optimizer.gradients == "mean"
    update = max(_update_peak(setup, one, s) if mean else _worker_update_peak(setup, s) for s in optimizer.updates)
    # In local stages workers compute with parameters of their own.
    own = shard_bytes(setup.model.shapes, setup.specs.params, dict(setup.layout.mesh.shape))
    return Traced(
        residuals=_residuals(one, parameters, setup.options),
        gradient_temporary=peak_bytes(flatten(jaxpr, [*parameters, *rest])) + (own if optimizer.local else 0),
        update_temporary=update,
        flops=dot_flops(jaxpr),
    )


def _frozen(one: OneDevice) -> tuple[Tree, list[int]]:
    """Shapes of what is not trained, None if there is nothing, and over how many devices ZeRO splits each."""
    if one.frozen is None:
        return None, []
    return one.frozen.shapes, zero_divisors(one.frozen.specs(one.layout.parameter), one.layout)


def _residuals(one: OneDevice, parameters: list[int], options: StepOptions) -> int:
    """Bytes of what the backward pass of a micro-batch needs of the forward pass, from the results of its vjp."""
    rows = {name: jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for name, x in one.batch.items()}
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows["tokens"].shape[0]))

    def forward(params: Tree, batch: Any, keys: jax.Array, frozen: Tree):
        drawn = keys if options.dropout else None

        def loss(params: Tree) -> jax.Array:
            model = nnx.merge(one.model.graph, joined(params, frozen))
            return micro_batch_loss(options.objective, model, batch, keys=drawn, dropping=None, layout=one.layout)[0]

        return jax.vjp(loss, params)[1]

    frozen, frozen_divisors = _frozen(one)
    jaxpr = jax.make_jaxpr(forward)(one.model.shapes, rows, keys, frozen).jaxpr
    between = [1] * (len(jaxpr.invars) - len(parameters) - len(frozen_divisors))
    return residual_bytes(jaxpr, [*parameters, *between, *frozen_divisors])


def _update_peak(setup: Setup, one: OneDevice, stage: str) -> int:
    """Most bytes that an update holds beside the state and the gradients."""
    model, layout, optimizer, train = one.model, one.layout, setup.optimizer, setup.config.train
    specs = state_specs(layout, model, optimizer, ema=train.ema_decay > 0)
    state = abstract_state(model, optimizer, placed(layout, specs))
    update = make_update(model, optimizer, stage, clip_norm=train.clip_norm, ema_decay=train.ema_decay)
    jaxpr = jax.make_jaxpr(update)(state, model.shapes, _SCALAR, _SCALAR).jaxpr
    given = [*zero_divisors(specs, layout), *zero_divisors(model.specs(layout.gradient), layout), 1, 1]
    return peak_bytes(flatten(jaxpr, given), donated=True)


def _worker_update_peak(setup: Setup, stage: str) -> int:
    """The same of an update that is one shard_map: of what it computes on one device."""
    model, layout, optimizer, clip_norm = setup.model, setup.layout, setup.optimizer, setup.config.train.clip_norm
    workers = layout.mesh.shape["data"]
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct((workers, *x.shape), x.dtype), model.shapes)
    loss = jax.ShapeDtypeStruct((workers,) if stage in optimizer.local else (), jnp.float32)
    opt_state = jax.eval_shape(optimizer.init, model.shapes)

    def update(gradients: Tree, opt_state: Tree, params: Tree, learning_rate: jax.Array, loss: jax.Array):
        inputs = UpdateInputs(params=params, learning_rate=learning_rate)
        return optimizer.updates[stage](gradients, opt_state, inputs, loss, clip_norm)

    jaxpr = jax.make_jaxpr(update)(gradients, opt_state, model.shapes, _SCALAR, loss).jaxpr
    (local,) = [eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    return peak_bytes(flatten(local), donated=True)


def _axes(spec: PartitionSpec) -> list[tuple[str, ...]]:
    """Per dimension the mesh axes that split it."""
    return [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in spec]


def zero_divisors(specs: Tree, layout: Layout) -> list[int]:
    """Per leaf, over how many devices ZeRO splits it."""
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return [layout.size(tuple(a for axes in _axes(spec) for a in axes if a in ZERO_AXES)) for spec in leaves]


def local_shapes(shapes: Tree, specs: Tree, sizes: dict[str, int]) -> Tree:
    """The shape of one device's shard of every leaf.

    Example:
        >>> spec, whole = {"w": PartitionSpec(None, ("tensor", "fsdp"))}, {"w": jax.ShapeDtypeStruct((3, 8), "float32")}
        >>> local_shapes(whole, spec, {"tensor": 2, "fsdp": 4})["w"].shape
        (3, 1)
    """

    def shard(x, spec):
        axes = [*_axes(spec), *[()] * (len(x.shape) - len(spec))]
        local = tuple(n // math.prod(sizes[a] for a in split) for n, split in zip(x.shape, axes, strict=True))
        return jax.ShapeDtypeStruct(local, x.dtype)

    return jax.tree.map(shard, shapes, specs)


def shard_bytes(shapes: Tree, specs: Tree, sizes: dict[str, int]) -> int:
    """Bytes of one device's shards of a tree."""
    return sum(aval_bytes(x) for x in jax.tree.leaves(local_shapes(shapes, specs, sizes)))
