"""0/1 Adam (arXiv 2202.06009), with decoupled weight decay.

Until the variance is frozen, at step t:
  if t mod var_interval = 0:  g = mean_i g_i, v = b2 v + (1 - b2) g^2    else: g = AllReduce(g_i)
  m = b1 m + (1 - b1) g       p = p - lr (m^ / (sqrt(v^) + eps) + decay p)
then the errors are forgotten, and every worker goes on alone, u_i being how far from p it has gone:
  m_i = b1 m_i + (1 - b1) g_i    lrs_i = lrs_i + lr    u_i = u_i - lr (m_i^ / (sqrt(v^) + eps) + decay (p + u_i))
  if t mod local_step_interval = 0:
    B = AllReduce(u_i (sqrt(v^) + eps))    m_i^ = -B / mean_i lrs_i    p = p + B / (sqrt(v^) + eps)    u_i = lrs_i = 0
with m^ = m / (1 - b1^(number of updates of m)), v^ alike. dsjax keeps p and u_i; the peer keeps p_i = p + u_i and u_i,
and takes u_i from p_i before every synchronisation. In dsjax, masked elements stay where they are once workers are
alone: a gradient that comes after the freeze where v is zero would be divided by eps.
"""

import numpy as np
from schedules_oracle import ZeroOneSchedule

from one_bit_oracle.allreduce import ListAllReduce
from one_bit_oracle.rules import OURS, Kind, Rules, clip, correction, finite


class ZeroOneAdam:
    """W workers of 0/1 Adam.

    `m` and `u` are [W, ...] per tensor, `v` is [...], `lrs` [W]. `params` is [...], or [W, ...] in the peer's dialect;
    `worker_params` is [W, ...] in both.
    """

    def __init__(
        self,
        params: list[np.ndarray],
        *,
        num_workers: int,
        var_freeze_step: int,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32678,
        local_step_clipper: int = 16,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masks: list[np.ndarray] | None = None,
        rules: Rules = OURS,
    ):
        self.schedule = ZeroOneSchedule(
            var_freeze_step=var_freeze_step,
            var_update_scaler=var_update_scaler,
            local_step_scaler=local_step_scaler,
            local_step_clipper=local_step_clipper,
            deepspeed_parity=rules.deepspeed_parity,
        )
        params = [np.asarray(p, rules.dtype) for p in params]
        rows = [np.broadcast_to(p, (num_workers, *p.shape)) for p in params]
        self.params = rows if rules.deepspeed_parity else params
        self.m = [np.zeros_like(x) for x in rows]
        self.u = [np.zeros_like(x) for x in rows]
        self.v = [np.zeros_like(p) for p in params]
        self.lrs = np.zeros(num_workers, rules.dtype)
        self.m_updates, self.v_updates = 0, 0
        self.num_workers, self.rules = num_workers, rules
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.masks = [np.ones(p.shape, bool) for p in params] if masks is None else masks
        self.average = ListAllReduce([p.shape for p in params], num_workers, rules)

    @property
    def worker_params(self) -> list[np.ndarray]:
        return self.params if self.rules.deepspeed_parity else [p + u for p, u in zip(self.params, self.u, strict=True)]

    def step(self, gradients: list[np.ndarray], *, lr: float) -> Kind:
        """One step with gradients [W, ...] of every worker. Returns what kind of step it was."""
        was_frozen = self.schedule.frozen
        kind = self.schedule.step()
        use = np.ones(self.num_workers, bool) if self.rules.deepspeed_parity else finite(gradients)
        if kind == "noop" or (kind in ("full", "onebit") and not use.all()):
            done: Kind = "noop" if kind == "noop" else "skipped"
        else:
            done = kind
            self.m_updates += 1
            gradients = [np.where(use.reshape(-1, *[1] * (g.ndim - 1)), g, 0) for g in gradients]
            gradients = clip([np.asarray(g, self.rules.dtype) for g in gradients], kind, self.rules)
            if kind in ("full", "onebit"):
                self._together(gradients, kind, lr)
            else:
                self._alone(gradients, use, lr)
                if kind == "sync":
                    self._synchronise()
        if self.schedule.frozen and not was_frozen:
            self.average.reset()
        return done

    def _together(self, gradients: list[np.ndarray], kind: Kind, lr: float) -> None:
        if kind == "full":
            self.v_updates += 1
            mean = [g.mean(axis=0) for g in gradients]
            self.v = [self.b2 * v + (1 - self.b2) * g**2 for v, g in zip(self.v, mean, strict=True)]
        else:
            mean = self._one_bit(gradients)
        # The peer, alone, has no average in a 1-bit step and leaves m as it is.
        if kind == "full" or self.num_workers > 1 or not self.rules.deepspeed_parity:
            self.m = [self.b1 * m + (1 - self.b1) * g for m, g in zip(self.m, mean, strict=True)]
        for k, p in enumerate(self.params):
            m = self.m[k] if self.rules.deepspeed_parity else self.m[k][0]
            m = m / self._m_correction()
            self.params[k] = p - lr * (m / self._denominator(k) + self.weight_decay * p)

    def _alone(self, gradients: list[np.ndarray], use: np.ndarray, lr: float) -> None:
        self.lrs = self.lrs + np.where(use, np.asarray(lr, self.rules.dtype), 0)
        for k, p in enumerate(self.worker_params):
            keep = use.reshape(-1, *[1] * (p.ndim - 1))
            live = np.ones(p.shape, bool) if self.rules.deepspeed_parity else self.masks[k] & (self.v[k] > 0)
            m = np.where(live, self.b1 * self.m[k] + (1 - self.b1) * gradients[k], 0)
            self.m[k] = np.where(keep, m, self.m[k])
            U = m / self._m_correction() / self._denominator(k) + self.weight_decay * p
            U = np.where(keep & live, U, 0)
            self.u[k] = self.u[k] - lr * U
            if self.rules.deepspeed_parity:
                self.params[k] = p - lr * U

    def _synchronise(self) -> None:
        lrs = self.lrs.mean()
        if self.rules.deepspeed_parity:
            self.params = [p - u for p, u in zip(self.params, self.u, strict=True)]
        elif lrs == 0:
            return
        B = self._one_bit([u * self._denominator(k) for k, u in enumerate(self.u)])
        for k, p in enumerate(self.params):
            self.m[k] = np.broadcast_to(-B[k] / lrs * self._m_correction(), self.m[k].shape)
            self.params[k] = p + B[k] / self._denominator(k)
            self.u[k] = np.zeros_like(self.u[k])
        self.lrs = np.zeros_like(self.lrs)

    def _m_correction(self) -> float:
        return correction(self.b1, self.m_updates, self.rules)

    def _denominator(self, k: int) -> np.ndarray:
        """sqrt(v^) + eps."""
        return np.sqrt(self.v[k] / correction(self.b2, self.v_updates, self.rules)) + self.eps

    def _one_bit(self, tensors: list[np.ndarray]) -> list[np.ndarray]:
        if not self.rules.deepspeed_parity:
            return self.average(tensors, [mask & (v > 0) for mask, v in zip(self.masks, self.v, strict=True)])
        averages = self.average(tensors)
        if self.num_workers == 1:
            return averages
        return [x * mask for x, mask in zip(averages, self.masks, strict=True)]
