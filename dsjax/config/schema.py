"""Schema of the dataclasses: the fields of a config, their types and defaults, the kinds of a union."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping


def is_union(hint: object) -> bool:
    """Whether a type is a choice between several."""
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def sections(hint: object) -> tuple[type, ...]:
    """The dataclasses that a field of type `hint` may hold; () for any other field."""
    parts = typing.get_args(hint) if is_union(hint) else (hint,)
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
    if is_union(hint):
        return " or ".join(describe(part) for part in arguments)
    raise TypeError(f"the config loader has no rule for fields of type {hint}")


def element(hint: object, index: int = 0) -> object:
    """The type of a tuple's item; None for other types."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) is tuple else ()
    return arguments[0 if arguments[-1] is ... else min(index, len(arguments) - 1)] if arguments else None


def children(hint: object) -> dict[str, object]:
    """Name -> type of the fields that a section may have, whatever its kind."""
    return {name: part for cls in sections(hint) for name, part in field_types(cls).items()}


def renamed(hint: object) -> dict[str, str]:
    """Old key -> key of the fields that had another one, which their metadata call `was`; old keys go on working.

    Of a union without those that another member has as a key.

    Example:
        >>> from dsjax.data.config import LengthConfig
        >>> renamed(LengthConfig)
        {'how': 'mode'}
    """
    fields = [field for cls in sections(hint) for field in dataclasses.fields(cls) if "was" in field.metadata]
    return {field.metadata["was"]: field.name for field in fields if field.metadata["was"] not in children(hint)}


def plain(value: object, hint: object) -> object:
    """A field's value as YAML writes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [plain(item, element(hint, i)) for i, item in enumerate(value)]
    return float(value) if hint is float and isinstance(value, int) else value


def to_dict(config: object) -> dict[str, object]:
    """A config dataclass as dicts, lists and scalars, `kind` first; `from_dict` inverts it.

    Example:
        >>> from dsjax.data.config import BPETokenizer
        >>> to_dict(BPETokenizer(vocab_size=512))
        {'kind': 'bpe', 'vocab_size': 512}
    """
    hints = field_types(type(config))
    return {name: plain(getattr(config, name), hints[name]) for name in sorted(hints, key=lambda n: n != "kind")}
