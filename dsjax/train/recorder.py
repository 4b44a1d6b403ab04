"""Per-step metrics: fetched one step late, so that the device never waits for the host to look at a number."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.observe.progress import Progress
from dsjax.observe.trackers import Tracker
from dsjax.optimizers.api import FreezeRule
from dsjax.optimizers.schedules import Clocks
from dsjax.runs.counters import Counters


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step as it was dispatched.

    Attributes:
        step: its number, from 1.
        device: loss, tokens, grad_norm, finite, first_bad, stop, of some optimizers variance and worker_skips; still
            being computed. In local and sync stages all but stop and worker_skips are [W], and this process' part of
            them counts.
        auxiliary: losses and metrics of the layers' statistics by name (see setup/step.py), like `device`.
        learning_rate: of this step.
        after: the clocks after it.
        flops: what it costs by the formula of observe/flops.py.
        schedule: what is particular about its rows, of a run in which they change: their length and the like.
        data_seconds: time the device had nothing to do because its rows were being fetched (at most).
        compiles: whether its programs were made in it: its time is the compiler's. See Recorder.enter.
        stall: seconds for which it waited for a program that is compiled in the background, not in its time.
    """

    step: int
    device: dict[str, Any]
    auxiliary: dict[str, Any]
    learning_rate: float
    after: Clocks
    flops: float
    schedule: Mapping[str, float]
    data_seconds: float
    compiles: bool
    stall: float


