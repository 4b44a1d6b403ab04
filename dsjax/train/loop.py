"""A training run, from its config to its result; read `run` from top to bottom.

config -> mesh -> model (abstract) -> shardings -> data -> folder -> state (fresh or restored) -> programs -> steps
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from dsjax.checkpoint.metrics_log import truncate_metrics
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config.load import to_dict
from dsjax.config.run import ResolvedRunConfig, RunConfig
from dsjax.data.build import Corpus
from dsjax.data.pipeline import Batches
from dsjax.data.rows import Rows
from dsjax.mesh.build import make_mesh, set_platform
from dsjax.mesh.layout import Layout
from dsjax.models.families import check_divisible, check_length, initial_params
from dsjax.models.pretrained import initial_weights
from dsjax.observe.profile import TraceWindow
from dsjax.observe.progress import Progress
from dsjax.observe.trackers import METRICS_FILE, make_trackers
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.optimizers.create import advice
from dsjax.optimizers.schedules import Clocks, learning_rate
from dsjax.train import lora, outcome
from dsjax.train.corpus import describe, open_corpus
from dsjax.train.folder import RunFolder, open_folder, resolved
from dsjax.train.place import Placement, training_placement
from dsjax.train.plan import require_memory
from dsjax.train.processes import agree_any, barrier, num_processes, start_processes, use_compilation_cache
from dsjax.train.programs import Programs, make_programs
from dsjax.train.record import Counters, Recorder, StepFigures, tensor_names
from dsjax.train.saving import Saver, newest_checkpoint, restore, summary_if_finished
from dsjax.train.signals import StopRequest
from dsjax.train.state import (
    ModelTree,
    TrainState,
    abstract_state,
    count_parameters,
    init_state,
    make_optimizer,
    state_around,
    state_shardings,
)
from dsjax.train.validate import make_validation, validation_placement

Resume = Literal["no", "must", "if_any"]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        folder: the run folder.
        summary: the content of its summary.json; empty when a signal stopped the run, and on all processes but the
            first. Of a run that was finished already it is that of the folder.
        stopped_by: name of the signal that stopped it, or ''.
    """

    folder: Path
    summary: dict[str, Any]
    stopped_by: str = ""


