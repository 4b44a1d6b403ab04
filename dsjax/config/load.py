"""From YAML files and `--set` to a checked config, and back to YAML.

A run file holds the sections of `RunConfig`. Any section may name a file, `mesh: ../mesh/cpu8.yaml`, or take one and
override parts of it, `model: {file: ../model/bloom-560m.yaml, dropout: 0.1}`; such names are relative to the file that
holds them (after `--set`: to the current directory). Naming a file replaces what the section held before. A key `file:`
at the top of a run file takes another run file as the base. Paths of data and tokenizers are relative to the current
directory, wherever the config lies.

Strict: a key that no dataclass knows, a key given twice, a value of the wrong type, anchors, aliases and tags are
errors, and all of them are reported at once. Scalars follow YAML 1.2: `1e-4` is a number, `on` and `no` are text.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from dsjax.config.run import RunConfig

MAX_BYTES = 2**20
MAX_NESTING = 32
MAX_FILES = 8
_FAILED = object()  # a problem was noted where this stands
_SET = "--set"


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line; `problems` holds them one by one."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)  # a key may hold a line break
        super().__init__("\n".join(self.problems))


# The loaded tree. Every value remembers where it came from.
@dataclasses.dataclass(slots=True)
class _Leaf:
    value: object
    origin: str
    text: str | None = None  # as typed after --set: a text field takes it even where YAML reads a number


@dataclasses.dataclass(slots=True)
class _Section:
    items: "dict[str, _Node]"
    origin: str
    replaces: bool = False  # a file was named: nothing below shows through


@dataclasses.dataclass(slots=True)
class _List:
    items: "list[_Node]"
    origin: str


type _Node = _Leaf | _Section | _List


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars; no anchors, aliases, tags, repeated keys or deep nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own class attribute; empty drops the YAML 1.1 rules)
    nesting = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"tags are not allowed; got {event.tag}", problem_mark=event.start_mark)
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise yaml.MarkedYAMLError(problem=f"nested over {MAX_NESTING} deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.nesting -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if not (isinstance(key_node, yaml.ScalarNode) and key_node.tag == "tag:yaml.org,2002:str"):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key_node.start_mark)
            if key_node.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        try:
            if node.tag == "tag:yaml.org,2002:int":
                return int(node.value, {"0o": 8, "0x": 16}.get(node.value[:2], 10))
            return float(re.sub(r"\.(?=[iInN])", "", node.value))
        except ValueError as error:  # over 4300 digits
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
for _name in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_name}", _StrictLoader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = not any(re.fullmatch(pattern, text) for pattern, _ in _SCALARS.values())
        # Only double quotes keep line separators: elsewhere PyYAML writes U+0085 as it is and reads a space.
        style = '"' if not text.isprintable() else None if plain else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str, name: str) -> object:
    """Strict YAML to plain Python values.

    Args:
        text: One YAML document.
        name: What to call it in errors.

    Raises:
        ConfigError: with name, line and column.

    Example:
        >>> parse_yaml("{rate: 1e-4, mode: on}", "example")
        {'rate': 0.0001, 'mode': 'on'}
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError([f"{name}{where}: {error.problem or error.context}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{name}: not readable as YAML: {' '.join(str(error).split())}"]) from error


# What the dataclasses say.
def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def sections(hint: object) -> tuple[type, ...]:
    """The dataclasses that a field of type `hint` may hold; () for any other field."""
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    return tuple(part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part))


@functools.cache
def field_types(cls: type) -> Mapping[str, object]:
    """Name -> type of a dataclass's fields, in the order of the class."""
    hints = typing.get_type_hints(cls)
    return types.MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})


def field_defaults(cls: type) -> dict[str, object]:
    """Name -> default of the fields that have one."""
    made = {
        f.name: f.default_factory() for f in dataclasses.fields(cls) if f.default_factory is not dataclasses.MISSING
    }
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING} | made


