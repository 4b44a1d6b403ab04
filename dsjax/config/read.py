"""Files, the files that they name, and `--set` assignments, to one tree."""

import dataclasses
import os
import typing
from collections.abc import Collection
from pathlib import Path

from dsjax.config.schema import children, describe, element, field_defaults, plain, renamed, sections
from dsjax.config.strict_yaml import ConfigError, parse_yaml
from dsjax.config.tree import FAILED, Leaf, List, Node, Section, closest, given, join, merge, origins, wrap

MAX_BYTES = 2**20
MAX_FILES = 8
SET = "--set"


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where assignments or keys are being read from."""

    name: str  # of the file, or --set
    folder: str
    trail: tuple[str, ...] = ()  # the files that led here


class Reader:
    """Follows files and assignments, and notes what is wrong instead of stopping."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.renamed: dict[str, str] = {}  # old dotted paths that were met -> what they are now

    def read(self, path: str, hint: object, dotted: str, source: Source) -> "Node":
        """The section in the file at `path`, with the files that it names."""
        real, before = os.path.realpath(path), f"{source.name}: {dotted}: " if source.name else ""
        if real in source.trail or len(source.trail) >= MAX_FILES:
            why = "which leads back to itself" if real in source.trail else f"more than {MAX_FILES} files deep"
            self.problems.append(f"{before}names {path}, {why}")
            return Leaf(FAILED, source.name)
        try:
            value = _read_file(path)
        except ConfigError as error:
            self.problems.extend(before + problem for problem in error.problems)
            return Leaf(FAILED, source.name)
        inner = Source(path, os.path.dirname(path), (*source.trail, real))
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{path}: holds {given(wrap(value, path))}; want keys and values")
            return Leaf(FAILED, path)
        return self.expand(value or {}, hint, dotted, inner)

    def expand(self, value: object, hint: object, dotted: str, source: Source) -> "Node":
        """`value` as a tree, the files it names read in."""
        if isinstance(value, list):
            parts = (self.expand(v, element(hint, i), join(dotted, i), source) for i, v in enumerate(value))
            return List(list(parts), source.name)
        if not sections(hint):
            return wrap(value, source.name)
        if isinstance(value, str):
            value = {"file": value}
        if value is None and type(None) not in typing.get_args(hint):
            value = {}  # `mesh:` with every key under it commented out
        if not isinstance(value, dict):
            return wrap(value, source.name)
        hints = children(hint)
        value = {self.current(key, hint, dotted, value): item for key, item in value.items()}
        rest = {key: item for key, item in value.items() if key != "file"}
        own = Section(
            {key: self.expand(item, hints.get(key), join(dotted, key), source) for key, item in rest.items()},
            source.name,
        )
        if "file" not in value:
            return own
        if not isinstance(value["file"], str) or "\0" in value["file"]:
            self.problems.append(f"{source.name}: {join(dotted, 'file')}: want the name of a YAML file")
            return Leaf(FAILED, source.name)
        base = self.read(os.path.normpath(os.path.join(source.folder, value["file"])), hint, dotted, source)
        if not isinstance(base, Section):
            return base
        return dataclasses.replace(typing.cast(Section, merge(base, own)), replaces=True)

    def current(self, key: str, hint: object, path: str, given: Collection[str] = ()) -> str:
        """The key that an old one has become, and the change noted; any other, or one given beside it, as it is."""
        new = renamed(hint).get(key, key)
        if new == key or new in given:
            return key
        self.renamed[join(path, key)] = join(path, new)
        return new

    def assign(self, root: "Section", hint: object, assignment: str) -> None:
        """Put one `a.b=value` into the tree."""
        dotted, equals, text = assignment.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            self.problems.append(f"{SET} {assignment}: write it as section.key=value")
            return
        if keys[-1] == "file" and len(keys) > 1:  # model.file=x is model=x
            keys.pop()
        node: Node = root
        for index, key in enumerate(keys):
            key = keys[index] = self.current(key, hint, ".".join(keys[:index]))
            below = self.enter(node, hint, key, ".".join(keys[:index]))
            if below is None:
                return
            if index == len(keys) - 1:
                self.put(node, key, self.expand(_parse_set(text), below[1], ".".join(keys), Source(SET, "")), text)
            node, hint = below

    def enter(self, node: "Node", hint: object, key: str, path: str) -> "tuple[Node, object] | None":
        """The child `key` of a node with its type; made where the file leaves it out; None and a problem if unknown."""
        where = f"{SET}: {join(path, key)}: "
        if isinstance(node, List):
            if key.isdecimal() and int(key) < len(node.items):
                return node.items[int(key)], element(hint, int(key))
            self.problems.append(f"{where}{path} has {len(node.items)} items, numbered from 0; got {key!r}")
            return None
        if not isinstance(node, Section):
            if node.value is not FAILED:
                self.problems.append(f"{where}{path} has no parts: it is {describe(hint)}")
            return None
        hints = children(hint)
        if key not in hints:
            self.problems.append(f"{where}unknown key{closest(key, hints)}")
            return None
        if key not in node.items:
            # Only now: a list that is left to its default can still be changed item by item.
            defaults = [field_defaults(cls) for cls in sections(hint)]
            default = next((plain(d[key], hints[key]) for d in defaults if isinstance(d.get(key), tuple)), None)
            empty = Section({}, "default") if sections(hints[key]) else Leaf(None, "default")
            child = empty if default is None else wrap(default, "default")
            if not isinstance(child, Leaf):
                node.items[key] = child
            return child, hints[key]
        return node.items[key], hints[key]

    def put(self, node: "Node", key: str, child: "Node", text: str) -> None:
        """Hang `child` under `node`; another `kind` drops what only the defaults of the old one gave."""
        if isinstance(child, Leaf):
            child.text = text
        if isinstance(node, List):
            node.items[int(key)] = child
            node.origin = SET
            return
        assert isinstance(node, Section)
        if key == "kind":
            node.items = {name: item for name, item in node.items.items() if origins(item)}
        node.items[key] = child


def _read_file(path: str) -> object:
    if not os.path.exists(path):
        folder = Path(path).parent
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")) if folder.is_dir() else []
        raise ConfigError([f"no such file: {path}" + (closest(Path(path).name, names) if names else "")])
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
        value = parse_yaml(text, SET)
    except ConfigError:
        return text
    return text if isinstance(value, dict | list) and text.strip()[0] not in "[{" else value
