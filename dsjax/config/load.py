"""From YAML files and `--set` to a checked config, and back to YAML.

A run file holds the sections of `RunConfig`. Any section may name a file, `mesh: ../mesh/cpu8.yaml`, or take one and
override parts of it, `model: {file: ../model/bloom-560m.yaml, dropout: 0.1}`; such names are relative to the file that
holds them (after `--set`: to the current directory). Naming a file replaces what the section held before. A key `file:`
at the top of a run file takes another run file as the base. A run file `configs/...` that is not in the current
directory is looked for among those that dsjax is installed with. Paths of data and tokenizers are relative to the
current directory, wherever the config lies.

Strict: a key that no dataclass knows, a key given twice, a value of the wrong type, anchors, aliases and tags are
errors, and all of them are reported at once. Scalars follow YAML 1.2: `1e-4` is a number, `on` and `no` are text. A key
that was renamed is taken under its old name, too (a field's metadata `was`); one warning lists them.
"""

import os
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from dsjax.config.decode import Decoder
from dsjax.config.read import Reader, Source
from dsjax.config.run import RunConfig
from dsjax.config.schema import to_dict
from dsjax.config.strict_yaml import ConfigError, Dumper
from dsjax.config.tree import List, Node, Section, join, wrap

__all__ = [
    "ConfigError",
    "decode",
    "differences",
    "flatten",
    "from_dict",
    "load_run",
    "load_with_origins",
    "to_dict",
    "to_yaml",
]

INSTALLED = Path(__file__).parents[1]
"""The package, in which the presets lie as configs/."""


def decode[T](cls: type[T], mapping: Mapping[str, object], *, origin: str) -> T:
    """A config dataclass from plain values.

    Args:
        cls: The dataclass.
        mapping: Its fields; nested dataclasses as mappings, tuples as lists, unions told apart by `kind`.
        origin: Where the values came from, put before each problem; "" puts nothing.

    Raises:
        ConfigError: with every problem.

    Example:
        >>> from dsjax.mesh.config import MeshConfig
        >>> decode(MeshConfig, {"data": 2, "tensor": 4.0}, origin="").tensor
        4
        >>> decode(MeshConfig, {"dat": 2}, origin="mesh.yaml")
        Traceback (most recent call last):
        ...
        dsjax.config.strict_yaml.ConfigError: mesh.yaml: dat: unknown key; given 2 (whole number); closest: data; \
allowed: data, fsdp, expert, tensor, zero_stage, platform, cpu_devices
    """
    decoder = Decoder()
    value = decoder.decode(wrap(mapping, origin), cls, "")
    if decoder.problems:
        raise ConfigError(decoder.problems)
    _warn_of_old_keys(decoder.renamed)
    return typing.cast(T, value)


def from_dict[T](cls: type[T], mapping: Mapping[str, object]) -> T:
    """The inverse of `to_dict`; raises ConfigError as `decode` does."""
    return decode(cls, mapping, origin="")


def load_run(path: str | Path, sets: Sequence[str] = ()) -> RunConfig:
    """A run's config from its YAML file and `--set` assignments, in order.

    Args:
        path: The run file.
        sets: Such as "train.steps=10", "model=configs/model/tiny.yaml", "data.sources.0.path=x".

    Raises:
        FileNotFoundError: the run file is not there.
        ConfigError: with every problem of the file, the files that it names, and the assignments.
    """
    return load_with_origins(path, sets)[0]


def load_with_origins(path: str | Path, sets: Sequence[str] = ()) -> tuple[RunConfig, dict[str, str]]:
    """As `load_run`, and for each dotted path the file that gave it, '--set', or 'default'."""
    if not os.path.exists(path):
        given, path = path, INSTALLED / path
        if not path.is_relative_to(INSTALLED / "configs") or not path.is_file():
            raise FileNotFoundError(f"no such config file: {given}")
    reader, decoder = Reader(), Decoder()
    tree = reader.read(str(path), RunConfig, "", Source("", ""))
    if not isinstance(tree, Section):
        raise ConfigError(reader.problems)
    for assignment in sets:
        reader.assign(tree, RunConfig, assignment)
    config = decoder.decode(tree, RunConfig, "")
    if problems := reader.problems + decoder.problems:
        raise ConfigError(problems)
    assert isinstance(config, RunConfig)
    _warn_of_old_keys(reader.renamed | decoder.renamed)
    return config, {dotted: _origin(tree, dotted.split(".")) for dotted in flatten(config)}


def _warn_of_old_keys(renamed: Mapping[str, str]) -> None:
    """One warning for all of them."""
    if renamed:
        listed = ", ".join(f"{old} is {new} now" for old, new in renamed.items())
        warnings.warn(f"keys under their old names, which still work: {listed}", stacklevel=1)


def _origin(node: "Node", keys: list[str]) -> str:
    for key in keys:
        if isinstance(node, Section) and key in node.items:
            node = node.items[key]
        elif isinstance(node, List) and int(key) < len(node.items):
            node = node.items[int(key)]
        else:
            return "default"
    return node.origin


def to_yaml(config: object) -> str:
    """A config dataclass as YAML that this loader and any YAML 1.1 reader understand alike."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def flatten(config: object) -> dict[str, object]:
    """Dotted path -> value of every leaf; a list of scalars is one leaf, as is an empty list."""
    return dict(_leaves(to_dict(config), ""))


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, join(path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, join(path, index))
    else:
        yield path, value


def differences(a: object, b: object) -> list[tuple[str, object, object]]:
    """(dotted path, a's value, b's value) wherever two configs differ; None where one has no such path.

    Example:
        >>> from dsjax.mesh.config import MeshConfig
        >>> differences(MeshConfig(data=2), MeshConfig(data=4))
        [('data', 2, 4)]
    """
    left, right = flatten(a), flatten(b)
    paths = left | right
    return [(path, left.get(path), right.get(path)) for path in paths if left.get(path) != right.get(path)]