def kinds(hint: object) -> dict[str, type]:
    """`kind` tag -> dataclass of a union's members; {} where there is nothing to choose."""
    members = sections(hint)
    return {str(field_defaults(cls)["kind"]): cls for cls in members} if len(members) > 1 else {}


def describe(hint: object) -> str:
    """A field's type in words, as errors and the reference say it."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    arguments = typing.get_args(hint)
    if isinstance(hint, type) and hint in words:
        return words[hint]
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if typing.get_origin(hint) is tuple:
        return "a list, each item " + ", ".join(describe(part) for part in arguments if part is not ...)
    if choices := kinds(hint):
        return "a section with kind: " + " | ".join(choices)
    if sections(hint):
        return "a section"
    if _is_union(hint):
        return " or ".join(describe(part) for part in arguments)
    raise TypeError(f"the config loader has no rule for fields of type {hint}")


def _element(hint: object, index: int = 0) -> object:
    arguments = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    return arguments[0 if arguments[-1] is ... else min(index, len(arguments) - 1)] if arguments else None


def _children(hint: object) -> dict[str, object]:
    return {name: part for cls in sections(hint) for name, part in field_types(cls).items()}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _closest(given: object, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    return (f"; closest: {near[0]}" if near else "") + f"; allowed: {', '.join(allowed)}"


def _given(node: "_Node") -> str:
    if isinstance(node, _Section):
        return "a section with " + (", ".join(node.items) or "no keys")
    if isinstance(node, _List):
        return f"a list of {len(node.items)}"
    words = {int: "whole number", float: "number", bool: "true/false", str: "text"}
    value = repr(node.value) if len(repr(node.value)) <= 80 else repr(node.value)[:80] + "..."
    return "nothing" if node.value is None else f"{value} ({words.get(type(node.value), type(node.value).__name__)})"


def _wrap(value: object, origin: str, text: str | None = None) -> "_Node":
    if isinstance(value, Mapping):
        return _Section({str(key): _wrap(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return _List([_wrap(item, origin) for item in value], origin)
    return _Leaf(value, origin, text)


def _origins(node: "_Node") -> list[str]:
    """Where the values below came from, without repeats, defaults left out."""
    if isinstance(node, _Leaf):
        return [node.origin] * (node.origin != "default")
    below = node.items.values() if isinstance(node, _Section) else node.items
    found = [origin for child in below for origin in _origins(child)]
    return list(dict.fromkeys(found or [node.origin] * (node.origin not in ("default", ""))))


def _merge(base: "_Node", over: "_Node") -> "_Node":
    """Sections key by key; anything else, and a section that names a file, takes the place of what was there."""
    if not (isinstance(base, _Section) and isinstance(over, _Section)) or over.replaces:
        return over
    merged = {key: _merge(base.items[key], node) if key in base.items else node for key, node in over.items.items()}
    return _Section(base.items | merged, over.origin, base.replaces)


# Files and --set to one tree.
@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    name: str  # of the file, or --set
    folder: str
    trail: tuple[str, ...] = ()  # the files that led here


class _Reader:
    """Follows files and assignments, and notes what is wrong instead of stopping."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def read(self, path: str, hint: object, dotted: str, source: _Source) -> "_Node":
        """The section in the file at `path`, with the files that it names."""
        real, before = os.path.realpath(path), f"{source.name}: {dotted}: " if source.name else ""
        if real in source.trail or len(source.trail) >= MAX_FILES:
            why = "which leads back to itself" if real in source.trail else f"more than {MAX_FILES} files deep"
            self.problems.append(f"{before}names {path}, {why}")
            return _Leaf(_FAILED, source.name)
        try:
            value = _read_file(path)
        except ConfigError as error:
            self.problems.extend(before + problem for problem in error.problems)
            return _Leaf(_FAILED, source.name)
        inner = _Source(path, os.path.dirname(path), (*source.trail, real))
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{path}: holds {_given(_wrap(value, path))}; want keys and values")
            return _Leaf(_FAILED, path)
        return self.expand(value or {}, hint, dotted, inner)

    def expand(self, value: object, hint: object, dotted: str, source: _Source) -> "_Node":
        """`value` as a tree, the files it names read in."""
        if isinstance(value, list):
            parts = (self.expand(v, _element(hint, i), _join(dotted, i), source) for i, v in enumerate(value))
            return _List(list(parts), source.name)
        if not sections(hint):
            return _wrap(value, source.name)
        if isinstance(value, str):
            value = {"file": value}
        if value is None and type(None) not in typing.get_args(hint):
            value = {}  # `mesh:` with every key under it commented out
        if not isinstance(value, dict):
            return _wrap(value, source.name)
        hints = _children(hint)
        rest = {key: item for key, item in value.items() if key != "file"}
        own = _Section(
            {key: self.expand(item, hints.get(key), _join(dotted, key), source) for key, item in rest.items()},
            source.name,
        )
        if "file" not in value:
            return own
        if not isinstance(value["file"], str) or "\0" in value["file"]:
            self.problems.append(f"{source.name}: {_join(dotted, 'file')}: want the name of a YAML file")
            return _Leaf(_FAILED, source.name)
        base = self.read(os.path.normpath(os.path.join(source.folder, value["file"])), hint, dotted, source)
        if not isinstance(base, _Section):
            return base
        return dataclasses.replace(typing.cast(_Section, _merge(base, own)), replaces=True)

    def assign(self, root: "_Section", hint: object, assignment: str) -> None:
        """Put one `a.b=value` into the tree."""
        dotted, equals, text = assignment.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            self.problems.append(f"{_SET} {assignment}: write it as section.key=value")
            return
        if keys[-1] == "file" and len(keys) > 1:  # model.file=x is model=x
            keys.pop()
        node: _Node = root
        for index, key in enumerate(keys):
            below = self.enter(node, hint, key, ".".join(keys[:index]))
            if below is None:
                return
            if index == len(keys) - 1:
                self.put(node, key, self.expand(_parse_set(text), below[1], ".".join(keys), _Source(_SET, "")), text)
            node, hint = below

    def enter(self, node: "_Node", hint: object, key: str, path: str) -> "tuple[_Node, object] | None":
        """The child `key` of a node with its type; made where the file leaves it out; None and a problem if unknown."""
        where = f"{_SET}: {_join(path, key)}: "
        if isinstance(node, _List):
            if key.isdecimal() and int(key) < len(node.items):
                return node.items[int(key)], _element(hint, int(key))
            self.problems.append(f"{where}{path} has {len(node.items)} items, numbered from 0; got {key!r}")
            return None
        if not isinstance(node, _Section):
            if node.value is not _FAILED:
                self.problems.append(f"{where}{path} has no parts: it is {describe(hint)}")
            return None
        hints = _children(hint)
        if key not in hints:
            self.problems.append(f"{where}unknown key{_closest(key, hints)}")
            return None
        if key not in node.items:
            # Only now: a list that is left to its default can still be changed item by item.
            defaults = [field_defaults(cls) for cls in sections(hint)]
            default = next((_plain(d[key], hints[key]) for d in defaults if isinstance(d.get(key), tuple)), None)
            empty = _Section({}, "default") if sections(hints[key]) else _Leaf(None, "default")
            child = empty if default is None else _wrap(default, "default")
            if not isinstance(child, _Leaf):
                node.items[key] = child
            return child, hints[key]
        return node.items[key], hints[key]

    def put(self, node: "_Node", key: str, child: "_Node", text: str) -> None:
        """Hang `child` under `node`; another `kind` drops what only the defaults of the old one gave."""
        if isinstance(child, _Leaf):
            child.text = text
        if isinstance(node, _List):
            node.items[int(key)] = child
            node.origin = _SET
            return
        assert isinstance(node, _Section)
        if key == "kind":
            node.items = {name: item for name, item in node.items.items() if _origins(item)}
        node.items[key] = child


