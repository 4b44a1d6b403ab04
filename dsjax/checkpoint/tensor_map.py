"""Maps between a model's tensors and those of a Hugging Face folder, declared once and used in both directions.

    ENTRIES = (
        Entry(("embedding", "table"), "word_embeddings.weight"),
        Entry(("layers", "{i}", "mlp", "up", "kernel"), "h.{i}.mlp.dense_h_to_4h.weight", TRANSPOSE),
    )

`{i}` runs over the layers. Names in a folder may carry a prefix ("transformer.") that depends on who wrote it.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

type Path = tuple[str, ...]


class TensorSource(Protocol):
    """Tensors by name in a Hugging Face folder, or in anything that can be read as if it were one."""

    @property
    def path(self) -> pathlib.Path:
        """Where they are."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor in a new array."""
        ...


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse functions of one tensor."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    """From the folder's layout to the model's."""
    to_theirs: Callable[[np.ndarray], np.ndarray]
    """And back."""


def _same(array: np.ndarray) -> np.ndarray:
    return array


IDENTITY = Transform(_same, _same)
TRANSPOSE = Transform(np.transpose, np.transpose)  # torch's Linear keeps [out, in], ours [in, out]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor, or one tensor of every layer if the patterns hold `{i}`."""

    ours: Path
    """The model's path, such as ("layers", "{i}", "attention", "qkv", "kernel")."""
    theirs: str
    """The folder's name, such as "h.{i}.self_attention.query_key_value.weight"."""
    transform: Transform = IDENTITY
    """Between the two layouts."""
    optional: bool = False
    """May be absent, on either side: a folder's tensor that the model does not expect is passed over."""
    prefixed: bool = True
    """Whether the folder's prefix stands before `theirs` (it never stands before "lm_head.weight")."""
    others: tuple[str, ...] = ()
    """Names that older writers gave it; read where `theirs` is absent."""

    def __post_init__(self) -> None:
        if any("{i}" in part for part in self.ours) != ("{i}" in self.theirs):
            raise ValueError(f"{self.ours} and {self.theirs!r}: {{i}} must be in both or in neither")


@dataclasses.dataclass(frozen=True)
class Unread:
    """Tensors that a folder may have and that a model has no place for.

    What is passed over must not change the model: it is a copy of what is used, or holds numbers that are computed, or
    belongs to a head that the model does not have (neither `same_as` nor `holds`).
    """

    names: str
    """Regular expression of whole names, with or without the folder's prefix."""
    same_as: str = ""
    """The folder's name, without prefix, of the tensor that is used in its place and must be equal."""
    holds: Callable[[np.ndarray], bool] | None = None
    """Whether the values are those that are computed."""


@dataclasses.dataclass(frozen=True)
class LazyTree(Mapping[Path, np.ndarray]):
    """path -> array; an array is read each time that it is asked for, and not kept."""

    folder: TensorSource
    """Where the tensors are."""
    found: Mapping[Path, tuple[str, Entry]]
    """path -> name in the folder and how it is turned."""
    unread: Mapping[str, Unread] = dataclasses.field(default_factory=dict)
    """Names in the folder that are passed over."""

    def __getitem__(self, path: Path) -> np.ndarray:
        name, entry = self.found[path]
        return entry.transform.to_ours(self.folder.read(name))

    def __contains__(self, path: object) -> bool:
        return path in self.found  # what a Mapping has from its parents would read the tensor

    def __iter__(self) -> Iterator[Path]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def check_unread(self) -> None:
        """Read what is passed over, and refuse it unless it equals the values that are used.

        Raises:
            ValueError: names the first tensor that does not.
        """
        names = {entry.theirs: name for name, entry in self.found.values()}
        for name, unread in self.unread.items():
            if unread.holds is not None and not unread.holds(self.folder.read(name)):
                raise ValueError(
                    f"{self.folder.path}: {name} does not hold the values that this model computes with; it is another "
                    "model than config.json says"
                )
            used = names.get(unread.same_as)
            if used is not None and not _equal(self.folder, name, used):
                raise ValueError(
                    f"{self.folder.path}: {name} is to be the same as {used}, but it is another tensor; if the model "
                    'has both, config.json must say "tie_word_embeddings": false; else remove it'
                )


