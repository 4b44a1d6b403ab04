"""Strict YAML: scalars as in YAML 1.2 (`1e-4` is a number, `on` is text), no anchors, tags or repeated keys."""

import re
from collections.abc import Iterable

import yaml

MAX_NESTING = 32


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line; `problems` holds them one by one."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)  # a key may hold a line break
        super().__init__("\n".join(self.problems))


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


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Text, quoted where it must be."""
        plain = not any(re.fullmatch(pattern, text) for pattern, _ in _SCALARS.values())
        # Only double quotes keep line separators: elsewhere PyYAML writes U+0085 as it is and reads a space.
        style = '"' if not text.isprintable() else None if plain else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, Dumper.represent_text)


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
