"""A run that goes on with another number of workers than its checkpoint was written by.

Parameters and moments do not depend on the number of workers. The state that an optimizer with compressed communication
keeps for each of them does. Errors are dropped: they are late gradients of one step at most. Momenta become their mean
over the workers. Where workers had parameters of their own, the shared parameters become the mean over the workers.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.checkpoint.store import CheckpointStore

_FEEDBACK = "opt_state.feedback."
_DISPLACED = "opt_state.displaced."
_SHIFT = f"{_DISPLACED}shift."
_SKIPPED = "opt_state.skipped"

Shapes = Mapping[str, jax.ShapeDtypeStruct]


def restore_by_name(
    store: CheckpointStore, step: int, wanted: Shapes, report: Callable[[str], None]
) -> dict[str, jax.Array]:
    """The tensors of a checkpoint, fitted to this run's workers where it had others.

    Args:
        store: the checkpoints.
        step: which.
        wanted: name -> shape and sharding; [W, ...] for what is kept for each worker, of experts [E, W, ...].
        report: told when something was dropped.

    Raises:
        ValueError: the checkpoint does not fit; lists every missing, extra and misshapen tensor.
    """
    saved = {name: tuple(shape) for name, (shape, _) in store.tensors(step).items()}
    other = {name for name, shape in wanted.items() if name in saved and saved[name] != shape.shape}
    if not any(name.startswith((_FEEDBACK, _DISPLACED)) for name in other):
        return store.restore(step, dict(wanted))
    asked = {}
    for name, shape in wanted.items():
        if name.startswith(_DISPLACED):
            asked[name] = _as_saved(shape, saved[name]) if name in saved else shape
        elif not name.startswith(_FEEDBACK):
            asked[name] = shape
    tensors = store.restore(step, asked, partial=True)
    report(_told(saved, wanted))
    for name, shape in wanted.items():
        if name.startswith(_FEEDBACK):
            tensors[name] = _full(shape)
    if any(name.startswith(_DISPLACED) for name in wanted):
        _gather_workers(tensors, wanted)
    return tensors


def _as_saved(shape: jax.ShapeDtypeStruct, saved: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape that a checkpoint has of all its workers, their dimension split if this run's mesh divides it."""
    mesh, spec, dim = shape.sharding.mesh, list(shape.sharding.spec), _workers_dim(shape)
    if saved[dim] % mesh.shape["data"]:
        spec[dim] = None
    return jax.ShapeDtypeStruct(saved, shape.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _workers_dim(shape: jax.ShapeDtypeStruct) -> int:
    """The dimension that counts workers: the one over `data`."""
    return list(shape.sharding.spec).index("data")


def _told(saved: Mapping[str, tuple[int, ...]], wanted: Shapes) -> str:
    """The warning."""
    name = next(name for name in wanted if name.startswith(_FEEDBACK) and name in saved)
    dim = _workers_dim(wanted[name])
    before, now = saved[name][dim], wanted[name].shape[dim]
    workers = f"of {before} workers, this run has {now}" if before != now else "of a mesh that cuts tensors otherwise"
    return f"the checkpoint is {workers}: errors of the one-bit mean begin at zero again"


def _full(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=shape.sharding)()


def _gather_workers(tensors: dict[str, jax.Array], wanted: Shapes) -> None:
    """Set all workers to their mean, in the tensors of a checkpoint of 0/1 Adam."""
    for name, shape in wanted.items():
        if name.startswith(_SHIFT):
            param, dim = f"params.{name.removeprefix(_SHIFT)}", _workers_dim(shape)
            together = lambda base, shift, dim=dim: base + shift.mean(dim)
            tensors[param] = jax.jit(together, out_shardings=wanted[param].sharding)(tensors[param], tensors[name])
            tensors[name] = _full(shape)
        elif name.startswith(f"{_DISPLACED}mu."):
            mean = lambda mu, shape=shape: jnp.broadcast_to(mu.mean(_workers_dim(shape), keepdims=True), shape.shape)
            tensors[name] = jax.jit(mean, out_shardings=shape.sharding)(tensors[name])
    skips = f"{_DISPLACED}skipped"
    tensors[_SKIPPED] = jax.jit(
        lambda total, each: total + each.sum(dtype=total.dtype), out_shardings=wanted[_SKIPPED].sharding
    )(tensors[_SKIPPED], tensors[skips])
    for name in (skips, f"{_DISPLACED}rates"):
        tensors[name] = _full(wanted[name])
