"""Before an update of workers' gradients: their norm, whether they are finite, and clipping, by what the stage allows.

    full          one gradient, the mean: clipped by its norm; not finite: no step is taken
    compressed    W gradients: clipped by sqrt(mean_i |g_i|^2), so that workers keep their weights; one that is not
                  finite ends the step for all. Each worker sends two scalars
    local, sync   a worker has its own gradient only: it clips by its own norm and skips its own step
Norms are of whole tensors, over all devices that hold a part.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsjax.optimizers.api import Measured
from dsjax.optimizers.workers import Tree, Workers

Clip = Literal["mean", "local"]


def first_not_finite(squares: list[jax.Array]) -> jax.Array:
    """The number of the first square that is not finite, layers and experts counted one by one; -1 if all are.

    Example:
        >>> first_not_finite([jnp.ones(()), jnp.array([1.0, jnp.nan])]).item()
        2
    """
    bad = ~jnp.isfinite(jnp.concatenate([jnp.ravel(x) for x in squares]))
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def guarded(
    workers: Workers, kind: str, gradients: Tree, loss: jax.Array, *, clip_norm: Any = 0.0, clip: Clip = "mean"
) -> tuple[Tree, Measured]:
    """The gradients an update may use.

    Args:
        workers: who takes part.
        kind: of the stage: full, compressed, sync or local.
        gradients: this worker's.
        loss: scalar; of all workers, or in sync and local stages of this one.
        clip_norm: 0 does not clip.
        clip: "local": in compressed stages too every worker clips by its own norm.

    Returns:
        the gradients, clipped, in the stage full averaged; and what was found.
    """
    if kind == "full":
        gradients = workers.mean(gradients)
    (squares,) = workers.sums(jax.tree.map(jnp.square, gradients))
    leaves = jax.tree.leaves(workers.of_all(squares))
    own = sum((jnp.sum(x) for x in leaves), start=jnp.float32(0))
    bad = first_not_finite(leaves) if leaves else jnp.int32(-1)
    norm = by = jnp.sqrt(own)
    if kind == "compressed":
        of_all = jax.lax.all_gather(jnp.stack([own, bad.astype(jnp.float32)]), workers.axis, to="invarying")
        norm = jnp.sqrt(of_all[:, 0].mean())
        bad = of_all[:, 1].max().astype(jnp.int32)
        by = norm if clip == "mean" else by
    if not (isinstance(clip_norm, float | int) and clip_norm == 0):
        share = jnp.minimum(1.0, clip_norm / jnp.maximum(by, 1e-30))
        gradients = jax.tree.map(lambda g: g * share, gradients)
    return gradients, Measured(norm, jnp.isfinite(norm) & jnp.isfinite(loss), bad)