def _read_file(path: str) -> object:
    if not os.path.exists(path):
        folder = Path(path).parent
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")) if folder.is_dir() else []
        raise ConfigError([f"no such file: {path}" + (_closest(Path(path).name, names) if names else "")])
    if not os.path.isfile(path):
        raise ConfigError([f"not a file: {path}; want a YAML file"])
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{path}: over {MAX_BYTES:,} bytes, the most a config may have"])
    try:
        return parse_yaml(data.decode(), path)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from error


def _parse_set(text: str) -> object:
    """A scalar or [..] or {..} as YAML; whatever else is text."""
    try:
        value = parse_yaml(text, _SET)
    except ConfigError:
        return text
    return text if isinstance(value, dict | list) and text.strip()[0] not in "[{" else value


# The tree to dataclasses.
class _Decoder:
    """Builds dataclasses from a tree; `problems` collects, with dotted paths, what could not be built."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def fail(self, node: "_Node", path: str, what: str) -> object:
        origin = ", ".join(_origins(node))
        self.problems.append(": ".join(part for part in (origin, path, what) if part))
        return _FAILED

    def decode(self, node: "_Node", hint: object, path: str, default: object = None) -> object:
        """The value of one field; _FAILED, and the problem noted, if there is none."""
        if isinstance(node, _Leaf) and node.value is _FAILED:
            return _FAILED
        parts = typing.get_args(hint)
        if isinstance(node, _Leaf) and node.value is None and type(None) in parts:
            return None
        if sections(hint):
            return self.section(node, hint, path, default)
        if typing.get_origin(hint) is tuple:
            return self.sequence(node, hint, path)
        for part in parts if _is_union(hint) else (hint,):
            value = _scalar(node, part) if isinstance(node, _Leaf) else _FAILED
            if value is not _FAILED:
                return value
        names = [part for part in parts if isinstance(part, str)]  # of a Literal
        match = difflib.get_close_matches(_text(node), names, n=1)
        near = f"; closest: {match[0]}" if match else ""
        return self.fail(node, path, f"want {describe(hint)}{near}; got {_given(node)}")

    def sequence(self, node: "_Node", hint: object, path: str) -> object:
        parts = typing.get_args(hint)
        if not isinstance(node, _List) or (parts[-1] is not ... and len(node.items) != len(parts)):
            count = "" if parts[-1] is ... else f" ({len(parts)} items)"
            return self.fail(node, path, f"want {describe(hint)}{count}; got {_given(node)}")
        items = [self.decode(item, _element(hint, i), _join(path, i)) for i, item in enumerate(node.items)]
        return _FAILED if any(item is _FAILED for item in items) else tuple(items)

    def section(self, node: "_Node", hint: object, path: str, default: object) -> object:
        if not isinstance(node, _Section):
            return self.fail(node, path, f"want {describe(hint)}, or the name of a file; got {_given(node)}")
        cls = self.choose(node, hint, path, default)
        if cls is None:
            return _FAILED
        hints = field_types(cls)
        # A part of a section that is given keeps the enclosing default's values for the rest, if it is of that class.
        base = {name: getattr(default, name) for name in hints} if type(default) is cls else field_defaults(cls)
        values: dict[str, object] = {}
        for key in [key for key in node.items if key not in hints]:
            child, kind = node.items[key], f" for kind {base['kind']}" if kinds(hint) else ""
            what = f"unknown key{kind}; given {_given(child)}{_closest(key, hints)}"
            self.fail(child, _join(path, key), what)
        for name, part in hints.items():
            if name in node.items:
                values[name] = self.decode(node.items[name], part, _join(path, name), base.get(name))
            elif name in base:
                values[name] = base[name]
            elif sections(part):
                values[name] = self.section(_Section({}, node.origin), part, _join(path, name), None)
            else:
                values[name] = self.fail(node, _join(path, name), f"missing; want {describe(part)}")
        if any(value is _FAILED for value in values.values()):
            return _FAILED
        try:
            return cls(**values)
        except ValueError as error:
            return self.fail(node, path, str(error))

    def choose(self, node: "_Section", hint: object, path: str, default: object) -> type | None:
        """The member of a union that `kind` names; without one the default's."""
        choices = kinds(hint)
        if not choices:
            return sections(hint)[0]
        tag = node.items.get("kind")
        if tag is None:
            if type(default) in choices.values():
                return type(default)
            self.fail(node, _join(path, "kind"), f"missing; allowed: {', '.join(choices)}")
            return None
        if isinstance(tag, _Leaf) and tag.value in list(choices):
            return choices[str(tag.value)]
        self.fail(tag, _join(path, "kind"), f"unknown kind; given {_given(tag)}{_closest(_text(tag), choices)}")
        return None


