"""An algorithm as an optax transform: its own count chooses the stage; arguments of users are checked."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dsjax.collectives.one_bit import Scheme
from dsjax.optimizers.algorithms.algorithm import Algorithm, stages_of
from dsjax.optimizers.algorithms.onebit_adam import Moments
from dsjax.optimizers.guard import guarded
from dsjax.optimizers.workers import Granularity, Tree, Workers

PARITY = "deepspeed-0.19.6"
Scale = Literal["l2", "l1"]
Mask = Tree | Callable[[Tree], Tree]
"""A tree like the parameters, or a function that makes it from them, as optax has masks; None: no mask."""


@dataclasses.dataclass(frozen=True)
class SwitchState:
    """State of an optimizer that chooses its stage by itself.

    Attributes:
        step: updates asked for, skipped ones too, int32.
        inner: the algorithm's state.
    """

    step: Any
    inner: Any


jax.tree_util.register_dataclass(SwitchState)


def switching(
    algorithm: Algorithm, learning_rate: optax.ScalarOrSchedule = -1.0
) -> optax.GradientTransformationExtraArgs:
    """The algorithm with a count of its own and a branch for each stage.

    Args:
        algorithm: its masks may still be functions of the parameters.
        learning_rate: number or schedule, for an algorithm that needs it; -1 gives a direction to be scaled later.
    """
    workers, freeze_step = algorithm.workers, algorithm.last_full
    names = stages_of(algorithm)

    def init(params: Tree) -> Any:
        return SwitchState(jnp.zeros((), jnp.int32), _with_masks(algorithm, params).init(params))

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        del extra
        if params is None:
            raise ValueError("pass the parameters: update(gradients, state, params)")
        if workers.axis not in jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"update(gradients, state, params) runs inside jax.shard_map over the mesh's axis {workers.axis!r}, on "
                "the gradients of one worker: see docs/training_step.md"
            )
        _check_float32(state.inner)
        if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(algorithm.shift(state.inner))):
            raise ValueError("0/1 Adam needs jax.shard_map(..., check_vma=False): see docs/training_step.md")
        chosen = _with_masks(algorithm, params)
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate

        def branch(name: str) -> Callable:
            def run(gradients: Tree, inner: Any, params: Tree) -> tuple[Tree, Any]:
                as_float = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
                gradients, found = guarded(workers, algorithm.kinds[name], as_float(gradients), jnp.float32(0))
                return chosen.update(name, gradients, inner, as_float(params), rate, found.finite)

            return run

        stage = algorithm.stage(state.step, freeze_step, jnp)
        changes, inner = jax.lax.switch(stage, [branch(name) for name in names], updates, state.inner, params)
        changes = jax.tree.map(lambda change, g: change.astype(g.dtype), changes, updates)
        return changes, SwitchState(state.step + 1, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def make_workers(mesh: Mesh, axis: str, granularity: Granularity, scale: Scale, parity: str) -> Workers:
    """Workers from the arguments of a user.

    Raises:
        ValueError: the mesh has no such axis, or a name is unknown.
    """
    if axis not in mesh.shape:
        raise ValueError(f"axis = {axis!r} is not an axis of the mesh; it has {dict(mesh.shape)}")
    for name, value, allowed in (
        ("parity", parity, ("", PARITY)),
        ("granularity", granularity, ("fused", "tensor", "group")),
        ("scale", scale, ("l2", "l1")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} = {value!r}; allowed are {', '.join(map(repr, allowed))}")
    if mesh.shape[axis] == 1:
        warnings.warn(f"the axis {axis!r} has one worker: nothing is compressed", stacklevel=3)
    scheme = Scheme(scale, "chunk", deepspeed_padding=True) if parity else Scheme(scale)
    return Workers(axis, mesh.shape[axis], granularity=granularity, scheme=scheme)


def with_parity(moments: Moments, parity: str) -> Moments:
    """The moments of DeepSpeed 0.19.6 where parity asks for them: it never corrects the bias."""
    return dataclasses.replace(
        moments,
        bias_correction=moments.bias_correction and not parity,
        deepspeed_parity=bool(parity),
    )


def static_step(name: str, value: Any) -> int:
    """A step of a schedule as a Python int.

    Raises:
        ValueError: it is an array, no integer, or below 1.
    """
    if isinstance(value, jax.Array | np.ndarray):
        raise ValueError(
            f"{name} must be a Python int, known before the program is compiled; got an array. With "
            f"optax.inject_hyperparams name it in static_args=({name!r}, ...)"
        )
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an int of 1 or more; got {value!r}")
    return int(value)


def _with_masks[A: Algorithm](algorithm: A, params: Tree) -> A:
    """The algorithm with its masks as trees, which must fit the parameters."""
    found = {}
    for option, name in (("momentum_mask", "mask"), ("decay_mask", "decays")):
        mask = algorithm.moments.mask if name == "mask" else algorithm.moments.decays
        mask = mask(params) if callable(mask) else mask
        if mask is not None and jax.tree.structure(mask) != jax.tree.structure(params):
            raise ValueError(
                f"{option} must have the structure of the parameters, {jax.tree.structure(params)}; got "
                f"{jax.tree.structure(mask)}"
            )
        found[name] = mask
    if found["mask"] is not None:
        jax.tree.map_with_path(_check_shape, found["mask"], params)
    return dataclasses.replace(algorithm, moments=dataclasses.replace(algorithm.moments, **found))


def _check_shape(path: Any, mask: Any, param: Any) -> None:
    if jnp.shape(mask) != jnp.shape(param):
        raise ValueError(
            f"momentum_mask{jax.tree_util.keystr(path)} has shape {jnp.shape(mask)}; it must have that of the "
            f"parameter, {jnp.shape(param)}"
        )


def _check_float32(inner: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
            raise ValueError(
                f"the optimizer's state is kept in float32, moments and errors; got {leaf.dtype} in "
                f"{jax.tree_util.keystr(path)}: leave the state out when you cast parameters"
            )
