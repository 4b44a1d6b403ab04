"""The optimizers that talk in bits as `dsjax train` runs them: a program for each stage, on any mesh.

An update is one shard_map, manual over all axes of the mesh: each device packs its own part of every tensor, over the
workers' axis go bytes and scalars, over the others the sums that make a norm that of a whole tensor.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsjax.optimizers.algorithms.onebit_adam import OneBitAdam
from dsjax.optimizers.algorithms.onebit_lamb import OneBitLamb
from dsjax.optimizers.algorithms.zero_one_adam import ZeroOneAdam
from dsjax.optimizers.api import FreezeRule, Measured, StagedTransform, Tree, UpdateInputs
from dsjax.optimizers.guard import Clip, guarded

Algorithm = OneBitAdam | OneBitLamb | ZeroOneAdam
LOCAL = frozenset({"sync", "local"})
"""Kinds of stages in which workers do not talk about gradients."""


def staged(
    algorithm: Algorithm, mesh: Mesh | AbstractMesh, *, clip: Clip = "mean", freeze: FreezeRule | None = None
) -> StagedTransform:
    """An algorithm as an optimizer of `dsjax train`.

    Args:
        algorithm: its workers say how tensors lie on the mesh.
        mesh: the devices.
        clip: see guard.py.
        freeze: how the freeze may be decided during the run.
    """
    workers = algorithm.workers
    names = [name for name in algorithm.names if name != "noop" or algorithm.moments.deepspeed_parity]

    def stage(step: int, decided: int | None) -> str:
        last = algorithm.last_full if decided is None else min(decided, algorithm.last_full)
        return algorithm.names[int(algorithm.stage(step, last, np))]

    def rounds(steps: int) -> dict[str, int]:
        stages = algorithm.stage(np.arange(steps), algorithm.last_full, np)
        counts = np.bincount(stages, minlength=len(algorithm.names))
        return {name: int(count) for name, count in zip(algorithm.names, counts, strict=True) if count}

    def update(
        name: str, gradients: Tree, state: Tree, inputs: UpdateInputs, loss: jax.Array, clip_norm: float
    ) -> tuple[Tree | None, Tree, Measured]:
        kind = algorithm.kinds[name]
        is_local = kind in LOCAL
        watches = freeze is not None and kind == "full"

        def local(gradients: Tree, state: Any, params: Tree, learning_rate: jax.Array, loss: jax.Array):
            gradients = jax.tree.map(lambda g: g[0], gradients)
            mine = loss[0] if is_local else loss
            gradients, found = guarded(workers, kind, gradients, mine, clip_norm=clip_norm, clip=clip)
            changes, state = algorithm.update(name, gradients, state, params, learning_rate, found.finite)
            if is_local:
                found = jax.tree.map(lambda x: x[None], found)
            if watches:
                (sums,) = workers.sums(state.nu)
                total = sum((jnp.sum(x) for x in jax.tree.leaves(sums)), start=jnp.float32(0))
                found = dataclasses.replace(found, variance=total)
            if kind == "sync":
                found = dataclasses.replace(found, worker_skips=state.skipped)
            return None if kind == "local" else changes, state, found

        specs, state_specs = workers.spec_tree(inputs.params), algorithm.specs(inputs.params)
        own, whole = P(workers.axis) if is_local else P(), P()
        metrics = Measured(own, own, own, whole if watches else None, whole if kind == "sync" else None)
        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(
                jax.tree.map(lambda s: P(workers.axis, *s), specs, is_leaf=_is_spec),
                state_specs,
                specs,
                P(),
                own,
            ),
            out_specs=(None if kind == "local" else specs, state_specs, metrics),
            # What is computed alike on the devices that hold the same part cannot be told from what differs.
            check_vma=False,
        )
        return run(gradients, state, inputs.params, inputs.learning_rate, loss)

    return StagedTransform(
        algorithm.init,
        {name: partial(update, name) for name in names},
        stage,
        "per_worker",
        lambda state, param_specs: algorithm.specs(state.nu),
        rounds,
        frozenset(name for name in names if algorithm.kinds[name] in LOCAL),
        frozenset(name for name in names if algorithm.kinds[name] == "local"),
        (lambda state: state.displaced.shift) if isinstance(algorithm, ZeroOneAdam) else None,
        freeze,
    )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)
