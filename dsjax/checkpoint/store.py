"""CheckpointStore: sharded pytrees on disk, whole or not at all. The only file that imports orbax.

    <directory>/step_00000100/
        state/...                  the tensors, by orbax
        tensors.json               name -> shape and dtype of each tensor
        clocks.json                what the host needs to resume: counters, data hash, best metric
        manifest_00000_of_00002.txt, manifest_00001_of_00002.txt     size and SHA-256 of all of the above

All of it is written as saving_<n>_step_00000100, in the background. After orbax's commit process 0 adds the two JSON
files and each process its part of the manifest; when every part is there process 0 gives it its final name. A
checkpoint without every part is incomplete and is never used.

With several processes every method but `clocks`, `steps` and `verify` is called by all of them, at the same point of
the program; a failure on one is raised on all. Call `close` before the program ends, also when it fails: a save still
in flight when the interpreter shuts down is lost.
"""

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dsjax.checkpoint import manifest, retention
from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.in_flight import Save, agree
from dsjax.checkpoint.tensors import TENSORS_FILE, describe, differences, read_tensors

_SMALLEST_PART = 2**20  # bytes
_CLOCKS_FILE = "clocks.json"
# What a failed write raises: OSError from our files, ValueError from tensorstore, RuntimeError from a broken barrier.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written (or old ones removed): names the path and the reason."""


