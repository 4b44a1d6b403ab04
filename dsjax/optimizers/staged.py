"""Optimizers with compressed communication as `dsjax train` runs them: a program for each stage, on any mesh.

An update is one shard_map, manual over all axes of the mesh: each device packs its own part of every tensor, over the
workers' axis go bytes and scalars, over the others the sums that make a norm that of a whole tensor.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsjax.optimizers.algorithms.algorithm import Algorithm, stages_of
from dsjax.optimizers.api import FreezeRule, Kind, Measured, StagedTransform, Tree, UpdateInputs
from dsjax.optimizers.guard import Clip, guarded


def staged(
    algorithm: Algorithm, mesh: Mesh | AbstractMesh, *, clip: Clip = "mean", freeze: FreezeRule | None = None
) -> StagedTransform:
    """An algorithm as an optimizer of `dsjax train`.

    Args:
        algorithm: its workers say how tensors lie on the mesh.
        mesh: the devices.
        clip: see guard.py.
        freeze: rule by which the freeze may be decided during the run.
    """

    def stage(step: int, decided: int | None) -> str:
        last = algorithm.last_full if decided is None else min(decided, algorithm.last_full)
        return algorithm.names[int(algorithm.stage(step, last, np))]

    def rounds(steps: int) -> dict[str, int]:
        stages = algorithm.stage(np.arange(steps), algorithm.last_full, np)
        counts = np.bincount(stages, minlength=len(algorithm.names))
        return {name: int(count) for name, count in zip(algorithm.names, counts, strict=True) if count}

    kinds: dict[str, Kind] = {name: algorithm.kinds[name] for name in stages_of(algorithm)}
    watched = lambda kind: freeze is not None and kind == "full"
    optimizer = StagedTransform(
        init=algorithm.init,
        updates={name: _update(algorithm, mesh, name, clip, watches=watched(kind)) for name, kind in kinds.items()},
        stage=stage,
        gradients="per_worker",
        state_specs=lambda state, param_specs: algorithm.specs(state.nu),
        rounds=rounds,
        kinds=kinds,
        freeze=freeze,
    )
    return dataclasses.replace(optimizer, shift=algorithm.shift) if optimizer.local else optimizer


def _update(
    algorithm: Algorithm, mesh: Mesh | AbstractMesh, name: str, clip: Clip, *, watches: bool
) -> Callable[[Tree, Tree, UpdateInputs, jax.Array, float], tuple[Tree | None, Tree, Measured]]:
    """The update of a stage; with `watches` it measures the variance, too."""
    workers, kind = algorithm.workers, algorithm.kinds[name]
    is_local = kind in ("sync", "local")

    def local(gradients: Tree, state: Any, params: Tree, learning_rate: jax.Array, loss: jax.Array, clip_norm: float):
        """The update of one device's parts."""
        gradients = jax.tree.map(lambda g: g[0], gradients)
        mine = loss[0] if is_local else loss
        gradients, found = guarded(workers, kind, gradients, mine, clip_norm=clip_norm, clip=clip)
        changes, state = algorithm.update(name, gradients, state, params, learning_rate, found.finite)
        if is_local:
            found = jax.tree.map(lambda x: x[None], found)
        if watches:
            (sums,) = workers.sums(state.nu)
            total = sum((jnp.sum(x) for x in jax.tree.leaves(workers.of_all(sums))), start=jnp.float32(0))
            found = dataclasses.replace(found, variance=total)
        if kind == "sync":
            found = dataclasses.replace(found, worker_skips=state.skipped)
        return None if kind == "local" else changes, state, found

    def update(
        gradients: Tree, state: Tree, inputs: UpdateInputs, loss: jax.Array, clip_norm: float
    ) -> tuple[Tree | None, Tree, Measured]:
        specs, state_specs = workers.spec_tree(inputs.params), algorithm.specs(inputs.params)
        own, whole = P(workers.axis) if is_local else P(), P()
        each = jax.tree.map(lambda s: P(workers.axis, *s), specs, is_leaf=_is_spec)
        metrics = Measured(own, own, own, whole if watches else None, whole if kind == "sync" else None)
        run = jax.shard_map(
            partial(local, clip_norm=clip_norm),
            mesh=mesh,
            in_specs=(each, state_specs, specs, P(), own),
            out_specs=(None if kind == "local" else specs, state_specs, metrics),
            # What is computed alike on the devices that hold the same part cannot be told from what differs.
            check_vma=False,
        )
        return run(gradients, state, inputs.params, inputs.learning_rate, loss)

    return update


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)
