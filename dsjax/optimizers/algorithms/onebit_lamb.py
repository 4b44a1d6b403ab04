"""1-bit LAMB (arXiv 2104.06069): LAMB with a one-bit mean of momenta, and a coefficient for each layer.

Warm-up (t <= freeze_step), for each tensor l (one layer's), g the mean gradient of the workers:

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      u = m^ / (sqrt(v^) + eps) + decay w
    c = clip(|w| / |u|, min_coeff, max_coeff), 1 where a norm is 0        C = beta C + (1 - beta) c, unless c = 1
    w -= lr c u

At its end v is frozen, and a fresh one, f, begins with its value. So that one scale fits all tensors, momenta are
multiplied by s_l = R / r_l before they are sent, with r_l = |m| / sqrt(n) and R the mean of all r_l. Compressed:

    m_i = b1 m + (1 - b1) g_i      m' = one_bit_mean(s m_i) / s
    g^ = (m' - b1 m) / (1 - b1)    f = b2 f + (1 - b2) g^^2
    u0 = m'^ / (sqrt(v^) + eps)    u = u0 + decay w
    F = max of (sqrt(v^) + eps) / (sqrt(f^) + eps)      with decay F <- F q + 1 - q, q = min(1, |u0| / |u|)
    F <- clip(F, factor_min, factor_max), then within factor_threshold of the last F
    w -= lr C F u
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsjax.collectives.one_bit import Feedback
from dsjax.optimizers.algorithms.onebit_adam import Moments
from dsjax.optimizers.api import Kind
from dsjax.optimizers.workers import Tree, Workers, keep, only_if


@dataclasses.dataclass(frozen=True)
class OneBitLambState:
    """Kept by 1-bit LAMB; what is per tensor is [S] for a stack of layers, else a scalar.

    Attributes:
        count, nu_count, mu, nu, feedback: as in OneBitAdamState.
        nu_fresh: f, the variance that goes on after the freeze.
        coefficient: C, the moving average of the warm-up's coefficients.
        factor: the last F.
        scaling: s.
        last: coefficient of the last step, C F; for reports only.
        tail: DeepSpeed's padding, where it is asked for; else None.
    """

    count: Any
    nu_count: Any
    mu: Tree
    nu: Tree
    nu_fresh: Tree
    coefficient: Tree
    factor: Tree
    scaling: Tree
    last: Tree
    tail: Any
    feedback: Feedback


jax.tree_util.register_dataclass(OneBitLambState)


@dataclasses.dataclass(frozen=True)
class OneBitLamb:
    """The algorithm, on one device's parts; the constants are those of the module's equations."""

    workers: Workers
    moments: Moments
    freeze_step: int
    max_coeff: Any = 10.0
    min_coeff: Any = 0.01
    coeff_beta: Any = 0.9
    factor_max: Any = 4.0
    factor_min: Any = 0.5
    factor_threshold: Any = 0.1

    names: ClassVar[tuple[str, ...]] = ("full", "freeze", "compressed", "noop")
    kinds: ClassVar[Mapping[str, Kind]] = {"full": "full", "freeze": "full", "compressed": "compressed", "noop": "full"}

    @property
    def last_full(self) -> int:
        """The last step before the freeze, counted from 1."""
        return self.freeze_step

    def init(self, params: Tree) -> OneBitLambState:
        """The first state, in global shapes."""
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        each = lambda value: self.workers.each(params, value)
        count = lambda: jnp.zeros((), jnp.int32)
        tail, feedback = self.workers.tail(params) if self._has_tail else None, self.workers.feedback(params)
        return OneBitLambState(
            count(), count(), zeros(), zeros(), zeros(), each(0.0), each(1.0), each(1.0), each(0.0), tail, feedback
        )

    def specs(self, params: Tree) -> OneBitLambState:
        """The PartitionSpecs of the state, as `init` shapes it."""
        own, none = self.workers.spec_tree(params), PartitionSpec()
        each = self.workers.specs_of_each(params)
        feedback = self.workers.feedback_specs(params)
        tail = none if self._has_tail else None
        return OneBitLambState(none, none, own, own, own, each, each, each, each, tail, feedback)

    @property
    def _has_tail(self) -> bool:
        return self.moments.deepspeed_parity and self.workers.granularity == "group" and self.workers.num > 1

    def stage(self, step: Any, freeze_step: Any, xp: Any) -> Any:
        """As in OneBitAdam; the last step of the warm-up is a stage of its own."""
        stage = xp.where(step < freeze_step - 1, 0, xp.where(step < freeze_step, 1, 2))
        return xp.where(step == 0, 3, stage) if self.moments.deepspeed_parity else stage

    def shift(self, state: OneBitLambState) -> None:
        """None: the workers' parameters are equal in every stage."""

    def update(
        self, stage: str, gradients: Tree, state: OneBitLambState, params: Tree, learning_rate: Any, accept: jax.Array
    ) -> tuple[Tree, OneBitLambState]:
        """One step: what to add to the parameters, and the next state."""
        if stage == "noop":
            return jax.tree.map(jnp.zeros_like, params), state
        part = self._compressed if stage == "compressed" else self._full
        direction, new = part(gradients, state, params)
        each = self.workers.spread(new.last, direction)
        changes = jax.tree.map(lambda c, u: -learning_rate * c * u, each, direction)
        state = keep(accept, new, state)
        if stage == "freeze":  # also when this very step is skipped
            state = dataclasses.replace(state, nu_fresh=state.nu, scaling=self._scaling(state.mu))
        return only_if(accept, changes), state

    def _full(self, gradients: Tree, state: OneBitLambState, params: Tree) -> tuple[Tree, OneBitLambState]:
        """A step of the warm-up."""
        moments, count, nu_count = self.moments, state.count + 1, state.nu_count + 1
        mu, nu = moments.step(state.mu, gradients), moments.square(state.nu, gradients)
        direction = moments.decayed(moments.direction(mu, nu, count, nu_count), params)
        weight_norms, norms = self.workers.norms(params, direction)

        def ratio(w: jax.Array, u: jax.Array) -> jax.Array:
            usable = (w > 0) & (u > 0)
            return jnp.where(usable, jnp.clip(w / jnp.where(usable, u, 1), self.min_coeff, self.max_coeff), 1.0)

        ratios = jax.tree.map(ratio, weight_norms, norms)
        average = lambda C, c: jnp.where(c == 1, C, self.coeff_beta * C + (1 - self.coeff_beta) * c)
        coefficient = jax.tree.map(average, state.coefficient, ratios)
        new = dataclasses.replace(
            state, count=count, nu_count=nu_count, mu=mu, nu=nu, coefficient=coefficient, last=ratios
        )
        return direction, new

    def _scaling(self, mu: Tree) -> Tree:
        """s = R / r of every tensor; 1 for one without momentum."""
        (norms,) = self.workers.norms(mu)
        rms = jax.tree.map(lambda norm, size: norm / jnp.sqrt(jnp.float32(size)), norms, self.workers.sizes(mu))
        each = jnp.concatenate([jnp.ravel(r) for r in jax.tree.leaves(self.workers.of_all(rms))])
        mean = each.mean()
        return jax.tree.map(lambda r: jnp.where(r > 0, mean / jnp.where(r > 0, r, 1), 1.0), rms)

    def _compressed(self, gradients: Tree, state: OneBitLambState, params: Tree) -> tuple[Tree, OneBitLambState]:
        """A step at one bit a value."""
        moments, workers, count = self.moments, self.workers, state.count + 1
        sent = moments.sent(state.nu)
        scaling = workers.spread(state.scaling, state.mu)
        scaled = jax.tree.map(jnp.multiply, scaling, moments.step(state.mu, gradients))
        tail = state.tail
        if tail is None:
            mean, feedback = workers.one_bit_mean(scaled, state.feedback, sent)
        else:
            mean, tail, feedback = workers.one_bit_mean_with_tail(scaled, tail, state.feedback)
        mu = moments.held(jax.tree.map(jnp.divide, mean, scaling))
        rebuilt = jax.tree.map(lambda new, old: (new - moments.b1 * old) / (1 - moments.b1), mu, state.mu)
        nu_fresh = moments.square(state.nu_fresh, rebuilt)

        frozen = moments.denominator(state.nu, state.nu_count)
        plain = jax.tree.map(lambda m, d: m / moments.correction(moments.b1, count) / d, mu, frozen)
        direction = moments.decayed(plain, params)
        gains = jax.tree.map(jnp.divide, frozen, moments.denominator(nu_fresh, count))
        if sent is not None:  # or a value that never moves would hold the largest gain at 1
            gains = jax.tree.map(lambda gain, is_sent: jnp.where(is_sent, gain, 0), gains, sent)
        factor = workers.maxima(gains)
        if direction is not plain:
            plain_norms, norms = workers.norms(plain, direction)
            factor = jax.tree.map(_mixed, factor, plain_norms, norms)
        factor = jax.tree.map(self._bounded, factor, state.factor)
        coefficient = jax.tree.map(jnp.multiply, state.coefficient, factor)
        new = dataclasses.replace(
            state, count=count, mu=mu, nu_fresh=nu_fresh, factor=factor, last=coefficient, tail=tail, feedback=feedback
        )
        return direction, new

    def _bounded(self, factor: jax.Array, last: jax.Array) -> jax.Array:
        """Within factor_min and factor_max, then within factor_threshold of the last one."""
        factor = jnp.clip(factor, self.factor_min, self.factor_max)
        return jnp.clip(factor, last * (1 - self.factor_threshold), last * (1 + self.factor_threshold))


def _mixed(factor: jax.Array, plain: jax.Array, whole: jax.Array) -> jax.Array:
    """F q + 1 - q with q = min(1, |u0| / |u|): how much of the update is momentum and not decay."""
    q = jnp.minimum(1.0, plain / jnp.where(whole > 0, whole, 1))
    return factor * q + (1 - q)
