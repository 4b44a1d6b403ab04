"""A baseline: Adam whose gradients are averaged in bfloat16, with half the bytes of float32 really on the wire.

XLA:CPU widens a bfloat16 all-reduce to float32. So the numbers travel as bytes, in one message for all tensors, by the
gather that the one-bit mean uses too; each worker sums what it has got in float32. Between two workers that sends as
much as a bfloat16 all-reduce would.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsjax.collectives.one_bit import gathered
from dsjax.optimizers.api import Measured, StagedTransform, Tree, UpdateInputs
from dsjax.optimizers.guard import first_not_finite
from dsjax.optimizers.workers import keep


def mean_in_bf16(gradients: Tree, *, num_workers: int, axis: str = "data") -> Tree:
    """The mean over workers of gradients [1, ...], each rounded to bfloat16; inside a shard_map."""
    leaves, tree = jax.tree.flatten(gradients)
    flat = jnp.concatenate([leaf.astype(jnp.bfloat16).reshape(-1) for leaf in leaves])
    message = jax.lax.bitcast_convert_type(flat, jnp.uint8).reshape(1, -1)
    arrived = gathered(message, axis, num_workers).reshape(num_workers, -1, 2)
    # A sum in float32, worker by worker: no array of all workers' numbers in float32.
    numbers = (jax.lax.bitcast_convert_type(row, jnp.bfloat16).astype(jnp.float32) for row in arrived)
    total = sum(numbers, start=jnp.zeros(flat.shape))
    ends = itertools.accumulate((leaf.size for leaf in leaves), initial=0)
    parts = [(total / num_workers)[start:end] for start, end in itertools.pairwise(ends)]
    return tree.unflatten([part.reshape(leaf.shape[1:]) for part, leaf in zip(parts, leaves, strict=True)])


def averaged_in_bf16(adam: StagedTransform, mesh: Mesh | AbstractMesh) -> StagedTransform:
    """`adam` (of one stage, that wants the mean) with gradients averaged over `data` in bfloat16.

    Args:
        adam: from create_optimizer.
        mesh: of which only `data` may be larger than 1.
    """
    num_workers = mesh.shape["data"]

    def mean(gradients: Tree) -> Tree:
        return mean_in_bf16(gradients, num_workers=num_workers)

    average = jax.shard_map(mean, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)

    def update(
        gradients: Tree, state: Tree, inputs: UpdateInputs, loss: jax.Array, clip_norm: float
    ) -> tuple[Tree, Tree, Measured]:
        gradients = average(gradients)
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)]
        norm = jnp.sqrt(sum(squares, start=jnp.float32(0)))
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        changes, new = adam.updates["full"](gradients, state, inputs)
        return changes, keep(finite, new, state), Measured(norm, finite, first_not_finite(squares))

    return dataclasses.replace(adam, updates={"full": update}, gradients="per_worker")
