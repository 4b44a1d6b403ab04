"""1-bit Adam (arXiv 2102.02888): Adam whose momentum, once its variance is frozen, is averaged at one bit a value.

Warm-up (t <= freeze_step), g the mean gradient of the workers:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        u = m^ / (sqrt(v^) + eps)        w -= lr (u + decay w)

Compressed (t > freeze_step), g_i the gradient of worker i, v as it was left:

    m_i = b1 m + (1 - b1) g_i        m = one_bit_mean(m_i)       u and w as before

m^ = m / (1 - b1^t) and v^ = v / (1 - b2^k), k the number of updates of v. A value of which v is zero has never had a
gradient. Its m would be divided by eps alone, so it takes no part in the one-bit mean (`mask_unseen`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dsjax.collectives.one_bit import Feedback
from dsjax.optimizers.api import Kind
from dsjax.optimizers.workers import Tree, Workers, keep, only_if


@dataclasses.dataclass(frozen=True)
class OneBitAdamState:
    """Kept by 1-bit Adam.

    Attributes:
        count: updates done, int32.
        nu_count: those of them that changed nu, int32.
        mu: momentum m, equal on all workers, float32.
        nu: variance v, likewise.
        feedback: errors of the one-bit mean.
    """

    count: Any
    nu_count: Any
    mu: Tree
    nu: Tree
    feedback: Feedback


jax.tree_util.register_dataclass(OneBitAdamState)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's moments, which the three optimizers share.

    Attributes:
        b1, b2: decay rates of momentum and variance.
        eps: added to the root of the variance.
        bias_correction: whether moments are divided by 1 - b^t.
        weight_decay: decoupled decay.
        decays: tree of bools, which tensors decay; None: all.
        mask: tree of bools (or 0 and 1), False for values whose momentum is held at zero; None: none is.
        mask_unseen: leave values of zero variance out of one-bit means.
        deepspeed_parity: do what DeepSpeed 0.19.6 does: nothing in the first step, masks on results only.
    """

    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    bias_correction: bool = True
    weight_decay: Any = 0.0
    decays: Tree = None
    mask: Tree = None
    mask_unseen: bool = True
    deepspeed_parity: bool = False

    def step(self, mu: Tree, gradients: Tree) -> Tree:
        """b1 m + (1 - b1) g."""
        return jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, mu, gradients)

    def square(self, nu: Tree, gradients: Tree) -> Tree:
        """b2 v + (1 - b2) g^2."""
        return jax.tree.map(lambda v, g: self.b2 * v + (1 - self.b2) * jnp.square(g), nu, gradients)

    def correction(self, decay: Any, count: jax.Array) -> jax.Array:
        """1 - b^t, or 1."""
        return 1 - jnp.asarray(decay, jnp.float32) ** count if self.bias_correction else jnp.float32(1)

    def denominator(self, nu: Tree, nu_count: jax.Array) -> Tree:
        """sqrt(v^) + eps."""
        correction = self.correction(self.b2, nu_count)
        return jax.tree.map(lambda v: jnp.sqrt(v / correction) + self.eps, nu)

    def direction(self, mu: Tree, nu: Tree, count: jax.Array, nu_count: jax.Array) -> Tree:
        """m^ / (sqrt(v^) + eps)."""
        correction = self.correction(self.b1, count)
        return jax.tree.map(lambda m, d: m / correction / d, mu, self.denominator(nu, nu_count))

    def decayed(self, direction: Tree, params: Tree) -> Tree:
        """The direction with its weight decay."""
        if isinstance(self.weight_decay, float | int) and self.weight_decay == 0:
            return direction
        decays = jax.tree.map(lambda _: True, params) if self.decays is None else self.decays
        return jax.tree.map(lambda u, p, d: u + self.weight_decay * p if d else u, direction, params, decays)

    def sent(self, nu: Tree) -> Tree | None:
        """Which values take part in one-bit means; None: all."""
        if self.deepspeed_parity:
            return None
        seen = jax.tree.map(lambda v: v > 0, nu) if self.mask_unseen else None
        if self.mask is None:
            return seen
        chosen = jax.tree.map(lambda x: jnp.asarray(x, bool), self.mask)
        return chosen if seen is None else jax.tree.map(jnp.logical_and, seen, chosen)

    def held(self, mu: Tree) -> Tree:
        """Momentum with the values at zero that a mask holds there."""
        return mu if self.mask is None else jax.tree.map(lambda m, x: m * jnp.asarray(x, m.dtype), mu, self.mask)


@dataclasses.dataclass(frozen=True)
class OneBitAdam:
    """The algorithm, on one device's parts.

    Attributes:
        workers: those that take part.
        moments: Adam's constants.
        freeze_step: the last step of the warm-up, counted from 1.
    """

    workers: Workers
    moments: Moments
    freeze_step: int

    names: ClassVar[tuple[str, ...]] = ("full", "compressed", "noop")
    kinds: ClassVar[Mapping[str, Kind]] = {"full": "full", "compressed": "compressed", "noop": "full"}

    @property
    def last_full(self) -> int:
        """The last step before the freeze, counted from 1."""
        return self.freeze_step

    def init(self, params: Tree) -> OneBitAdamState:
        """The first state, in global shapes."""
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return OneBitAdamState(_zero(), _zero(), zeros(), zeros(), self.workers.feedback(params))

    def specs(self, params: Tree) -> OneBitAdamState:
        """The PartitionSpecs of the state, as `init` shapes it."""
        own = self.workers.spec_tree(params)
        none = jax.sharding.PartitionSpec()
        return OneBitAdamState(none, none, own, own, self.workers.feedback_specs(params))

    def stage(self, step: Any, freeze_step: Any, xp: Any) -> Any:
        """The number in `names` of the stage of a step (from 0): with numpy on the host, with jax.numpy traced."""
        stage = xp.where(step < freeze_step, 0, 1)
        return xp.where(step == 0, 2, stage) if self.moments.deepspeed_parity else stage

    def shift(self, state: OneBitAdamState) -> None:
        """None: the workers' parameters are equal in every stage."""

    def update(
        self, stage: str, gradients: Tree, state: OneBitAdamState, params: Tree, learning_rate: Any, accept: jax.Array
    ) -> tuple[Tree, OneBitAdamState]:
        """One step: what to add to the parameters, and the next state."""
        if stage == "noop":
            return jax.tree.map(jnp.zeros_like, params), state
        moments, count, nu_count, nu, feedback = self.moments, state.count + 1, state.nu_count, state.nu, state.feedback
        mu = moments.step(state.mu, gradients)
        if stage == "full":
            nu, nu_count = moments.square(nu, gradients), nu_count + 1
        else:
            mu, feedback = self.workers.one_bit_mean(mu, feedback, moments.sent(nu))
            mu = moments.held(mu)
        direction = moments.decayed(moments.direction(mu, nu, count, nu_count), params)
        changes = jax.tree.map(lambda u: -learning_rate * u, direction)
        state = keep(accept, OneBitAdamState(count, nu_count, mu, nu, feedback), state)
        return only_if(accept, changes), state


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.int32)