def read_tree(
    folder: TensorSource,
    entries: Sequence[Entry],
    expected: Mapping[Path, tuple[int, ...]],
    *,
    num_layers: int,
    prefixes: Sequence[str] = ("", "transformer."),
    unread: Sequence[Unread] = (),
) -> LazyTree:
    """Finds the tensors of a model in a folder; each is read when it is asked for, in the model's layout.

    Args:
        folder: from `open_folder`.
        entries: the map.
        expected: path -> shape of every tensor of the model.
        num_layers: range of `{i}`.
        prefixes: the one under which most names are found is used.
        unread: tensors that hold no parameters of the model (attention masks); see `LazyTree.check_unread`.

    Returns:
        path -> array, in the stored dtype, for every expected path; an optional tensor that the folder lacks is left
        out.

    Raises:
        ValueError: lists all missing, extra and misshapen tensors. Found before any tensor is read.

    Example:
        >>> import tempfile, pathlib
        >>> from dsjax.checkpoint.safetensors_folder import open_folder, write_folder
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model"
        >>> entries = [Entry(("layers", "{i}", "kernel"), "h.{i}.weight", TRANSPOSE)]
        >>> ours = {("layers", "0", "kernel"): np.ones((2, 3), np.float32)}
        >>> write_folder(path, write_tree(ours, entries, num_layers=1, prefix="transformer."), config={})
        >>> open_folder(path).shape("transformer.h.0.weight")
        (3, 2)
        >>> tree = read_tree(open_folder(path), entries, {("layers", "0", "kernel"): (2, 3)}, num_layers=1)
        >>> {path: array.shape for path, array in tree.items()}
        {('layers', '0', 'kernel'): (2, 3)}
    """
    names = set(folder.names())
    by_prefix = {prefix: dict(_expand(entries, num_layers, prefix, names)) for prefix in prefixes}
    prefix = max(prefixes, key=lambda prefix: sum(name in names for name, _ in by_prefix[prefix].values()))
    sources = by_prefix[prefix]
    assert expected.keys() <= sources.keys(), f"no entry for {sorted(expected.keys() - sources.keys())}"

    problems = []
    for path, shape in expected.items():
        name, entry = sources[path]
        if name in names:
            problems += _misfit(folder, name, entry, tuple(shape))
        elif not entry.optional:
            problems.append(f"missing: {name} {list(shape)}")
    known = {name for path, (name, entry) in sources.items() if path in expected or entry.optional}
    passed = {name: rule for name in sorted(names - known) if (rule := _rule(name, prefix, unread)) is not None}
    extra = sorted(names - known - passed.keys())
    problems += [f"extra: {name} {list(folder.shape(name))}" for name in extra]
    if problems:
        raise ValueError(f"{folder.path} does not fit the model ({len(problems)} tensors):\n  " + "\n  ".join(problems))

    return LazyTree(folder, {path: sources[path] for path in expected if sources[path][0] in names}, passed)


def write_tree(
    flat: Mapping[Path, np.ndarray], entries: Sequence[Entry], *, num_layers: int, prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a model under the folder's names and in its layout, one at a time, for `write_folder`.

    Args:
        flat: path -> array (numpy, or anything numpy can copy from).
        entries: the map.
        num_layers: range of `{i}`.
        prefix: put before every name whose entry is `prefixed`.

    Raises:
        ValueError: lists the paths that the map lacks, and those that the map has and `flat` lacks.
    """
    sources = dict(_expand(entries, num_layers, prefix))
    problems = [f"missing: {'/'.join(path)}" for path, (_, e) in sources.items() if path not in flat and not e.optional]
    problems += [f"not in the map: {'/'.join(path)}" for path in flat if path not in sources]
    if problems:
        raise ValueError(f"the model does not fit the map ({len(problems)} tensors):\n  " + "\n  ".join(problems))
    found = ((path, source) for path, source in sources.items() if path in flat)
    return ((name, entry.transform.to_theirs(np.asarray(flat[path]))) for path, (name, entry) in found)


def _expand(
    entries: Sequence[Entry], num_layers: int, prefix: str, present: Collection[str] = ()
) -> Iterator[tuple[Path, tuple[str, Entry]]]:
    """(our path, (their name, entry)) for every tensor of every layer; of several names the first that is present."""
    for entry in entries:
        for i in range(num_layers) if "{i}" in entry.theirs else (0,):
            path = tuple(part.replace("{i}", str(i)) for part in entry.ours)
            before = prefix if entry.prefixed else ""
            name, *others = (before + theirs.replace("{i}", str(i)) for theirs in (entry.theirs, *entry.others))
            yield path, (next((other for other in others if name not in present and other in present), name), entry)


def _misfit(folder: TensorSource, name: str, entry: Entry, shape: tuple[int, ...]) -> list[str]:
    """The shape after the transform, found on a one-byte stand-in whose pages are never touched by a mere view."""
    stand_in = np.empty(folder.shape(name), np.uint8)
    try:
        found = entry.transform.to_ours(stand_in).shape
    except ValueError:
        found = None  # a custom transform does not accept its shape
    if found == shape:
        return []
    return [f"misshapen: {name} {list(folder.shape(name))}: the model needs {list(shape)} as {'/'.join(entry.ours)}"]


def _rule(name: str, prefix: str, unread: Sequence[Unread]) -> Unread | None:
    """The reason for leaving a tensor out."""
    candidates = {name, name.removeprefix(prefix)}
    return next((rule for rule in unread if any(re.fullmatch(rule.names, each) for each in candidates)), None)


def _equal(folder: TensorSource, one: str, other: str) -> bool:
    return folder.shape(one) == folder.shape(other) and np.array_equal(folder.read(one), folder.read(other))
