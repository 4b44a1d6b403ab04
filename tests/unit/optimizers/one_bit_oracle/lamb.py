"""1-bit LAMB (arXiv 2104.06069), with decoupled weight decay. l counts tensors.

t <= freeze_step:
  g = mean_i g_i    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2    u = m^ / (sqrt(v^) + eps) + decay p
  c = clip(|p| / |u|, min_coeff, max_coeff), 1 where a norm is 0;  C = beta C + (1 - beta) c unless c = 1
  p = p - lr c u
then the "fresh" variance w = v, and with r_l = |m_l| / sqrt(n_l): s_l = mean(r) / r_l, 1 where that is 0
t > freeze_step:
  m' = AllReduce(s (b1 m + (1 - b1) g_i)) / s
  w = b2 w + (1 - b2) ((m' - b1 m) / (1 - b1))^2;  m = m'
  u0 = m^ / (sqrt(v^) + eps);  u = u0 + decay p
  f = max((sqrt(v^) + eps) / (sqrt(w^) + eps)) over what is not masked (the peer: over all)
  if decay: q = min(1, |u0| / |u|), f = f q + 1 - q
  f = clip(f, factor_min, factor_max), then clip(f, f_last (1 - threshold), f_last (1 + threshold)), f_last = f
  p = p - lr C f u
with m^ = m / (1 - b1^(number of updates of m)), v^ and w^ alike.
"""

import numpy as np

from one_bit_oracle.allreduce import AllReduce, ListAllReduce, padded_size
from one_bit_oracle.rules import OURS, Kind, Rules, clip, correction, finite


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


