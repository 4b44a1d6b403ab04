"""1-bit Adam (arXiv 2102.02888), with decoupled weight decay.

  t <= freeze_step:  g = mean_i g_i    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2
  t >  freeze_step:  m_i = b1 m + (1 - b1) g_i    m = AllReduce(m_i)    v stays
  p = p - lr (m^ / (sqrt(v^) + eps) + decay p)
with m^ = m / (1 - b1^(number of updates of m)), v^ alike, or m and v themselves without bias correction. A step with a
gradient that is not finite does nothing, but it is counted in t.
"""

import numpy as np

from one_bit_oracle.allreduce import ListAllReduce
from one_bit_oracle.rules import OURS, Kind, Rules, clip, correction, finite


class OneBitAdam:
    """W workers of 1-bit Adam.

    Parameters and moments are the same on all workers, so there is one copy: lists over tensors.

    Example:
        >>> adam = OneBitAdam([np.zeros(3)], num_workers=2, freeze_step=1)
        >>> gradients = [np.array([[1.0, -2.0, 3.0], [3.0, -4.0, 1.0]])]
        >>> [adam.step(gradients, lr=0.1) for _ in range(2)]
        ['full', 'onebit']
        >>> adam.params[0].round(2).tolist()
        [-0.22, 0.18, -0.22]
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
        masks: list[np.ndarray] | None = None,
        rules: Rules = OURS,
    ):
        self.params = [np.asarray(p, rules.dtype) for p in params]
        self.m = [np.zeros_like(p) for p in self.params]
        self.v = [np.zeros_like(p) for p in self.params]
        self.t, self.freeze_step, self.rules = 0, freeze_step, rules
        self.m_updates, self.v_updates = 0, 0
        self.b1, self.b2, self.eps, self.weight_decay = b1, b2, eps, weight_decay
        self.masks = [np.ones(p.shape, bool) for p in self.params] if masks is None else masks
        self.average = ListAllReduce([p.shape for p in self.params], num_workers, rules)

    def step(self, gradients: list[np.ndarray], *, lr: float) -> Kind:
        """One step with gradients [W, ...] of every worker. Returns what kind of step it was."""
        self.t += 1
        if self.rules.deepspeed_parity and self.t == 1:
            return "noop"
        if not self.rules.deepspeed_parity and not finite(gradients).all():
            return "skipped"
        kind: Kind = "full" if self.t <= self.freeze_step else "onebit"
        gradients = clip([np.asarray(g, self.rules.dtype) for g in gradients], kind, self.rules)
        self.m_updates += 1
        if kind == "full":
            self.v_updates += 1
            mean = [g.mean(axis=0) for g in gradients]
            self.m = [self.b1 * m + (1 - self.b1) * g for m, g in zip(self.m, mean, strict=True)]
            self.v = [self.b2 * v + (1 - self.b2) * g**2 for v, g in zip(self.v, mean, strict=True)]
        else:
            local = [self.b1 * m + (1 - self.b1) * g for m, g in zip(self.m, gradients, strict=True)]
            if self.rules.deepspeed_parity:
                self.m = [m * mask for m, mask in zip(self.average(local), self.masks, strict=True)]
            else:
                live = [mask & (v > 0) for mask, v in zip(self.masks, self.v, strict=True)]
                self.m = self.average(local, live)
        for k, p in enumerate(self.params):
            m = self.m[k] / correction(self.b1, self.m_updates, self.rules)
            v = self.v[k] / correction(self.b2, self.v_updates, self.rules)
            self.params[k] = p - lr * (m / (np.sqrt(v) + self.eps) + self.weight_decay * p)
        return kind