def run(
    config: RunConfig,
    *,
    run_dir: str | Path | None = None,
    resume: Resume = "no",
    force: bool = False,
    distributed: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Train a model.

    Args:
        config: everything about the run.
        run_dir: where it is written; None takes the next free runs/<name>.
        resume: "no" starts a new run, "must" goes on with the run in the folder, "if_any" does so if there is one.
        force: run even if the plan says that memory will not do.
        distributed: let JAX find the other processes of a cluster.
        console: where to report; standard output by default.

    Raises:
        ValueError: the config does not fit the devices, the data, the folder or the weights it starts from.
        CheckpointError: there are checkpoints, but none is whole; or the last one could not be written.
        NonFiniteError: too many steps in a row without a finite gradient.
    """
    set_platform(config.mesh, num_processes=num_processes())
    start_processes(distributed=distributed)
    use_compilation_cache()
    console = (console or Console(highlight=False)) if jax.process_index() == 0 else Console(quiet=True)
    # Whole lines, so that a command can be copied, and no [name] in a path taken for a style.
    report = functools.partial(console.print, soft_wrap=True, markup=False)

    config = resolved(config)
    layout = Layout(make_mesh(config.mesh), config.mesh.zero_stage)
    check_divisible(config.model, layout.mesh.shape)
    check_length(config.model, config.data.sequence_length)
    model, untrained = lora.split_model(config.model, config.lora)
    optimizer = make_optimizer(config.optimizer, model, layout, steps=num_steps(config))
    for line in advice(config.optimizer, workers=layout.mesh.shape["data"], steps=num_steps(config)):
        report(f"warning: {line}")
    shardings = state_shardings(layout, model, optimizer, ema=config.train.ema_decay > 0)
    placement = training_placement(layout, batch_size=config.train.batch_size, accumulation=config.train.accumulation)
    validation = validation_placement(config.evaluate, config.train, layout)
    if not force:
        require_memory(config, layout)

    corpus = open_corpus(config.data, config.model, console=console)
    rows = Rows.of(corpus, config.data, split="train")
    programs = make_programs(
        model,
        optimizer,
        layout,
        shardings,
        clip_norm=config.train.clip_norm,
        ema_decay=config.train.ema_decay,
        dropout=config.model.dropout > 0 or config.model.attention_dropout > 0,
    )

    folder = open_folder(config, corpus.hash, run_dir=run_dir, resume=resume, report=report)
    store = CheckpointStore(folder.path / "checkpoints", config.checkpoint)
    saved, counters = newest_checkpoint(store, report) if folder.resumed else (None, Counters())
    total_steps = num_steps(config)
    if folder.resumed and (summary := summary_if_finished(folder, counters, total_steps, report)):
        return RunResult(folder.path, summary)
    about = describe(corpus)
    if config.lora is not None:
        about |= lora.base_of_run(config.model, folder.path if folder.resumed else None)
    state, frozen = _state(config, model, optimizer, layout, shardings, store, saved, report)
    if saved is not None:
        report(f"resumed from step {saved} of {folder.path}")
    programs = programs.beside(frozen)
    folder.write_start(config, about, corpus.tokenizer.save)
    if folder.resumed and folder.is_first_process:
        truncate_metrics(folder.path / METRICS_FILE, counters.steps)

    use = outcome.utilisation(config, model, frozen=untrained, num_devices=layout.mesh.size)
    num_rows = config.evaluate.rows
    evaluate = make_validation(corpus, config.data, num_rows=num_rows, placement=validation, programs=programs)
    state, recorder, stopped_by = _train(
        config, state, programs, optimizer, use, evaluate, rows, placement, corpus, folder, store, counters, console
    )
    barrier("finished")
    if counters.steps < total_steps:
        report(f"stopped by {stopped_by or 'a signal'} at step {counters.steps}; to go on: {folder.how_to_resume}")
        return RunResult(folder.path, {}, stopped_by=stopped_by or "SIGTERM")
    params, num_trained = state.ema if state.ema is not None else state.params, count_parameters(model)
    if config.lora is not None and frozen is not None:
        model, params = lora.folded(config.model, config.lora, params, frozen, layout=layout)
    summary = outcome.summarise(
        config, folder, corpus, counters, recorder, model, params, console, num_trained=num_trained, use=use
    )
    return RunResult(folder.path, summary)


def tokens_per_step(config: RunConfig) -> int:
    """Effective tokens of one step: all positions of all rows."""
    return config.train.batch_size * config.data.sequence_length


def num_steps(config: RunConfig) -> int:
    """Steps of the whole run: as given, or until the first that reaches the tokens asked for."""
    return config.train.num_steps(config.data.sequence_length)


def _train(
    config: ResolvedRunConfig,
    state: TrainState,
    programs: Programs,
    optimizer: StagedTransform,
    use: outcome.Utilisation,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    rows: Rows,
    placement: Placement,
    corpus: Corpus,
    folder: RunFolder,
    store: CheckpointStore,
    counters: Counters,
    console: Console,
) -> tuple[TrainState, Recorder, str]:
    """All steps that are left, with what is open meanwhile; also the name of the signal that came, or ''."""
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)  # also when a step fails: a save in flight cannot end once Python shuts down
        trackers = []
        if folder.is_first_process:
            resume_step = counters.steps if folder.resumed else None
            trackers = make_trackers(config.observe, folder.path, resume_step=resume_step, settings=to_dict(config))
        for tracker in trackers:
            stack.callback(tracker.close)
        progress = stack.enter_context(Progress(num_steps(config), start_step=counters.steps, console=console))
        stop = stack.enter_context(StopRequest())
        recorder = Recorder(
            counters,
            trackers,
            progress,
            max_skipped=config.train.max_nonfinite_steps,
            utilisation=use,
            tensor_names=tensor_names(state.params, config.model.layer_runs),
            freeze=optimizer.freeze,
        )
        batches = Batches(
            rows,
            batch_size=config.train.batch_size,
            positions=placement.positions,
            threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            start_step=counters.steps,
        )
        stack.enter_context(batches)
        saver = Saver(store, config.model.layer_runs, counters, corpus.hash, progress, folder)
        state = _steps(config, state, programs, optimizer, placement, batches, recorder, evaluate, saver, stop, folder)
    return state, recorder, stop.received


def _steps(
    config: ResolvedRunConfig,
    state: TrainState,
    programs: Programs,
    optimizer: StagedTransform,
    placement: Placement,
    batches: Iterator[tuple[int, dict[str, np.ndarray]]],
    recorder: Recorder,
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    saver: Saver,
    stop: StopRequest,
    folder: RunFolder,
) -> TrainState:
    """The steps that are left."""
    total, per_step = num_steps(config), tokens_per_step(config)
    end = Clocks(total, total * per_step)
    trace = TraceWindow(config.observe.profile, folder.path / "profile")
    start = config.observe.profile.partition(":")[0]
    if start and int(start) > total:
        saver.progress.note(f"observe.profile {config.observe.profile} begins after the last step, {total}: no trace")
    recorder.restart_clock()
    for step in range(recorder.counters.steps, total):
        trace.step(step + 1, pending=state.step)
        before = time.perf_counter()
        _, rows = next(batches)
        batch = placement(rows)
        # Rows that came while the device was still at the last step's work kept nobody waiting.
        waited = time.perf_counter() - before if state.step.is_ready() else 0.0

        after = Clocks(step + 1, (step + 1) * per_step)
        rate = learning_rate(config.optimizer.schedule, config.optimizer.learning_rate, after=after, end=end)
        stage = optimizer.stage(step, recorder.counters.freeze_step)
        compiles = recorder.enter(stage)
        gradients, figures = programs.gradient_of(optimizer, stage, state, batch)
        state, more = programs.updates[stage](state, gradients, figures["loss"], np.float32(rate))

        figures.pop("worker_loss", None)
        device = {**figures, **more}
        if stage not in optimizer.silent:  # whether to stop is a message, too
            device["stop"] = agree_any(bool(stop.received))
        del gradients
        how = {"learning_rate": rate, "tokens": after.tokens, "data_seconds": waited, "compiles": compiles}
        recorder.add(StepFigures(step=step + 1, device=device, **how))
        last = step + 1 == total
        loss = None
        if evaluate is not None and (_due(step + 1, config.evaluate.every) or last):
            recorder.settle()
            figures = evaluate(state)
            loss = figures["validation_loss"]
            recorder.flush(**figures)
        stopping = recorder.stop_agreed and not last
        if _due(step + 1, config.checkpoint.every) or last or stopping:
            recorder.flush()
            saver.save(state, validation_loss=loss, must=last or stopping)
        if stopping:
            break
        if _due(step + 1, config.evaluate.every) or _due(step + 1, config.checkpoint.every):
            recorder.restart_clock()
    recorder.flush()
    trace.close(pending=state.step)
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _state(
    config: ResolvedRunConfig,
    model: ModelTree,
    optimizer: StagedTransform,
    layout: Layout,
    shardings: TrainState,
    store: CheckpointStore,
    saved: int | None,
    report: Callable[[str], None],
) -> tuple[TrainState, Tree | None]:
    """The state to go on from, and the parameters that are not trained: None when all are.

    The state is that of the checkpoint `saved`. Without one, parameters are the weights that the run starts from, or
    are drawn.
    """
    params = frozen = None
    if config.lora is not None:
        params, frozen = lora.first_params(config.model, model, layout, seed=config.seed)
    elif config.model.init_from and saved is None:
        params = initial_weights(config.model, shardings=shardings.params, seed=config.seed)
    if saved is not None:
        shapes = abstract_state(model, optimizer, shardings)
        return restore(store, saved, shapes, config.model.layer_runs, report), frozen
    if params is not None:
        return state_around(params, optimizer, shardings, seed=config.seed), frozen
    make = lambda key: initial_params(config.model, key)
    return init_state(make, optimizer, shardings, seed=config.seed), None
