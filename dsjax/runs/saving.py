"""Checkpoints of a run: written as it goes, and found again by the next process."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dsjax.checkpoint import retention
from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.manifest import read_json
from dsjax.checkpoint.store import CheckpointError, CheckpointStore
from dsjax.models.naming import abstract_named, from_named, to_named
from dsjax.models.stack import Segments
from dsjax.observe.progress import Progress
from dsjax.runs.counters import Counters
from dsjax.runs.elastic import restore_by_name
from dsjax.runs.folder import FAILED, SUMMARY_FILE, RunFolder
from dsjax.setup.config import TrainConfig
from dsjax.setup.state import TrainState


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """Progress of a run.

    Attributes:
        folder: of the run.
        store: its checkpoints.
        counters: what is counted over the whole run; they go on from the newest checkpoint, and change in place.
        saved: the step of that checkpoint; None before the first.
    """

    folder: RunFolder
    store: CheckpointStore
    counters: Counters
    saved: int | None = None


def status_of(folder: RunFolder, config: CheckpointConfig, report: Callable[[str], None]) -> RunStatus:
    """Look how far the run in a folder has come; of a new one not at all.

    Args:
        folder: of the run.
        config: how its checkpoints are kept.
        report: told of damaged checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    store = CheckpointStore(folder.path / "checkpoints", config)
    saved, counters = _newest_checkpoint(store, report) if folder.resumed else (None, Counters())
    return RunStatus(folder, store, counters, saved)


@dataclasses.dataclass(frozen=True)
class Saver:
    """Writes checkpoints; a disk that is full stops neither the run nor the last good one.

    Attributes:
        status: of the run: where checkpoints go, its counters, and how to go on.
        segments: the stack of the model's layers.
        data_hash: saved beside the state.
        progress: told of a save that failed.
    """

    status: RunStatus
    segments: Segments
    data_hash: str
    progress: Progress

    def save(self, state: TrainState, *, validation_loss: float | None, must: bool) -> None:
        """Save the state as it is after `counters.steps` steps.

        Args:
            state: the state.
            validation_loss: measured after this very step, or None: decides which checkpoint is the best.
            must: nothing comes after this save: wait for it.

        Raises:
            CheckpointError: it must be saved and cannot be.
        """
        counters, store = self.status.counters, self.status.store
        clocks = {"counters": dataclasses.asdict(counters), "data_hash": self.data_hash}
        try:
            store.wait()
        except CheckpointError as error:  # the save before this one failed
            self._note(error)
        there_before = counters.steps in store.steps() if must else False
        try:
            tree = to_named(state, self.segments)
            store.save(counters.steps, tree, clocks=clocks, metric=validation_loss)
            if must:
                store.wait()
        except CheckpointError as error:
            # Saved, but what it replaces could not be removed: nothing that the run needs is missing.
            if not must or (counters.steps in store.steps() and not there_before):
                self._note(error)
                return
            steps = store.steps()
            last = f"the last whole checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise CheckpointError(f"{error}\n{last}; make room, then: {self.status.folder.resume_command}") from error

    def _note(self, error: CheckpointError) -> None:
        self.progress.note(f"{error}; training goes on, earlier checkpoints are intact")


def _newest_checkpoint(store: CheckpointStore, report: Callable[[str], None]) -> tuple[int | None, Counters]:
    """The step of the newest whole checkpoint and its counters; (None, zeros) if the run was stopped before its first.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    step = store.latest_good(lambda problem: report(f"passed over: {problem}"))
    if step is not None:
        return step, Counters(**store.clocks(step)["counters"])
    if damaged := retention.committed(store.directory):
        raise CheckpointError(f"{store.directory}: none of the checkpoints {damaged} is whole; see above")
    report("there is no checkpoint yet; starting from the first step")
    return None, Counters()


def summary_if_finished(
    status: RunStatus, train: TrainConfig, total_steps: int, report: Callable[[str], None]
) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do, else None.

    Args:
        status: of the run.
        train: how long it is asked to be.
        total_steps: the same in steps.
        report: told that it is finished, and how it would go on.

    Raises:
        ValueError: it has done more steps than it is now asked for.
    """
    folder, counters = status.folder, status.counters
    if counters.steps > total_steps:
        raise ValueError(
            f"{folder.path} has done {counters.steps} steps, but the config now ends after {total_steps}; give at "
            f"least {counters.steps}, or start a new run with another --run-dir"
        )
    if not folder.resumed or counters.steps < total_steps or not (folder.path / SUMMARY_FILE).is_file():
        return None
    summary = read_json(folder.path / SUMMARY_FILE)
    # Without a sample, be it an empty one, it was written before the end; what failed at the end is tried again.
    if summary["steps"]["value"] != total_steps or "sample" not in summary or FAILED in summary:
        return None
    longer = f"train.steps={2 * train.steps}" if train.steps else f"train.tokens={2 * train.tokens}"
    report(
        f"{folder.path} is finished: {total_steps} steps are done, {folder.path / SUMMARY_FILE} says how it went. "
        f"To train longer, such as twice as long: {folder.resume_command} --set {longer}"
    )
    return summary


def restore(
    store: CheckpointStore,
    step: int,
    abstract_tree: TrainState,
    segments: Segments,
    report: Callable[[str], None],
) -> TrainState:
    """The state of a checkpoint in the layout of `abstract_tree`, whatever mesh and stacks of layers it was saved from.

    Args:
        store: the checkpoints.
        step: which.
        abstract_tree: shapes with shardings.
        segments: the stack of its layers.
        report: told when something that was kept for single workers had to be dropped.
    """
    saved = restore_by_name(store, step, abstract_named(abstract_tree, segments), report)
    return from_named(saved.pop, abstract_tree, segments)
