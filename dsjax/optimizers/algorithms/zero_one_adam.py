"""0/1 Adam (arXiv 2202.06009): Adam with a variance that is seldom updated, one-bit gradients, and skipped rounds.

While the variance is learnt (t <= var_freeze_step), g_i the gradient of worker i:

    t a multiple of the variance's interval      g = mean of g_i in float32      v = b2 v + (1 - b2) g^2
    every other t                                g = one_bit_mean(g_i)           v stays
    m = b1 m + (1 - b1) g      w -= lr (m^ / (sqrt(v^) + eps) + decay w)

the interval beginning at 1 and doubling after every kappa (var_update_scaler) updates of v. Afterwards v is frozen, and
every worker takes steps of its own, w_i = w + u_i, from a w that all of them share:

    m_i = b1 m_i + (1 - b1) g_i      U = m_i^ / (sqrt(v^) + eps) + decay w_i      u_i -= lr U      L += lr
    t a multiple of the local interval:      B = one_bit_mean(u_i (sqrt(v^) + eps))      m = -B / L (uncorrected)
                                             w += B / (sqrt(v^) + eps)                   u_i = 0      L = 0

that interval beginning at 1 and doubling every local_step_scaler steps, up to local_step_clipper. Errors, which were
those of gradients, begin anew at the freeze. From then on values that are masked, or have no variance, stay as they
are. Between syncs the model's parameters are w: evaluation and weights that are written use it, and a checkpoint has
every worker's u_i and m_i beside it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dsjax.collectives.one_bit import Feedback
from dsjax.optimizers.algorithms.onebit_adam import Moments
from dsjax.optimizers.api import Kind
from dsjax.optimizers.workers import Tree, Workers, keep, only_if


@dataclasses.dataclass(frozen=True)
class Displaced:
    """State that differs between workers; every array has a dimension W, sharded over their axis.

    Attributes:
        mu: momentum m_i, float32 (before the freeze equal on all workers).
        shift: u_i, how far the worker is from the shared parameters.
        rates: L, the sum of learning rates since the last sync, [W].
        skipped: steps since the last sync that the worker skipped because its gradient was not finite, [W] int32.
    """

    mu: Tree
    shift: Tree
    rates: Any
    skipped: Any


@dataclasses.dataclass(frozen=True)
class ZeroOneAdamState:
    """Kept by 0/1 Adam.

    Attributes:
        count, nu_count, nu, feedback: as in OneBitAdamState.
        displaced: what differs between workers.
        skipped: steps of single workers that were skipped, as known at the last sync, int32.
    """

    count: Any
    nu_count: Any
    nu: Tree
    displaced: Displaced
    skipped: Any
    feedback: Feedback


jax.tree_util.register_dataclass(Displaced)
jax.tree_util.register_dataclass(ZeroOneAdamState)


@functools.lru_cache(maxsize=64)
def variance_steps(end: int, kappa: int, *, start: int = 1) -> np.ndarray:
    """The t in start..end at which the variance is updated.

    Example:
        >>> variance_steps(24, 3).tolist()
        [1, 2, 3, 4, 6, 8, 12, 16, 20, 24]
    """
    steps, interval, updates, t = [], 1, 0, start
    while t <= end:
        steps.append(t)
        updates += 1
        if updates == kappa:
            updates, interval = 0, 2 * interval
        t = (t // interval + 1) * interval
    return np.array(steps, np.int64)


@dataclasses.dataclass(frozen=True)
class ZeroOneAdam:
    """The algorithm, on one device's parts; the constants are those of the module's equations."""

    workers: Workers
    moments: Moments
    var_freeze_step: int
    var_update_scaler: int = 16
    local_step_scaler: int = 32678
    local_step_clipper: int = 16

    names: ClassVar[tuple[str, ...]] = ("full", "compressed", "first_sync", "sync", "local", "noop")
    kinds: ClassVar[Mapping[str, Kind]] = {
        "full": "full", "compressed": "compressed", "first_sync": "sync", "sync": "sync", "local": "local",
        "noop": "full",
    }  # fmt: skip

    @property
    def last_full(self) -> int:
        """The last step before the freeze, counted from 1."""
        return self.var_freeze_step

    def init(self, params: Tree) -> ZeroOneAdamState:
        """The first state, in global shapes."""
        count = lambda: jnp.zeros((), jnp.int32)
        each = lambda dtype: jnp.zeros(self.workers.num, dtype)
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        displaced = Displaced(
            self.workers.zeros(params), self.workers.zeros(params), each(jnp.float32), each(jnp.int32)
        )
        return ZeroOneAdamState(count(), count(), zeros, displaced, count(), self.workers.feedback(params))

    def specs(self, params: Tree) -> ZeroOneAdamState:
        """The PartitionSpecs of the state, as `init` shapes it."""
        none, each, own = PartitionSpec(), PartitionSpec(self.workers.axis), self.workers.specs_of_kept(params)
        displaced = Displaced(own, own, each, each)
        feedback = self.workers.feedback_specs(params)
        return ZeroOneAdamState(none, none, self.workers.spec_tree(params), displaced, none, feedback)

    def stage(self, step: Any, freeze_step: Any, xp: Any) -> Any:
        """As in OneBitAdam; `freeze_step` is the last step at which the variance may be learnt."""
        deepspeed_parity, t = int(self.moments.deepspeed_parity), step + 1
        last = freeze_step + deepspeed_parity
        learnt = variance_steps(int(last), self.var_update_scaler, start=1 + deepspeed_parity)
        learning = xp.where(xp.isin(t, xp.asarray(learnt)), 0, 1)
        done = t - last - 1  # steps since the freeze
        doublings = xp.clip(done // self.local_step_scaler, 0, 30)
        interval = xp.minimum(self.local_step_clipper, 2**doublings)
        later = xp.where(done == 0, 2, xp.where(t % interval == 0, 3, 4))
        stage = xp.where(t <= last, learning, later)
        return xp.where(step == 0, 5, stage) if deepspeed_parity else stage

    def shift(self, state: ZeroOneAdamState) -> Tree:
        """u_i of the workers, [W, ...]."""
        return state.displaced.shift

    def update(
        self, stage: str, gradients: Tree, state: ZeroOneAdamState, params: Tree, learning_rate: Any, accept: jax.Array
    ) -> tuple[Tree, ZeroOneAdamState]:
        """One step: what to add to the shared parameters, and the next state."""
        match self.kinds[stage]:
            case _ if stage == "noop":
                return jax.tree.map(jnp.zeros_like, params), state
            case "full" | "compressed":
                return self._learn(stage, gradients, state, params, learning_rate, accept)
            case _:
                state = self._walk(gradients, state, params, learning_rate, accept)
                if stage == "local":
                    return jax.tree.map(jnp.zeros_like, params), state
                return self._sync(state, first=stage == "first_sync")

    def _learn(
        self, stage: str, gradients: Tree, state: ZeroOneAdamState, params: Tree, learning_rate: Any, accept: jax.Array
    ) -> tuple[Tree, ZeroOneAdamState]:
        """A step while the variance is learnt: all workers do the same."""
        moments, workers, displaced = self.moments, self.workers, state.displaced
        nu, nu_count, feedback = state.nu, state.nu_count, state.feedback
        if stage == "full":
            nu, nu_count = moments.square(nu, gradients), nu_count + 1
            if not moments.deepspeed_parity and moments.mask_unseen:
                newly = jax.tree.map(lambda old, new: (old == 0) & (new > 0), state.nu, nu)
                feedback = workers.reset_errors(feedback, newly)
        else:
            gradients, feedback = workers.one_bit_mean(gradients, feedback, moments.sent(nu))
            gradients = moments.held(gradients)
        count, mu = state.count + 1, workers.own(displaced.mu)
        if not (
            moments.deepspeed_parity and stage == "compressed" and workers.num == 1
        ):  # DeepSpeed does not update the momentum of a single worker
            mu = moments.step(mu, gradients)
        direction = moments.decayed(moments.direction(mu, nu, count, nu_count), params)
        changes = jax.tree.map(lambda u: -learning_rate * u, direction)
        new = dataclasses.replace(
            state, count=count, nu_count=nu_count, nu=nu, feedback=feedback,
            displaced=dataclasses.replace(displaced, mu=workers.kept(mu)),
        )  # fmt: skip
        return only_if(accept, changes), keep(accept, new, state)

    def _walk(
        self, gradients: Tree, state: ZeroOneAdamState, params: Tree, learning_rate: Any, accept: jax.Array
    ) -> ZeroOneAdamState:
        """A worker's own step; one whose gradient is not finite stays where it is."""
        moments, workers, displaced, count = self.moments, self.workers, state.displaced, state.count + 1
        old_mu, old_shift = workers.own(displaced.mu), workers.own(displaced.shift)
        mu = moments.step(old_mu, gradients)
        here = jax.tree.map(jnp.add, params, old_shift)
        sent = moments.sent(state.nu)
        # A first gradient after the freeze would be divided by eps: such values stay.
        stay = lambda tree: tree if sent is None else jax.tree.map(lambda x, s: jnp.where(s, x, 0), tree, sent)
        mu = stay(mu)
        direction = stay(moments.decayed(moments.direction(mu, state.nu, count, state.nu_count), here))
        shift = jax.tree.map(lambda s, u: s - learning_rate * u, old_shift, direction)
        walked = Displaced(
            mu=workers.kept(keep(accept, mu, old_mu)),
            shift=workers.kept(keep(accept, shift, old_shift)),
            rates=displaced.rates + jnp.where(accept, learning_rate, 0.0),
            skipped=displaced.skipped + jnp.where(accept, 0, 1),
        )
        return dataclasses.replace(state, count=count, displaced=walked)

    def _sync(self, state: ZeroOneAdamState, *, first: bool) -> tuple[Tree, ZeroOneAdamState]:
        """Set all workers to the same parameters."""
        moments, workers, displaced = self.moments, self.workers, state.displaced
        rates, skipped = workers.mean_of_scalars(displaced.rates[0], displaced.skipped[0].astype(jnp.float32))
        moved = rates > 0  # no learning rate, no displacement: nothing to average
        before = jax.tree.map(jnp.zeros_like, state.feedback) if first else state.feedback
        denominator = moments.denominator(state.nu, state.nu_count)
        shift = workers.own(displaced.shift)
        scaled = jax.tree.map(jnp.multiply, shift, denominator)
        mean, feedback = workers.one_bit_mean(scaled, before, moments.sent(state.nu))
        mean = moments.held(mean)
        share = moments.correction(moments.b1, state.count) / jnp.where(moved, rates, 1)
        mu = keep(moved, jax.tree.map(lambda b: -b * share, mean), workers.own(displaced.mu))
        changes = jax.tree.map(lambda b, d: jnp.where(moved, b / d, 0), mean, denominator)
        settled = Displaced(
            mu=workers.kept(mu),
            shift=jax.tree.map(jnp.zeros_like, displaced.shift),
            rates=jnp.zeros_like(displaced.rates),
            skipped=jnp.zeros_like(displaced.skipped),
        )
        total = state.skipped + jnp.round(skipped * workers.num).astype(jnp.int32)
        feedback = keep(moved, feedback, before)
        return changes, dataclasses.replace(state, displaced=settled, skipped=total, feedback=feedback)
