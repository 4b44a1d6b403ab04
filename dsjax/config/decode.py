"""The tree to dataclasses, strictly; all problems are collected."""

import difflib
import math
import typing
from collections.abc import Mapping

from dsjax.config.schema import describe, element, field_defaults, field_types, is_union, kinds, renamed, sections
from dsjax.config.tree import FAILED, Leaf, List, Node, Section, closest, given, join, origins


class Decoder:
    """Builds dataclasses from a tree.

    Attributes:
        problems: the parts that could not be built, with their dotted paths.
        renamed: old dotted paths that were met -> what they are now.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.renamed: dict[str, str] = {}

    def fail(self, node: "Node", path: str, what: str) -> object:
        """Note a problem."""
        origin = ", ".join(origins(node))
        self.problems.append(": ".join(part for part in (origin, path, what) if part))
        return FAILED

    def decode(self, node: "Node", hint: object, path: str, default: object = None) -> object:
        """The value of one field; FAILED, and the problem noted, if there is none."""
        if isinstance(node, Leaf) and node.value is FAILED:
            return FAILED
        parts = typing.get_args(hint)
        if isinstance(node, Leaf) and node.value is None and type(None) in parts:
            return None
        if sections(hint):
            return self.section(node, hint, path, default)
        if typing.get_origin(hint) is tuple:
            return self.sequence(node, hint, path)
        for part in parts if is_union(hint) else (hint,):
            value = _scalar(node, part) if isinstance(node, Leaf) else FAILED
            if value is not FAILED:
                return value
        names = [part for part in parts if isinstance(part, str)]  # of a Literal
        match = difflib.get_close_matches(_text(node), names, n=1)
        near = f"; closest: {match[0]}" if match else ""
        return self.fail(node, path, f"want {describe(hint)}{near}; got {given(node)}")

    def sequence(self, node: "Node", hint: object, path: str) -> object:
        """A tuple."""
        parts = typing.get_args(hint)
        if not isinstance(node, List) or (parts[-1] is not ... and len(node.items) != len(parts)):
            count = "" if parts[-1] is ... else f" ({len(parts)} items)"
            return self.fail(node, path, f"want {describe(hint)}{count}; got {given(node)}")
        items = [self.decode(item, element(hint, i), join(path, i)) for i, item in enumerate(node.items)]
        return FAILED if any(item is FAILED for item in items) else tuple(items)

    def section(self, node: "Node", hint: object, path: str, default: object) -> object:
        """A dataclass."""
        if not isinstance(node, Section):
            return self.fail(node, path, f"want {describe(hint)}, or the name of a file; got {given(node)}")
        cls = self.choose(node, hint, path, default)
        if cls is None:
            return FAILED
        hints = field_types(cls)
        # A part of a section that is given keeps the enclosing default's values for the rest, if it is of that class.
        base = {name: getattr(default, name) for name in hints} if type(default) is cls else field_defaults(cls)
        values: dict[str, object] = {}
        items = self.current(node.items, cls, path)
        for key in [key for key in items if key not in hints]:
            child, kind = items[key], f" for kind {base['kind']}" if kinds(hint) else ""
            what = f"unknown key{kind}; given {given(child)}{closest(key, hints)}"
            if key in renamed(cls):
                what = f"is the old spelling of {renamed(cls)[key]}, which is given, too; remove one of them"
            self.fail(child, join(path, key), what)
        for name, part in hints.items():
            if name in items:
                values[name] = self.decode(items[name], part, join(path, name), base.get(name))
            elif name in base:
                values[name] = base[name]
            elif sections(part):
                values[name] = self.section(Section({}, node.origin), part, join(path, name), None)
            else:
                values[name] = self.fail(node, join(path, name), f"missing; want {describe(part)}")
        if any(value is FAILED for value in values.values()):
            return FAILED
        try:
            return cls(**values)
        except ValueError as error:
            return self.fail(node, path, str(error))

    def current(self, items: Mapping[str, Node], cls: type, path: str) -> dict[str, Node]:
        """The parts of a section under their keys of today; an old key beside its new one stays."""
        new = {key: name for key, name in renamed(cls).items() if key in items and name not in items}
        self.renamed |= {join(path, key): join(path, name) for key, name in new.items()}
        return {new.get(key, key): item for key, item in items.items()}

    def choose(self, node: "Section", hint: object, path: str, default: object) -> type | None:
        """The member of a union that `kind` names; without one the default's."""
        choices = kinds(hint)
        if not choices:
            return sections(hint)[0]
        tag = node.items.get("kind")
        if tag is None:
            if type(default) in choices.values():
                return type(default)
            self.fail(node, join(path, "kind"), f"missing; allowed: {', '.join(choices)}")
            return None
        if isinstance(tag, Leaf) and tag.value in list(choices):
            return choices[str(tag.value)]
        self.fail(tag, join(path, "kind"), f"unknown kind; given {given(tag)}{closest(_text(tag), choices)}")
        return None


def _text(node: "Node") -> str:
    return str(node.value) if isinstance(node, Leaf) else ""


def _scalar(node: Leaf, hint: object) -> object:
    """The leaf as `hint`, or FAILED. A bool is no number; 3 is a float, and 1e9 an int."""
    value = node.value
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return value if any(type(value) is type(choice) and value == choice for choice in choices) else FAILED
    if hint is str:
        quoted = isinstance(value, str) and node.text is not None and node.text.strip()[:1] in ("'", '"')
        text = value if node.text is None or quoted else node.text
        return text if isinstance(text, str) else FAILED
    if hint is bool:
        return value if isinstance(value, bool) else FAILED
    if isinstance(value, bool) or not isinstance(value, int | float) or hint not in (int, float):
        return FAILED
    try:
        number = float(value)
    except OverflowError:
        return FAILED
    if hint is float:
        return number if math.isfinite(number) else FAILED
    if isinstance(value, int):
        return value
    return int(value) if value.is_integer() and abs(value) <= 2**53 else FAILED