class Recorder:
    """Writes one row a step and keeps the counters.

    Args:
        counters: to go on from; changed in place.
        trackers: where rows go; none on processes other than the first.
        progress: the line that people look at.
        max_skipped: as TrainConfig.max_nonfinite_steps.
        utilisation: FLOPs per second -> model FLOPs utilisation, or None when the peak is unknown.
        tensor_names: names of all tensors, layers of a stack one by one, to name a bad one.
        freeze: how the optimizer's freeze may be decided during the run, or None.
    """

    def __init__(
        self,
        counters: Counters,
        trackers: Sequence[Tracker],
        progress: Progress,
        *,
        max_skipped: int,
        utilisation: Callable[[float], float] | None,
        tensor_names: Sequence[str],
        freeze: FreezeRule | None = None,
    ) -> None:
        self.counters = counters
        self.stop_agreed = False
        self.failures: list[str] = []
        """Failures at the end of the run that did not stop it."""
        self.step_seconds: list[float] = []
        self.data_seconds: list[float] = []
        self.token_rates: list[float] = []
        self.flop_rates: list[float] = []
        self.stalls: list[float] = []
        self._trackers, self._progress = trackers, progress
        self._max_skipped, self._utilisation = max_skipped, utilisation
        self._tensor_names, self._freeze = tensor_names, freeze
        self._pending: StepMetrics | None = None
        self._settled: tuple[dict[str, Any], float] | None = None
        self._mark = time.perf_counter()
        self._stages: set[str] = set()

    def enter(self, stage: str, *, must_wait: bool = False) -> bool:
        """Say which stage of the optimizer the next step runs in, before it is dispatched.

        Args:
            stage: its name.
            must_wait: the program of its size is still being compiled.

        Returns:
            whether its time is the compiler's: it waits, or is the first of its stage in this process. The step before
            does not wait for that.
        """
        known = stage in self._stages
        if known and not must_wait:
            return False
        self._stages.add(stage)
        self.settle()
        return True

    def add(self, metrics: StepMetrics) -> None:
        """Take note of a step and write down the one before it."""
        self.flush()
        self._pending = metrics

    @property
    def recent_seconds(self) -> float | None:
        """Seconds of a recent step; None as long as none has been timed."""
        return statistics.median(self.step_seconds[-9:]) if self.step_seconds else None

    def restart_clock(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the next step's time."""
        self._mark = time.perf_counter()

    def settle(self) -> None:
        """Wait for the last step noted and stop its clock: what follows (evaluation) is no part of its time."""
        if self._pending is None or self._settled is not None:
            return
        host = _local({**self._pending.device, **self._pending.auxiliary})
        now = time.perf_counter()
        self._settled, self._mark = (host, now - self._mark), now

    def flush(self, **extra: float) -> None:
        """Wait for the last step noted and write its row, with extra metrics in it.

        Raises:
            NonFiniteError: the bound on skipped steps is reached; names the first bad tensor.
        """
        self.settle()
        if self._pending is None or self._settled is None:
            return
        metrics, (host, seconds) = self._pending, self._settled
        self._pending = self._settled = None
        self._note_best(extra.get("validation_loss", math.nan))
        self.stop_agreed = self.stop_agreed or bool(host.get("stop", False))
        counters = self.counters
        tokens = metrics.after.tokens - counters.tokens
        counters.steps, counters.tokens, counters.layer_tokens = (
            metrics.step,
            metrics.after.tokens,
            metrics.after.layer_tokens,
        )
        counters.real_tokens += int(host["tokens"])
        row: dict[str, float | int | str] = {
            "step": metrics.step,
            "loss": host["loss"],
            "grad_norm": host["grad_norm"],
            "learning_rate": metrics.learning_rate,
            "tokens": counters.tokens,
            "real_tokens": counters.real_tokens,
            "step_seconds": seconds,
            "data_seconds": metrics.data_seconds,
            "tokens_per_second": tokens / seconds,
            **metrics.schedule,
            **{name: host[name] for name in metrics.auxiliary},
            **extra,
        }
        if metrics.stall:
            row["stall_seconds"] = metrics.stall
            self.stalls.append(metrics.stall)
        if metrics.compiles:
            row["compiled"] = 1
        else:
            counters.seconds += seconds
            self.step_seconds.append(seconds)
            self.data_seconds.append(metrics.data_seconds)
            self.token_rates.append(tokens / seconds)
            self.flop_rates.append(metrics.flops / seconds)
        if self._utilisation is not None:
            row["mfu"] = self._utilisation(metrics.flops / seconds)
        bad = self._count_skipped(metrics, finite=host["finite"], first_bad=int(host["first_bad"]))
        if self._freeze is not None and "variance" in host:
            self._look_at_variance(metrics.step, host["variance"])
        row["skipped"] = counters.skipped
        if "worker_skips" in host:
            row["worker_skips"] = int(host["worker_skips"])
        if bad:
            row["first_bad_tensor"] = bad
        for tracker in self._trackers:
            tracker.log(metrics.step, row)
        shown = {"loss": host["loss"], "learning_rate": metrics.learning_rate, "tokens_per_second": tokens / seconds}
        if metrics.schedule:
            shown["tokens"] = counters.tokens
        shown |= {name: host[name] for name in metrics.auxiliary}
        self._progress.update(metrics.step, **shown, **metrics.schedule, **extra)
        self._stop_if_hopeless(metrics.step, bad)

    def commit(self) -> None:
        """Write the last row and see to it that all rows outlive this process: before a checkpoint counts them.

        Raises:
            NonFiniteError: as `flush`.
        """
        self.flush()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Close the trackers, each of them: one that fails leaves the others their last rows."""
        for tracker in self._trackers:
            try:
                tracker.close()
            except OSError as error:
                self.failed(type(tracker).__name__, error)

    def failed(self, what: str, error: BaseException, *, advice: str = "") -> None:
        """Note a failure that must not cost what else the run leaves behind, and what to do about it."""
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        self.failures.append(f"{what} failed: {reason}" + (f"; {advice}" if advice else ""))

    def _note_best(self, loss: float) -> None:
        best = self.counters.best_validation
        if math.isfinite(loss):
            self.counters.best_validation = loss if best is None else min(best, loss)

    def _look_at_variance(self, step: int, variance: float) -> None:
        """Decide on the freeze, from metrics that are equal on all processes."""
        rule, counters = self._freeze, self.counters
        if rule is None or counters.freeze_step is not None or step % rule.every:
            return
        before, counters.variance = counters.variance, variance
        if before and variance > 0 and abs(math.log(variance / before)) < rule.tolerance:
            counters.freeze_step = step + rule.lag
            self._progress.note(
                f"step {step}: the variance has settled; it is frozen after step {counters.freeze_step}"
            )

    def _count_skipped(self, metrics: StepMetrics, *, finite: bool, first_bad: int) -> str:
        """Count a skipped step; the name of its first tensor that is not finite, '' for a good step."""
        if finite:
            self.counters.skipped_in_a_row = 0
            return ""
        self.counters.skipped += 1
        self.counters.skipped_in_a_row += 1
        bad = self._tensor_names[first_bad] if first_bad >= 0 else "the loss"
        self._progress.note(f"step {metrics.step}: gradient not finite, first in {bad}; the step changes nothing")
        return bad

    def _stop_if_hopeless(self, step: int, bad: str) -> None:
        """Raise NonFiniteError once the bound on skipped steps is reached."""
        if self.counters.skipped_in_a_row >= self._max_skipped:
            raise NonFiniteError(
                f"{self.counters.skipped_in_a_row} steps in a row had a gradient that is not finite, the last at step "
                f"{step}, first in {bad}; the parameters are those before them. Start again with a lower "
                "learning rate, look at the data of these steps, or raise train.max_nonfinite_steps and resume"
            )


def _local(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics on the host; of [W] that are spread over processes this process' part, each worker's once."""
    spread = lambda x: isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    once = lambda x: list({str(shard.index): shard.data for shard in x.addressable_shards}.values())
    workers = next((x.shape[0] for x in metrics.values() if spread(x)), 1)
    local = jax.device_get({name: once(x) if spread(x) else x for name, x in metrics.items()})
    return {name: _scalar(name, value, workers) for name, value in local.items()}


def _scalar(name: str, value: Any, workers: int) -> Any:
    """A metric as a Python scalar; of several workers the mean, finite if any is, the largest first_bad.

    Of tokens it is the sum; what the workers of other processes had is not known, and taken to be as much.
    """
    each = np.concatenate([np.ravel(part) for part in value]) if isinstance(value, list) else np.ravel(value)
    if name == "tokens" and isinstance(value, list):
        return round(each.mean() * workers)
    if each.size == 1:
        return each[0].item()
    how = {"tokens": np.sum, "finite": np.any, "first_bad": np.max}.get(name, np.mean)
    return how(each).item()
