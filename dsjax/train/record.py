"""What a step figures to: fetched one step late, so that the device never waits for the host to look at a number."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.models.naming import leaf_names
from dsjax.observe.progress import Progress
from dsjax.observe.trackers import Tracker
from dsjax.optimizers.schedules import Clocks


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that was not finite."""


@dataclasses.dataclass
class Counters:
    """What is counted over a whole run, across resumes; saved in every checkpoint.

    Attributes:
        steps: optimizer steps, skipped ones included.
        tokens: effective tokens: rows x sequence length.
        real_tokens: target tokens that counted in the loss.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: the last of them, up to now.
        best_validation: the lowest validation loss, nats per token; None before the first.
        seconds: time spent in steps, compilation and evaluation left out.
    """

    steps: int = 0
    tokens: int = 0
    real_tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_validation: float | None = None
    seconds: float = 0.0

    @property
    def clocks(self) -> Clocks:
        """The two clocks that schedules read."""
        return Clocks(self.steps, self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One step as it was dispatched.

    Attributes:
        step: its number, from 1.
        device: loss, tokens, grad_norm, finite, squared_norms, stop; still being computed.
        learning_rate: of this step.
        tokens: effective tokens up to and with this step.
        data_seconds: time the device had nothing to do because its rows were being fetched (at most).
    """

    step: int
    device: dict[str, Any]
    learning_rate: float
    tokens: int
    data_seconds: float


class Recorder:
    """Writes one row a step and keeps the counters.

    Args:
        counters: to go on from; changed in place.
        trackers: where rows go; none on processes other than the first.
        progress: the line that people look at.
        max_skipped: as TrainConfig.max_nonfinite_steps.
        utilisation: tokens per second -> model FLOPs utilisation, or None when the peak is unknown.
        layer_runs: lengths of the stacks of layers, to name a tensor by its layer.
    """

    def __init__(
        self,
        counters: Counters,
        trackers: Sequence[Tracker],
        progress: Progress,
        *,
        max_skipped: int,
        utilisation: Callable[[float], float] | None,
        layer_runs: tuple[int, ...],
    ) -> None:
        self.counters = counters
        self.stop_agreed = False
        self.step_seconds: list[float] = []
        self.data_seconds: list[float] = []
        self._trackers, self._progress = trackers, progress
        self._max_skipped, self._utilisation = max_skipped, utilisation
        self._layer_runs = layer_runs
        self._pending: StepFigures | None = None
        self._settled: tuple[dict[str, Any], float] | None = None
        self._mark = time.perf_counter()
        self._compiling = True

    def add(self, figures: StepFigures) -> None:
        """Take note of a step and write down the one before it."""
        self.flush()
        self._pending = figures

    def restart_clock(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the next step's time."""
        self._mark = time.perf_counter()

    def settle(self) -> None:
        """Wait for the last step noted and stop its clock: what follows (evaluation) is no part of its time."""
        if self._pending is None or self._settled is not None:
            return
        small = {name: value for name, value in self._pending.device.items() if name != "squared_norms"}
        host = {name: np.asarray(value).item() for name, value in jax.device_get(small).items()}
        now = time.perf_counter()
        self._settled, self._mark = (host, now - self._mark), now

    def flush(self, **extra: float) -> None:
        """Wait for the last step noted and write its row, with extra figures in it.

        Raises:
            NonFiniteError: the bound on skipped steps is reached; names the first bad tensor.
        """
        self.settle()
        if self._pending is None or self._settled is None:
            return
        figures, (host, seconds) = self._pending, self._settled
        self._pending = self._settled = None
        self._note_best(extra.get("validation_loss", math.nan))
        self.stop_agreed = self.stop_agreed or bool(host.get("stop", False))
        counters = self.counters
        tokens = figures.tokens - counters.tokens
        counters.steps, counters.tokens = figures.step, figures.tokens
        counters.real_tokens += int(host["tokens"])
        row: dict[str, float | int | str] = {
            "step": figures.step,
            "loss": host["loss"],
            "grad_norm": host["grad_norm"],
            "learning_rate": figures.learning_rate,
            "tokens": counters.tokens,
            "real_tokens": counters.real_tokens,
            "step_seconds": seconds,
            "data_seconds": figures.data_seconds,
            "tokens_per_second": tokens / seconds,
            **extra,
        }
        if self._compiling:
            row["compiled"] = 1  # this step's time is the compiler's
            self._compiling = False
        else:
            counters.seconds += seconds
            self.step_seconds.append(seconds)
            self.data_seconds.append(figures.data_seconds)
        if self._utilisation is not None:
            row["mfu"] = self._utilisation(tokens / seconds)
        bad = self._count_skipped(figures, finite=host["finite"])
        row["skipped"] = counters.skipped
        if bad:
            row["first_bad_tensor"] = bad
        for tracker in self._trackers:
            tracker.log(figures.step, row)
        shown = {"loss": host["loss"], "learning_rate": figures.learning_rate, "tokens_per_second": tokens / seconds}
        self._progress.update(figures.step, **shown, **extra)
        if counters.skipped_in_a_row >= self._max_skipped:
            raise NonFiniteError(
                f"{counters.skipped_in_a_row} steps in a row had a gradient that is not finite, the last at step "
                f"{figures.step}, first in {bad}; the parameters are those before them. Start again with a lower "
                "learning rate, look at the data of these steps, or raise train.max_nonfinite_steps and resume"
            )

    def _note_best(self, loss: float) -> None:
        best = self.counters.best_validation
        if math.isfinite(loss):
            self.counters.best_validation = loss if best is None else min(best, loss)

    def _count_skipped(self, figures: StepFigures, *, finite: bool) -> str:
        """Count a skipped step; the name of its first tensor that is not finite, '' for a good step."""
        if finite:
            self.counters.skipped_in_a_row = 0
            return ""
        self.counters.skipped += 1
        self.counters.skipped_in_a_row += 1
        bad = first_bad_tensor(figures.device["squared_norms"], self._layer_runs)
        self._progress.note(f"step {figures.step}: gradient not finite, first in {bad}; the step changes nothing")
        return bad


def first_bad_tensor(squared_norms: Any, layer_runs: tuple[int, ...]) -> str:
    """The name of the first tensor whose squared norm is not finite ('the loss' if every gradient is finite).

    Args:
        squared_norms: a tree like the parameters; of a stack [L].
        layer_runs: lengths of the stacks, so that a layer is called by its number.

    Example:
        >>> norms = {"norm": np.float32(1), "segments": [{"up": np.ones(1)}, {"up": np.array([1, np.nan])}]}
        >>> first_bad_tensor(norms, (1, 2))
        'layers.2.up'
    """
    names = leaf_names(squared_norms, layer_runs)
    for (layers, _), squares in zip(names, jax.tree.leaves(jax.device_get(squared_norms)), strict=True):
        bad = np.flatnonzero(~np.isfinite(np.atleast_1d(squares)))
        if len(bad):
            return layers[bad[0]]
    return "the loss"
