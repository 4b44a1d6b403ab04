"""Functions fit on a screen, take few parameters, and somebody uses them: read with ast, nothing is imported."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("dsjax", "pallas_kernels")
READERS = (*CODE, "experiments", "launch", "docs", "README.md")
"""Where a use counts; a definition that tests alone use is dead."""
MOST_LINES = 60
"""From `def` to the end; the docstring is not counted."""
MOST_PARAMETERS = 8
"""`self` and `cls` are not counted."""

# Factories in optax's manner: their parameters are the constants of the paper.
FACTORIES = {"scale_by_onebit_adam", "onebit_adam", "onebit_lamb", "zero_one_adam"}
# Of the public API what users alone call: modules of their own, tests of their own.
FOR_USERS: set[str] = set()
# What a library calls: methods of its classes.
OVERRIDES = {"readable", "readinto"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parsed(folder: str) -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted((ROOT / folder).rglob("*.py"))}


def functions(folder: str) -> Iterator[tuple[str, Function]]:
    """Where each function is, and the function; those inside of others too."""
    for path, tree in parsed(folder).items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def num_lines(function: Function) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def num_parameters(function: Function) -> int:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [argument.arg for argument in (given.vararg, given.kwarg) if argument is not None]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("folder", CODE)
def test_functions_fit_on_a_screen(folder):
    long = [f"{where}: {n} lines" for where, node in functions(folder) if (n := num_lines(node)) > MOST_LINES]
    assert not long, f"more than {MOST_LINES} lines without the docstring:\n" + "\n".join(long)


@pytest.mark.parametrize("folder", CODE)
def test_functions_take_few_parameters(folder):
    many = [
        f"{where}: {n} parameters"
        for where, node in functions(folder)
        if (n := num_parameters(node)) > MOST_PARAMETERS and node.name not in FACTORIES
    ]
    assert not many, f"more than {MOST_PARAMETERS}; pass what belongs together as one thing:\n" + "\n".join(many)


def test_the_factories_are_there_and_need_their_place():
    assert {node.name for _, node in functions("dsjax") if num_parameters(node) > MOST_PARAMETERS} == FACTORIES


def definitions() -> Iterator[tuple[str, str, bool]]:
    """Where each function, class and method is, its name, and whether it is a method; not those inside of functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for folder in CODE:
        for path, tree in parsed(folder).items():
            for node in (node for node in tree.body if isinstance(node, kinds)):
                yield f"{path}:{node.lineno} {node.name}", node.name, False
                if isinstance(node, ast.ClassDef):
                    for method in (method for method in node.body if isinstance(method, kinds)):
                        yield f"{path}:{method.lineno} {node.name}.{method.name}", method.name, True


def identifiers(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Names that code reads or imports, strings such as in `__all__`, and whether a method may be meant; no prose."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                yield name, False
            case ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                yield name, True
            case ast.alias(name=name):
                yield name.rpartition(".")[2], False


@functools.cache
def mentioned() -> frozenset[tuple[str, bool]]:
    """All names that are used outside of tests: in code, and in code that a text shows."""
    found: set[tuple[str, bool]] = set()
    for reader in READERS:
        place = ROOT / reader
        for path in sorted([place] if place.is_file() else place.rglob("*.md")):
            for code in re.findall(r"```.*?```|`[^`\n]+`", path.read_text(), flags=re.DOTALL):
                found |= {(word, True) for word in re.findall(r"\w+", code)}
        for tree in parsed(reader).values() if place.is_dir() else ():
            found |= {*identifiers(tree)}
    return frozenset(found)


def unused() -> list[tuple[str, str]]:
    """Where each definition is that nobody mentions, and its name."""
    found = mentioned()
    uses = lambda name, method: (name, True) in found or (not method and (name, False) in found)
    return [(where, name) for where, name, method in definitions() if not uses(name, method) and name[:2] != "__"]


def test_no_dead_definition():
    """A name that stands nowhere but in its definition is used by nobody, or by tests and examples alone."""
    dead = [where for where, name in unused() if name not in FOR_USERS | OVERRIDES]
    assert not dead, "nobody uses these; remove them, or show in README or docs how users do:\n" + "\n".join(dead)


def test_the_exceptions_need_their_place():
    assert {name for _, name in unused()} >= FOR_USERS | OVERRIDES
