"""When 0/1 Adam (arXiv 2202.06009) and 1-bit Adam communicate, stepped counter by counter, and what that costs.

The variance is updated at multiples of an interval that doubles after every `var_update_scaler` updates, until it is
frozen; afterwards workers synchronise at multiples of another interval, which doubles after every `local_step_scaler`
steps up to `local_step_clipper`. The peer (DeepSpeed 0.19.6) loses its first step and freezes one step later.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Literal

Kind = Literal["noop", "full", "onebit", "local", "sync"]


@dataclasses.dataclass(kw_only=True)
class ZeroOneSchedule:
    """0/1 Adam's counters. The interval is tested before the counter that may double it moves.

    Example:
        >>> options = {"var_update_scaler": 2, "local_step_scaler": 2, "local_step_clipper": 4}
        >>> schedule = ZeroOneSchedule(var_freeze_step=6, **options)
        >>> [schedule.step() for _ in range(12)]
        ['full', 'full', 'onebit', 'full', 'onebit', 'full', 'sync', 'sync', 'local', 'sync', 'local', 'sync']
    """

    var_freeze_step: int
    var_update_scaler: int = 16
    local_step_scaler: int = 32678
    local_step_clipper: int = 16
    deepspeed_parity: bool = False
    t: int = 0
    var_interval: int = 1
    var_counter: int = 0
    local_step_interval: int = 1
    local_step_counter: int = 0

    @property
    def frozen(self) -> bool:
        """The variance is frozen in all steps that follow."""
        return self.t >= (max(self.var_freeze_step + 1, 2) if self.deepspeed_parity else self.var_freeze_step)

    def step(self) -> Kind:
        """Go one step further. Returns what kind of step it is."""
        frozen = self.frozen
        self.t += 1
        if self.deepspeed_parity and self.t == 1:
            return "noop"
        return self._local_step() if frozen else self._variance_step()

    def _variance_step(self) -> Kind:
        if self.t % self.var_interval:
            return "onebit"
        self.var_counter += 1
        if self.var_counter == self.var_update_scaler:
            self.var_counter = 0
            self.var_interval *= 2
        return "full"

    def _local_step(self) -> Kind:
        kind: Kind = "local" if self.t % self.local_step_interval else "sync"
        self.local_step_counter += 1
        if self.local_step_counter == self.local_step_scaler:
            self.local_step_counter = 0
            self.local_step_interval = min(self.local_step_clipper, 2 * self.local_step_interval)
        return kind


def onebit_kinds(num_steps: int, freeze_step: int) -> list[Kind]:
    """1-bit Adam's and 1-bit LAMB's steps."""
    return ["full" if t <= freeze_step else "onebit" for t in range(1, num_steps + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
    """What a run's steps send.

    skipped: share of steps without a round. bits: per parameter and step, a full round being `full_bits` and a 1-bit
    round one. saving: full_bits / bits, against a run of full rounds.
    """

    full: int
    onebit: int
    none: int
    full_bits: int

    @property
    def steps(self) -> int:
        return self.full + self.onebit + self.none

    @property
    def skipped(self) -> float:
        return self.none / self.steps

    @property
    def bits(self) -> float:
        return (self.full * self.full_bits + self.onebit) / self.steps

    @property
    def saving(self) -> float:
        return self.full_bits / self.bits


def rounds(kinds: Iterable[Kind], *, full_bits: int = 16) -> Rounds:
    """Count the rounds of a run."""
    count = collections.Counter(kinds)
    return Rounds(
        full=count["full"],
        onebit=count["onebit"] + count["sync"],
        none=count["local"] + count["noop"],
        full_bits=full_bits,
    )


def bytes_sent(rounds: Rounds, num_params: int, num_workers: int) -> float:
    """Bytes that one worker sends in the run, scales and padding apart.

    A full round is a ring: 2 (W - 1) / W of the values. A 1-bit round sends (W - 1) / W of N / 8 bytes twice.
    """
    share = 2 * (num_workers - 1) / num_workers
    return share * num_params * (rounds.full * rounds.full_bits + rounds.onebit) / 8