class OneBitLamb:
    """W workers of 1-bit LAMB; one copy of parameters and moments.

    `coefficients` are those of the last step, `C` their averages, `factors` the last f, `scaling` the s. In the peer's
    dialect all tensors and a tail of padding are one buffer, `average`; the tail is compressed again at every step.
    """

    def __init__(
        self,
        params: list[np.ndarray],
        *,
        num_workers: int,
        freeze_step: int,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        masks: list[np.ndarray] | None = None,
        rules: Rules = OURS,
    ):
        self.params = [np.asarray(p, rules.dtype) for p in params]
        self.m = [np.zeros_like(p) for p in self.params]
        self.v = [np.zeros_like(p) for p in self.params]
        self.w = [np.zeros_like(p) for p in self.params]
        self.t, self.freeze_step, self.num_workers, self.rules = 0, freeze_step, num_workers, rules
        self.m_updates, self.v_updates = 0, 0
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.max_coeff, self.min_coeff, self.coeff_beta = max_coeff, min_coeff, coeff_beta
        self.factor_max, self.factor_min, self.threshold = factor_max, factor_min, factor_threshold
        self.C = [0.0 for _ in self.params]
        self.factors = [1.0 for _ in self.params]
        self.coefficients: list[float] = []
        self.scaling = [1.0 for _ in self.params]
        self.masks = [np.ones(p.shape, bool) for p in self.params] if masks is None else masks
        size = sum(p.size for p in self.params)
        if rules.deepspeed_parity:
            padded = padded_size(size, num_workers, deepspeed_parity=True)
            self.tail = np.zeros(padded - size, rules.dtype)
            self.average = AllReduce(padded, num_workers, rules)
        else:
            self.average = ListAllReduce([p.shape for p in self.params], num_workers, rules)

    def step(self, gradients: list[np.ndarray], *, lr: float) -> Kind:
        """One step with gradients [W, ...] of every worker. Returns what kind of step it was."""
        self.t += 1
        done = self._step(gradients, lr)
        if self.t == self.freeze_step:
            self.w = [v.copy() for v in self.v]
            self.scaling = self._scaling_coefficients()
        return done

    def _step(self, gradients: list[np.ndarray], lr: float) -> Kind:
        if self.rules.deepspeed_parity and self.t == 1:
            return "noop"
        if not self.rules.deepspeed_parity and not finite(gradients).all():
            return "skipped"
        kind: Kind = "full" if self.t <= self.freeze_step else "onebit"
        self.m_updates += 1
        gradients = clip([np.asarray(g, self.rules.dtype) for g in gradients], kind, self.rules)
        self.coefficients = []
        if kind == "full":
            self._warm_up([g.mean(axis=0) for g in gradients], lr)
        else:
            self._compressed(gradients, lr)
        return kind

    def _warm_up(self, mean: list[np.ndarray], lr: float) -> None:
        self.m = [self.b1 * m + (1 - self.b1) * g for m, g in zip(self.m, mean, strict=True)]
        self.v = [self.b2 * v + (1 - self.b2) * g**2 for v, g in zip(self.v, mean, strict=True)]
        self.v_updates += 1
        for k, p in enumerate(self.params):
            u = self._direction(k) + self.weight_decay * p
            c = 1.0
            if norm(p) and norm(u):
                c = min(max(norm(p) / norm(u), self.min_coeff), self.max_coeff)
            if c != 1:
                self.C[k] = self.coeff_beta * self.C[k] + (1 - self.coeff_beta) * c
            self.coefficients.append(c)
            self.params[k] = p - lr * c * u

    def _compressed(self, gradients: list[np.ndarray], lr: float) -> None:
        live = [mask & (v > 0) for mask, v in zip(self.masks, self.v, strict=True)]
        local = [s * (self.b1 * m + (1 - self.b1) * g) for s, m, g in zip(self.scaling, self.m, gradients, strict=True)]
        averages = self._average_with_tail(local) if self.rules.deepspeed_parity else self.average(local, live)
        for k, p in enumerate(self.params):
            last, self.m[k] = self.m[k], averages[k] / self.scaling[k]
            g = (self.m[k] - self.b1 * last) / (1 - self.b1)
            self.w[k] = self.b2 * self.w[k] + (1 - self.b2) * g**2
            u0 = self._direction(k)
            u = u0 + self.weight_decay * p
            self.factors[k] = self._factor(k, live[k], norm(u0), norm(u))
            self.coefficients.append(self.C[k] * self.factors[k])
            self.params[k] = p - lr * self.C[k] * self.factors[k] * u

    def _direction(self, k: int) -> np.ndarray:
        """m^ / (sqrt(v^) + eps)."""
        return (
            self.m[k] / correction(self.b1, self.m_updates, self.rules) / self._denominator(self.v[k], self.v_updates)
        )

    def _denominator(self, v: np.ndarray, num_updates: int) -> np.ndarray:
        """sqrt(v^) + eps."""
        return np.sqrt(v / correction(self.b2, num_updates, self.rules)) + self.eps

    def _scaling_coefficients(self) -> list[float]:
        r = [norm(m) / np.sqrt(m.size) for m in self.m]
        return [float(np.mean(r) / x) if x else 1.0 for x in r]

    def _average_with_tail(self, local: list[np.ndarray]) -> list[np.ndarray]:
        """The peer's: tensors and tail in one buffer; the tail's result is kept, the masks come after."""
        rows = [x.reshape(self.num_workers, -1) for x in local]
        tails = np.broadcast_to(self.tail, (self.num_workers, self.tail.size))
        flat = np.concatenate([*rows, tails], axis=1)
        flat = flat[0] if self.num_workers == 1 else self.average(flat)
        *parts, self.tail = np.split(flat, np.cumsum([x.shape[1] for x in rows]))
        return [part.reshape(p.shape) * mask for part, p, mask in zip(parts, self.params, self.masks, strict=True)]

    def _factor(self, k: int, live: np.ndarray, norm_u0: float, norm_u: float) -> float:
        ratio = self._denominator(self.v[k], self.v_updates) / self._denominator(self.w[k], self.m_updates)
        f = float(np.max(ratio if self.rules.deepspeed_parity else ratio[live], initial=0))
        if self.weight_decay > 0:
            q = min(1.0, norm_u0 / norm_u) if norm_u else 0.0
            f = f * q + 1 - q
        f = min(max(f, self.factor_min), self.factor_max)
        low, high = self.factors[k] * (1 - self.threshold), self.factors[k] * (1 + self.threshold)
        return min(max(f, low), high)