class CheckpointStore:
    """Saves, verifies, restores and removes the checkpoints of one run.

    Args:
        directory: holds the checkpoints and nothing else; made when the first one is saved.
        config: what to keep, and whether to write in the background.

    Example:
        >>> import tempfile
        >>> store = CheckpointStore(Path(tempfile.mkdtemp()), CheckpointConfig())
        >>> tree = {"w": jax.numpy.arange(4.0)}
        >>> store.save(100, tree, clocks={"tokens": 8192}, metric=2.5)
        >>> store.wait()
        >>> step = store.latest_good(print)
        >>> step, store.clocks(step)
        (100, {'tokens': 8192})
        >>> abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        >>> store.restore(step, abstract)["w"]
        Array([0., 1., 2., 3.], dtype=float32)
        >>> store.close()
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = Path(directory).absolute()
        self.config = config
        self._save: Save | None = None
        self._bad: set[int] = set()
        self._attempts = 0
        logging.getLogger("absl").addFilter(_say_it_once)

    def save(self, step: int, tree: Any, *, clocks: Mapping[str, Any], metric: float | None = None) -> None:
        """Begins to write a checkpoint; ends it too unless `config.asynchronous`.

        On return the tree may be donated to the next step: it has been copied to the host, or (CPU) is protected from
        being overwritten until it is on disk. An earlier save still in flight is waited for.

        Args:
            step: steps done.
            tree: nested dicts, tuples and registered dataclasses of jax.Array, typed PRNG keys among them.
            clocks: JSON; comes back from `clocks(step)`.
            metric: validation loss, for `keep_best`.

        Raises:
            CheckpointError: the save before this one failed (then this one is not begun), this one failed, or the step
                is already saved. Nothing half-written stays, older checkpoints are intact, the caller may go on.
            ValueError: a leaf that cannot be stored.
        """
        self.wait()
        comparable = metric if metric is not None and math.isfinite(metric) else None
        clocks_file = {"step": step, "metric": comparable, "clocks": dict(clocks)}
        contents = {TENSORS_FILE: describe(tree), _CLOCKS_FILE: clocks_file}
        files = {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
        path = retention.step_folder(self.directory, step)
        name, refusal = agree(self._make_room(path, step))[0].split("\n", maxsplit=1)
        if refusal:
            raise CheckpointError(f"cannot save {path}: {refusal}")
        save = Save(step=step, path=path, unfinished=self.directory / name)
        context = ocp.Context()
        # Or orbax's threads wait for the directories, and a program that ends meanwhile hangs for ten minutes.
        context.asynchronous.create_directories_asynchronously = False
        # Replicas share a tensor's writing, each cuts its part out on its device; training waits for that.
        context.array.saving.min_slice_bytes_for_replica_parallel = _SMALLEST_PART
        try:
            with context:
                response = ocp.save_async(str(save.unfinished), tree)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot save {path}: {error}") from error
        # A daemon: when the interpreter ends, orbax cannot go on, and a thread that waits for it would never end.
        save.thread = threading.Thread(target=self._finish, args=(save, response, files), daemon=True)
        self._save = save
        save.thread.start()
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the save in flight, if any, is whole on disk.

        Raises:
            CheckpointError: it failed (on any process); the next save may succeed.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        assert save.thread is not None
        save.thread.join()
        errors = agree(save.error)
        if any(errors):
            if jax.process_index() == 0 and not save.path.exists():
                self._discard()
            told = [error if len(errors) == 1 else f"process {i}: {error}" for i, error in enumerate(errors) if error]
            raise CheckpointError("; ".join(told))

    def close(self, *, local: bool = False) -> None:
        """Waits for the save in flight; raises what `wait` raises.

        Args:
            local: after an error of this process, one of several: the others are not asked for their errors, as they
                may be waiting for this one elsewhere. Nothing is raised.
        """
        if not local:
            self.wait()
        elif self._save is not None and self._save.thread is not None:
            self._save.thread.join()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints (every part of the manifest is there; contents not read), in order."""
        return [step for step in retention.committed(self.directory) if manifest.is_complete(self._folder(step))]

    def verify(self, step: int) -> list[str]:
        """Reads one checkpoint through: one line per problem (file, expected, found), none if it is whole."""
        return manifest.verify(self._folder(step))

    def latest_good(self, report: Callable[[str], None]) -> int | None:
        """The newest step whose every file is as the manifest says; None if there is none.

        Args:
            report: called once for each newer checkpoint that is passed over, with its name and what is wrong with it.
        """
        committed = retention.committed(self.directory)
        for step in sorted({*committed, *retention.unfinished(self.directory)}, reverse=True):
            name = retention.step_folder(self.directory, step).name
            if step not in committed:
                report(f"{name} is not used: its save was interrupted, or is still going on")
                continue
            found = manifest.verify(self._folder(step), jax.process_index(), num_parts=jax.process_count())
            problems = list(dict.fromkeys(line for lines in agree("\n".join(found)) for line in lines.splitlines()))
            if not problems:
                return step
            self._bad.add(step)
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            report(f"{name} is not used: {'; '.join(problems[:3])}{more}")
        return None

    def clocks(self, step: int) -> dict[str, Any]:
        """The clocks that `save` was given."""
        return manifest.read_json(self._folder(step) / _CLOCKS_FILE, lenient=True)["clocks"]

    def tensors(self, step: int) -> dict[str, tuple[list[int], str]]:
        """Name -> shape and dtype of each tensor of one checkpoint."""
        return read_tensors(self._folder(step))

    def restore(self, step: int, abstract_tree: Any, *, partial: bool = False) -> Any:
        """Reads a checkpoint into the layout asked for, whatever mesh wrote it. Verify first: see `latest_good`.

        Args:
            step: one of `steps()`.
            abstract_tree: jax.ShapeDtypeStruct leaves with shardings, in the structure that was saved.
            partial: leave unread what `abstract_tree` does not name; a dataclass may then be given as a dict of some of
                its fields: `{"params": ...}`.

        Returns:
            The tree of sharded jax.Array.

        Raises:
            ValueError: the tree does not fit; lists every missing, extra and misshapen tensor.
        """
        self.wait()
        folder = self._folder(step)
        problems = differences(read_tensors(folder), describe(abstract_tree), partial=partial)
        if problems:
            raise ValueError(
                f"{folder}: the model changed since this checkpoint ({len(problems)} differences):\n  "
                + "\n  ".join(problems)
                + "\nGive the config that the checkpoint was made with, or start a new run."
            )
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        with context:
            return ocp.load(str(folder), abstract_tree)

    def _folder(self, step: int) -> Path:
        folder = retention.step_folder(self.directory, step)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such checkpoint; there are steps {retention.committed(self.directory)}")
        return folder

    def _make_room(self, path: Path, step: int) -> str:
        """Process 0: two lines, the name to write under and why the save cannot begin ('' if it can)."""
        if jax.process_index() != 0:
            return "\n"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            retention.remove_rubbish(self.directory)
            if path.exists():
                if step not in self._bad and not manifest.verify(path):
                    return f"\nstep {step} is already saved there"
                retention.remove(self.directory, path.name)
        except OSError as error:
            return f"\n{error}"
        self._bad.discard(step)
        self._attempts += 1  # a name of its own: threads of a save that failed may still be writing to theirs
        return f"{retention.unfinished_name(step, self._attempts)}\n"

    def _finish(self, save: Save, response: ocp.AsyncResponse, files: dict[str, bytes]) -> None:
        """Background thread: commit, manifest, final name, then retention."""
        process, count = jax.process_index(), jax.process_count()
        try:
            save.wait_for_commit(response.result)
            if process == 0:
                for name, content in files.items():
                    manifest.write_atomically(save.unfinished / name, content)
            manifest.write_part(save.unfinished, process, num_parts=count)
            if process == 0:
                save.wait_for_parts()
                manifest.rename_durably(save.unfinished, save.path)
        except _WRITE_ERRORS as error:
            save.error = f"cannot save {save.path}: {error}"
            with contextlib.suppress(OSError):
                save.tell_failure(process)
            return
        try:
            if process == 0:
                self._retain(save.step)
            save.error = ""
        except OSError as error:
            save.error = f"{save.path} is saved, but what it replaces cannot be removed: {error}"

    def _discard(self) -> None:
        """Removes what a failed save has left; a full disk gets its bytes back."""
        with contextlib.suppress(OSError):  # the next save tries again and reports
            retention.remove_rubbish(self.directory)

    def _retain(self, saved: int) -> None:
        """Removes what is no longer kept. `saved` is whole, so no other checkpoint is the only good one."""
        retention.remove_rubbish(self.directory)
        # Newer ones were written by another run: they are not counted here and not removed.
        past = [step for step in retention.committed(self.directory) if step <= saved]
        good = [step for step in self.steps() if step <= saved and step not in self._bad]
        keep = retention.kept({step: self._metric(step) for step in good}, self.config)
        for step in past:
            if step not in keep:
                retention.remove(self.directory, retention.step_folder(self.directory, step).name)
                self._bad.discard(step)

    def _metric(self, step: int) -> float | None:
        try:
            return manifest.read_json(self._folder(step) / _CLOCKS_FILE, lenient=True).get("metric")
        except (OSError, ValueError):
            return None  # damaged: it is not the best one


def _say_it_once(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that orbax's threads log of an error which `wait` raises anyway."""
    return "_SignalingThread.run() raised" not in record.getMessage()
