"""The steps of a run, one after another: batch, gradients, update, and now and then a look at how it goes."""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np

from dsjax.config.run import ResolvedRunConfig
from dsjax.data.curriculum.difficulty import difficulties
from dsjax.data.rows.pipeline import Batches
from dsjax.evaluate.validation import Validation
from dsjax.mesh.processes import agree_any
from dsjax.observe.profile import TraceWindow
from dsjax.optimizers.schedules import learning_rate
from dsjax.plan.cost import Cost
from dsjax.runs.saving import Saver
from dsjax.setup.assembly import Setup
from dsjax.setup.dispatch import Gradients
from dsjax.setup.programs import Programs
from dsjax.setup.schedule import StepSchedule
from dsjax.setup.state import TrainState
from dsjax.train.recorder import Recorder, StepMetrics
from dsjax.train.signals import StopRequest


@dataclasses.dataclass(frozen=True)
class Instruments:
    """Resources that are open around the steps of a run.

    Attributes:
        batches: the rows of each step.
        recorder: told of each step.
        validation: of the state; None without validation rows.
        saver: of checkpoints.
        stop: whether a signal asks to stop.
        profile: the folder of a trace, if one is asked for.
    """

    batches: Batches
    recorder: Recorder
    validation: Validation | None
    saver: Saver
    stop: StopRequest
    profile: Path


def train_steps(setup: Setup, programs: Programs, state: TrainState, instruments: Instruments) -> TrainState:
    """The steps that are left; the state after the last, or after the one at which a signal stopped them."""
    schedule, optimizer, recorder = setup.schedule, setup.optimizer, instruments.recorder
    counters, cost = recorder.counters, Cost.of(setup)
    rates, peak = setup.config.optimizer.schedule, setup.config.optimizer.learning_rate
    end, warmed = schedule.clocks(schedule.num_steps), schedule.warmed(rates)
    trace = TraceWindow(setup.config.observe.profile, instruments.profile)
    stage_at = lambda step: optimizer.stage(step, counters.freeze_step)
    gradients_at = Gradients(programs, optimizer, schedule, stage_at)
    recorder.restart_clock()
    with gradients_at:
        for step in range(counters.steps, schedule.num_steps):
            trace.step(step + 1, pending=state.step)
            before = time.perf_counter()
            _, rows = next(instruments.batches)
            batch = setup.placements[schedule.bucket_at(step).rows](rows)
            # Rows that came while the device was still at the last step's work kept nobody waiting.
            waited = time.perf_counter() - before if state.step.is_ready() else 0.0

            after, stage = schedule.clocks(step + 1), stage_at(step)
            rate = learning_rate(rates, peak, after=after, end=end, warmed=warmed)
            compiles = recorder.enter(stage, must_wait=gradients_at.must_wait(step))
            gradients, metrics, stall = gradients_at(step, stage, state, batch)
            state, more = programs.updates[stage](state, gradients, metrics["loss"], np.float32(rate))
            gradients_at.compile_soon(step, step_seconds=recorder.recent_seconds)

            metrics.pop("worker_loss", None)  # only tests read it
            auxiliary = metrics.pop("auxiliary")
            device = {**metrics, **more}
            if stage not in optimizer.no_collectives:  # whether to stop is a message, too
                device["stop"] = agree_any(bool(instruments.stop.received))
            del gradients
            recorder.add(
                StepMetrics(
                    step=step + 1,
                    device=device,
                    auxiliary=auxiliary,
                    learning_rate=rate,
                    after=after,
                    flops=float(cost.flops[step]),
                    schedule=_shown(setup.config, schedule, cost, step),
                    data_seconds=waited,
                    compiles=compiles,
                    stall=stall,
                )
            )
            if _evaluate_and_save(setup, instruments, state, step + 1):
                break
        recorder.flush()
    try:
        trace.close(pending=state.step)
    except (OSError, RuntimeError) as error:
        recorder.failed("the trace of observe.profile", error)
    return state


def _evaluate_and_save(setup: Setup, instruments: Instruments, state: TrainState, step: int) -> bool:
    """Evaluate and save after so many steps, where that is due; whether the run ends here."""
    config, recorder, saver = setup.config, instruments.recorder, instruments.saver
    last, loss = step == setup.schedule.num_steps, None
    evaluates, saves = _due(step, config.evaluate.every), _due(step, config.checkpoint.every)
    if instruments.validation is not None and (evaluates or last):
        recorder.settle()
        try:
            metrics = instruments.validation(state)
            loss = metrics["validation_loss"]
            recorder.flush(**metrics)
        except jax.errors.JaxRuntimeError as error:  # not enough memory on the devices
            if jax.process_count() > 1:  # the others may be waiting inside of it
                raise
            recorder.commit()
            saver.save(state, validation_loss=None, must=True)
            if not last:
                raise
            recorder.failed("the last evaluation", error)
            return True
    stopping = recorder.stop_agreed and not last
    if saves or last or stopping:
        recorder.commit()
        saver.save(state, validation_loss=loss, must=last or stopping)
    if evaluates or saves:
        recorder.restart_clock()
    return stopping


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(config: ResolvedRunConfig, schedule: StepSchedule, cost: Cost, step: int) -> dict[str, float]:
    """Values that describe a step's rows: none in a run whose rows are all alike."""
    shown: dict[str, float] = {}
    curriculum = config.curriculum
    if curriculum is not None and curriculum.difficulty:
        each = difficulties(curriculum, step)
        shown |= (
            {"difficulty": min(each.values())} if len(each) == 1 else {f"difficulty_{n}": d for n, d in each.items()}
        )
    grows = curriculum is not None and curriculum.length is not None
    if grows or schedule.longest is not None:
        shown["length"] = schedule.shape_at(step).length
    if config.random_ltd is not None:
        shown["kept"] = int(schedule.kept[step])
    if grows or config.random_ltd is not None:
        shown["saving"] = cost.saving(step + 1)
    return shown