def _text(node: "_Node") -> str:
    return str(node.value) if isinstance(node, _Leaf) else ""


def _scalar(node: _Leaf, hint: object) -> object:
    """The leaf as `hint`, or _FAILED. A bool is no number; 3 is a float, and 1e9 an int."""
    value = node.value
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return value if any(type(value) is type(choice) and value == choice for choice in choices) else _FAILED
    if hint is str:
        quoted = isinstance(value, str) and node.text is not None and node.text.strip()[:1] in ("'", '"')
        text = value if node.text is None or quoted else node.text
        return text if isinstance(text, str) else _FAILED
    if hint is bool:
        return value if isinstance(value, bool) else _FAILED
    if isinstance(value, bool) or not isinstance(value, int | float) or hint not in (int, float):
        return _FAILED
    try:
        number = float(value)
    except OverflowError:
        return _FAILED
    if hint is float:
        return number if math.isfinite(number) else _FAILED
    if isinstance(value, int):
        return value
    return int(value) if value.is_integer() and abs(value) <= 2**53 else _FAILED


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
        dsjax.config.load.ConfigError: mesh.yaml: dat: unknown key; given 2 (whole number); closest: data; \
allowed: data, fsdp, expert, tensor, zero_stage, platform, cpu_devices
    """
    decoder = _Decoder()
    value = decoder.decode(_wrap(mapping, origin), cls, "")
    if decoder.problems:
        raise ConfigError(decoder.problems)
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
        raise FileNotFoundError(f"no such config file: {path}")
    reader, decoder = _Reader(), _Decoder()
    tree = reader.read(str(path), RunConfig, "", _Source("", ""))
    if not isinstance(tree, _Section):
        raise ConfigError(reader.problems)
    for assignment in sets:
        reader.assign(tree, RunConfig, assignment)
    config = decoder.decode(tree, RunConfig, "")
    if problems := reader.problems + decoder.problems:
        raise ConfigError(problems)
    assert isinstance(config, RunConfig)
    return config, {dotted: _origin(tree, dotted.split(".")) for dotted in flatten(config)}


def _origin(node: "_Node", keys: list[str]) -> str:
    for key in keys:
        if isinstance(node, _Section) and key in node.items:
            node = node.items[key]
        elif isinstance(node, _List) and int(key) < len(node.items):
            node = node.items[int(key)]
        else:
            return "default"
    return node.origin


# And back.
def _plain(value: object, hint: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item, _element(hint, i)) for i, item in enumerate(value)]
    return float(value) if hint is float and isinstance(value, int) else value


def to_dict(config: object) -> dict[str, object]:
    """A config dataclass as dicts, lists and scalars, `kind` first; `from_dict` inverts it.

    Example:
        >>> from dsjax.data.config import BPETokenizer
        >>> to_dict(BPETokenizer(vocab_size=512))
        {'kind': 'bpe', 'vocab_size': 512}
    """
    hints = field_types(type(config))
    return {name: _plain(getattr(config, name), hints[name]) for name in sorted(hints, key=lambda n: n != "kind")}


def to_yaml(config: object) -> str:
    """A config dataclass as YAML that this loader and any YAML 1.1 reader understand alike."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def flatten(config: object) -> dict[str, object]:
    """Dotted path -> value of every leaf; a list of scalars is one leaf, as is an empty list."""
    return dict(_leaves(to_dict(config), ""))


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, _join(path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, _join(path, index))
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


def config_hash(config: object) -> str:
    """12 hex digits, equal for equal configs."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:12]
