"""A training run, from its config to its result; read `run` from top to bottom.

config -> mesh -> model (abstract) -> shardings -> data -> folder -> state (fresh or restored) -> programs -> steps
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
from dsjax.checkpoint.store import CheckpointStore
from dsjax.config.load import to_dict
from dsjax.config.run import ResolvedRunConfig, RunConfig
from dsjax.data.corpus.build import Corpus
from dsjax.data.curriculum.draw import Curriculum
from dsjax.data.rows.mixture import Rows
from dsjax.data.rows.pipeline import Batches
from dsjax.evaluate.validation import Validation, make_validation, validation_placement
from dsjax.mesh.build import make_mesh, set_platform
from dsjax.mesh.layout import Layout
from dsjax.mesh.processes import barrier, num_processes, start_processes, use_compilation_cache
from dsjax.models import adapter_training
from dsjax.models.families.registry import abstract, check_divisible, check_length, initial_params, segments_of
from dsjax.models.formats.pretrained import initial_weights
from dsjax.models.tree import ModelTree, count_parameters
from dsjax.objectives.registry import objective_of
from dsjax.observe.progress import Progress
from dsjax.observe.trackers import METRICS_FILE, make_trackers
from dsjax.optimizers.api import StagedTransform, Tree
from dsjax.plan import preflight
from dsjax.plan.cost import Cost
from dsjax.plan.plan import require_memory
from dsjax.runs.begun import as_begun, with_class_names
from dsjax.runs.corpus import describe, open_corpus, open_curriculum
from dsjax.runs.counters import Counters
from dsjax.runs.disk import check_disk
from dsjax.runs.folder import RunFolder, begun_folder, begun_hash, open_folder, resolved, schedule_of
from dsjax.runs.saving import Saver, newest_checkpoint, restore, summary_if_finished
from dsjax.setup.placement import Placement, training_placements
from dsjax.setup.programs import Programs, make_programs
from dsjax.setup.schedule import StepSchedule
from dsjax.setup.state import TrainState, abstract_state, init_state, make_optimizer, state_around, state_shardings
from dsjax.setup.step import StepOptions
from dsjax.train import summary as run_summary
from dsjax.train.recorder import Recorder
from dsjax.train.signals import StopRequest
from dsjax.train.steps import train_steps

Resume = Literal["no", "must", "if_any"]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What came of a run.

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
        force: run even if the plan says that memory will not do.
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
    layout = Layout(make_mesh(config.mesh), config.mesh.zero_stage)
    check_divisible(config.model, layout.mesh.shape)
    check_length(config.model, config.data.sequence_length)
    model, untrained = adapter_training.split_model(config.model, config.lora)
    schedule = schedule_of(config)
    optimizer = make_optimizer(config.optimizer, model, layout, steps=schedule.num_steps)
    preflight.check_end(config)
    preflight.require_tools(config.observe)
    workers = layout.mesh.shape["data"]
    for line in preflight.advise(config, schedule, workers=workers, processes=jax.process_count()):
        report(f"warning: {line}")
    shardings = state_shardings(layout, model, optimizer, ema=config.train.ema_decay > 0)
    placements = training_placements(layout, schedule, accumulation=config.train.accumulation)
    validation = validation_placement(config.evaluate, config.train, layout)
    if not force:
        require_memory(config, layout)
    # All that can be refused is, before the text is read, which may take hours. The folder is looked for again then.
    options = (("--force",) if force else ()) + (("--distributed",) if distributed else ())
    find_folder = functools.partial(open_folder, config, run_dir=run_dir, resume=resume, options=options)
    shapes = abstract_state(model, optimizer, shardings)
    folder = find_folder(None, report=lambda line: None)
    keep, resumed = config.checkpoint, folder.resumed
    check_disk(folder.path, keep, shapes, schedule.num_steps, report, resumed=resumed, force=force)

    corpus = open_corpus(config.data, config.model, console=console, begun=begun_hash(begun))
    corpus = with_class_names(corpus, config.model, begun)
    preflight.check_end(config, corpus.tokenizer)
    rows = Rows.of(corpus, config.data, split="train")
    curriculum, longest = open_curriculum(
        config.curriculum,
        corpus,
        rows,
        config.data,
        batch_size=config.train.batch_size,
        num_steps=schedule.num_steps,
        console=console,
    )
    if longest is not None:
        schedule = schedule.cut(longest, most=config.train.max_programs)
    programs = make_programs(
        model,
        optimizer,
        layout,
        shardings,
        StepOptions(
            objective=objective_of(config.data.task),
            clip_norm=config.train.clip_norm,
            ema_decay=config.train.ema_decay,
            dropout=config.model.dropout > 0 or config.model.attention_dropout > 0,
            random_ltd=config.random_ltd,
        ),
    )

    folder = find_folder(corpus.hash, report=report)
    store = CheckpointStore(folder.path / "checkpoints", config.checkpoint)
    saved, counters = newest_checkpoint(store, report) if folder.resumed else (None, Counters())
    if folder.resumed and (summary := summary_if_finished(folder, counters, config.train, schedule.num_steps, report)):
        return RunResult(folder.path, summary)
    about = describe(corpus)
    if config.lora is not None:
        about |= adapter_training.base_of_run(config.model, folder.path if folder.resumed else None)
    state, frozen = _state(config, model, optimizer, layout, shardings, shapes, store, saved, report)
    if saved is not None:
        report(f"resumed from step {saved} of {folder.path}")
    programs = programs.with_frozen(frozen)

    use = run_summary.utilisation(config, num_devices=layout.mesh.size)
    size = {"rows": config.train.batch_size, "sequence_length": config.data.sequence_length}
    cost = Cost.of(config.model, model, untrained, schedule, config.random_ltd, **size)
    num_rows = config.evaluate.rows
    evaluate = make_validation(corpus, config.data, num_rows=num_rows, placement=validation, programs=programs)
    folder.write_start(config, about, corpus.tokenizer.save)
    if folder.resumed and folder.is_first_process:
        truncate_metrics(folder.path / METRICS_FILE, counters.steps)
    state, recorder, stopped_by = _train(
        config, model, state, programs, optimizer, schedule, cost, use, evaluate, rows, curriculum, placements, corpus,
        folder, store, counters, console,
    )  # fmt: skip
    barrier("finished")
    if counters.steps < schedule.num_steps:
        report(f"stopped by {stopped_by or 'a signal'} at step {counters.steps}; to go on: {folder.how_to_resume}")
        return RunResult(folder.path, {}, stopped_by=stopped_by or "SIGTERM")
    params = state.ema if state.ema is not None else state.params
    whole, adapters = ModelTree.of(abstract(config.model)), config.lora
    weights = lambda: params
    if adapters is not None and frozen is not None:
        weights = lambda: adapter_training.folded(config.model, adapters, params, frozen, layout=layout)[1]
    summary = run_summary.summarise(
        config, folder, corpus, counters, recorder, whole, weights, console, trained=count_parameters(model), use=use
    )
    return RunResult(folder.path, summary, failures=tuple(recorder.failures))


def _train(
    config: ResolvedRunConfig,
    model: ModelTree,
    state: TrainState,
    programs: Programs,
    optimizer: StagedTransform,
    schedule: StepSchedule,
    cost: Cost,
    use: run_summary.Utilisation,
    evaluate: Validation | None,
    rows: Rows,
    curriculum: Curriculum | None,
    placements: dict[int, Placement],
    corpus: Corpus,
    folder: RunFolder,
    store: CheckpointStore,
    counters: Counters,
    console: Console,
) -> tuple[TrainState, Recorder, str]:
    """All steps that are left, with what is open meanwhile; also the name of the signal that came, or ''."""
    with contextlib.ExitStack() as stack:
        # Also when a step fails: a save in flight cannot end once Python shuts down.
        stack.push(lambda error, *_: store.close(alone=error is not None and jax.process_count() > 1))
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
            utilisation=use,
            tensor_names=model.tensor_names(),
            freeze=optimizer.freeze,
        )
        stack.callback(recorder.close)
        if evaluate is not None and counters.steps < schedule.num_steps:
            evaluate.rehearse(state)
        batches = Batches(
            rows,
            batch_size=config.train.batch_size,
            threads=config.data.read_threads,
            prefetch=config.data.prefetch,
            start_step=counters.steps,
            order=curriculum,
            shape_at=schedule.shape_at,
            positions_of=lambda num_rows: placements[num_rows].positions,
        )
        stack.enter_context(batches)
        saver = Saver(store, segments_of(config.model), counters, corpus.hash, progress, folder)
        state = train_steps(
            config,
            state,
            programs,
            optimizer,
            schedule,
            cost,
            placements,
            batches,
            recorder,
            evaluate,
            saver,
            stop,
            folder,
        )
    return state, recorder, stop.received


def _state(
    config: ResolvedRunConfig,
    model: ModelTree,
    optimizer: StagedTransform,
    layout: Layout,
    shardings: TrainState,
    shapes: TrainState,
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
        params, frozen = adapter_training.first_params(config.model, model, layout, seed=config.seed)
    elif config.model.init_from and saved is None:
        params = initial_weights(config.model, shardings=shardings.params, seed=config.seed)
    if saved is not None:
        return restore(store, saved, shapes, segments_of(config.model), report), frozen
    if params is not None:
        return state_around(params, optimizer, shardings, seed=config.seed), frozen
    make = lambda key: initial_params(config.model, key)
    return init_state(make, optimizer, shardings, seed=config.seed), None
