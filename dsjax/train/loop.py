"""A training run, from its config to its result; read `run` from top to bottom.

config -> setup (mesh, model, schedule, optimizer: no array) -> checks -> data -> folder -> state (fresh or restored)
-> programs -> steps -> summary
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from dsjax.checkpoint.metrics_log import truncate_metrics
from dsjax.config.load import to_dict
from dsjax.config.run import RunConfig
from dsjax.data.corpus.build import Corpus
from dsjax.data.rows.pipeline import Batches
from dsjax.evaluate.validation import Validation, make_validation, validation_placement
from dsjax.mesh.build import set_platform
from dsjax.mesh.processes import barrier, num_processes, start_processes, use_compilation_cache
from dsjax.models import adapter_training
from dsjax.observe.progress import Progress
from dsjax.observe.trackers import METRICS_FILE, make_trackers
from dsjax.optimizers.api import Tree
from dsjax.plan import preflight
from dsjax.plan.plan import require_memory
from dsjax.runs.begun import as_begun, with_class_names
from dsjax.runs.corpus import RunData, describe, open_corpus, open_rows
from dsjax.runs.disk import check_disk
from dsjax.runs.folder import RunFolder, begun_folder, begun_hash, open_folder
from dsjax.runs.saving import RunStatus, Saver, restore, status_of, summary_if_finished
from dsjax.setup.assembly import Setup, assemble, first_state, frozen_params
from dsjax.setup.programs import Programs
from dsjax.setup.resolve import resolved
from dsjax.setup.state import TrainState
from dsjax.train.recorder import Recorder
from dsjax.train.signals import StopRequest
from dsjax.train.steps import Instruments, train_steps
from dsjax.train.summary import summarise, utilisation

Report = Callable[[str], None]
Resume = Literal["no", "must", "if_any"]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: the run folder.
        summary: the content of its summary.json; empty when a signal stopped the run, and on all processes but the
            first. Of a run that was finished already it is that of the folder.
        stopped_by: name of the signal that stopped it, or ''.
        failures: what went wrong after the last step (the sample, the picture), a line each; the summary is there all
            the same.
    """

    folder: Path
    summary: dict[str, Any]
    stopped_by: str = ""
    failures: tuple[str, ...] = ()


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
        force: run even if the plan says that there is not enough memory.
        distributed: let JAX find the other processes of a cluster.
        console: where to report; standard output by default.

    Raises:
        ValueError: the config does not fit the devices, the data, the folder or the weights it starts from, or asks
            for something at its end that would fail there.
        CheckpointError: there are checkpoints, but none is whole; or the last one could not be written.
        NonFiniteError: too many steps in a row without a finite gradient.
    """
    set_platform(config.mesh, num_processes=num_processes())
    start_processes(distributed=distributed)
    use_compilation_cache()
    console = (console or Console(highlight=False)) if jax.process_index() == 0 else Console(quiet=True)
    # Whole lines, so that a command can be copied, and no [name] in a path taken for a style.
    report = functools.partial(console.print, soft_wrap=True, markup=False)

    begun = begun_folder(config.name, run_dir=run_dir, resume=resume)
    config = resolved(dataclasses.replace(config, model=as_begun(config.model, begun)))
    setup = assemble(config)
    options = (("--force",) if force else ()) + (("--distributed",) if distributed else ())
    find_folder = functools.partial(open_folder, config, run_dir=run_dir, resume=resume, options=options)
    _refuse(setup, find_folder, report, force=force)

    corpus = open_corpus(config.data, config.model, console=console, begun=begun_hash(begun))
    corpus = with_class_names(corpus, config.model, begun)
    preflight.check_end(config, corpus.tokenizer)
    data = open_rows(setup, corpus, console=console)
    if data.longest is not None:
        schedule = setup.schedule.cut(data.longest, most=config.train.max_programs)
        setup = dataclasses.replace(setup, schedule=schedule)

    status = status_of(find_folder(corpus.hash, report=report), config.checkpoint, report)
    if summary := summary_if_finished(status, config.train, setup.schedule.num_steps, report):
        return RunResult(status.folder.path, summary)
    about = _about(setup, corpus, status.folder)
    state, frozen = _state(setup, status, report)
    programs = setup.programs.with_frozen(frozen)
    validation = make_validation(setup, corpus, programs)
    status.folder.write_start(config, about, corpus.tokenizer.save)
    if status.folder.resumed and status.folder.is_first_process:
        truncate_metrics(status.folder.path / METRICS_FILE, status.counters.steps)

    state, recorder, stopped_by = _train(setup, programs, state, data, validation, status, console)
    barrier("finished")
    done, folder = status.counters.steps, status.folder
    if done < setup.schedule.num_steps:
        report(f"stopped by {stopped_by or 'a signal'} at step {done}; to go on: {folder.resume_command}")
        return RunResult(folder.path, {}, stopped_by=stopped_by or "SIGTERM")
    weights = functools.partial(_whole_weights, setup, state, frozen)
    summary = summarise(setup, folder, corpus, recorder, weights, console)
    return RunResult(folder.path, summary, failures=tuple(recorder.failures))


def _refuse(setup: Setup, find_folder: Callable[..., RunFolder], report: Report, *, force: bool) -> None:
    """Refuse all that can be before the text is read, which may take hours. The folder is looked for again then."""
    config = setup.config
    preflight.check_end(config)
    preflight.require_tools(config.observe)
    workers = setup.layout.mesh.shape["data"]
    for line in preflight.advise(config, setup.schedule, workers=workers, processes=jax.process_count()):
        report(f"warning: {line}")
    _ = setup.placements  # a batch that cannot be cut evenly
    validation_placement(config.evaluate, config.train, setup.layout)
    if not force:
        require_memory(setup)
    folder = find_folder(None, report=lambda line: None)
    steps, resumed = setup.schedule.num_steps, folder.resumed
    check_disk(folder.path, config.checkpoint, setup.shapes, steps, report, resumed=resumed, force=force)


def _about(setup: Setup, corpus: Corpus, folder: RunFolder) -> dict[str, Any]:
    """The content of data.json: the corpus and, of a run with lora, the weights that it adapts."""
    if setup.config.lora is None:
        return describe(corpus)
    base = adapter_training.base_of_run(setup.config.model, folder.path if folder.resumed else None)
    return describe(corpus) | base


def _state(setup: Setup, status: RunStatus, report: Report) -> tuple[TrainState, Tree | None]:
    """The state to go on from, and the parameters that are not trained: None when all are."""
    if status.saved is None:
        return first_state(setup)
    frozen = frozen_params(setup)
    state = restore(status.store, status.saved, setup.shapes, setup.model.segments, report)
    report(f"resumed from step {status.saved} of {status.folder.path}")
    return state, frozen


def _whole_weights(setup: Setup, state: TrainState, frozen: Tree | None) -> Tree:
    """The final weights: averaged parameters if there are, adapters merged into their base."""
    params = state.ema if state.ema is not None else state.params
    lora = setup.config.lora
    if lora is None or frozen is None:
        return params
    return adapter_training.folded(setup.config.model, lora, params, frozen, layout=setup.layout)[1]


def _train(
    setup: Setup,
    programs: Programs,
    state: TrainState,
    data: RunData,
    validation: Validation | None,
    status: RunStatus,
    console: Console,
) -> tuple[TrainState, Recorder, str]:
    """All steps that are left, with what is open meanwhile; also the name of the signal that came, or ''."""
    config, schedule, counters, folder = setup.config, setup.schedule, status.counters, status.folder
    with contextlib.ExitStack() as stack:
        # Also when a step fails: a save in flight cannot end once Python shuts down.
        stack.push(lambda error, *_: status.store.close(local=error is not None and jax.process_count() > 1))
        trackers = []
        if folder.is_first_process:
            resume_step = counters.steps if folder.resumed else None
            trackers = make_trackers(config.observe, folder.path, resume_step=resume_step, settings=to_dict(config))
        progress = stack.enter_context(Progress(schedule.num_steps, start_step=counters.steps, console=console))
        stop = stack.enter_context(StopRequest())
        recorder = Recorder(
            counters,
            trackers,
            progress,
            max_skipped=config.train.max_nonfinite_steps,
            utilisation=utilisation(setup),
            tensor_names=setup.model.tensor_names(),
            freeze=setup.optimizer.freeze,
        )
        stack.callback(recorder.close)
        if validation is not None and counters.steps < schedule.num_steps:
            validation.rehearse(state)
        batches = Batches(
            data.rows,
            batch_size=config.train.batch_size,
            threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            start_step=counters.steps,
            order=data.curriculum,
            shape_at=schedule.shape_at,
            positions_of=lambda num_rows: setup.placements[num_rows].positions,
        )
        stack.enter_context(batches)
        saver = Saver(status, setup.model.segments, data.corpus.hash, progress)
        instruments = Instruments(batches, recorder, validation, saver, stop, folder.path / "profile")
        state = train_steps(setup, programs, state, instruments)
    return state, recorder, stop.received
