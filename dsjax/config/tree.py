"""The loaded tree between files and dataclasses: every value keeps its origin."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping

FAILED = object()
"""Stands where a problem was noted."""


@dataclasses.dataclass(slots=True)
class Leaf:
    """A scalar."""

    value: object
    origin: str
    text: str | None = None  # as typed after --set: a text field takes it even where YAML reads a number


@dataclasses.dataclass(slots=True)
class Section:
    """Keys and values."""

    items: "dict[str, Node]"
    origin: str
    replaces: bool = False  # a file was named: it replaces what was below


@dataclasses.dataclass(slots=True)
class List:
    """Items."""

    items: "list[Node]"
    origin: str


type Node = Leaf | Section | List


def join(path: str, key: object) -> str:
    """A dotted path one key longer."""
    return f"{path}.{key}" if path else str(key)


def closest(given: object, allowed: Iterable[str]) -> str:
    """The end of a message: the nearest allowed name, and all of them."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.5)
    return (f"; closest: {near[0]}" if near else "") + f"; allowed: {', '.join(allowed)}"


def given(node: "Node") -> str:
    """A given value, in words."""
    if isinstance(node, Section):
        return "a section with " + (", ".join(node.items) or "no keys")
    if isinstance(node, List):
        return f"a list of {len(node.items)}"
    words = {int: "whole number", float: "number", bool: "true/false", str: "text"}
    value = repr(node.value) if len(repr(node.value)) <= 80 else repr(node.value)[:80] + "..."
    return "nothing" if node.value is None else f"{value} ({words.get(type(node.value), type(node.value).__name__)})"


def wrap(value: object, origin: str, text: str | None = None) -> "Node":
    """Plain values as a tree."""
    if isinstance(value, Mapping):
        return Section({str(key): wrap(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list | tuple):
        return List([wrap(item, origin) for item in value], origin)
    return Leaf(value, origin, text)


def origins(node: "Node") -> list[str]:
    """Where the values below came from, without repeats, defaults left out."""
    if isinstance(node, Leaf):
        return [node.origin] * (node.origin != "default")
    below = node.items.values() if isinstance(node, Section) else node.items
    found = [origin for child in below for origin in origins(child)]
    return list(dict.fromkeys(found or [node.origin] * (node.origin not in ("default", ""))))


def merge(base: "Node", over: "Node") -> "Node":
    """Sections key by key; anything else, and a section that names a file, takes the place of what was there."""
    if not (isinstance(base, Section) and isinstance(over, Section)) or over.replaces:
        return over
    merged = {key: merge(base.items[key], node) if key in base.items else node for key, node in over.items.items()}
    return Section(base.items | merged, over.origin, base.replaces)
