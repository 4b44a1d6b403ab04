"""pyproject.toml names what is imported, and nothing else: of the package, of each extra, and of the tests."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_NAMES = {"orbax-checkpoint": "orbax", "pyyaml": "yaml", "ml-dtypes": "ml_dtypes", "flax": "flax"}
# Commands and plugins: used, but imported nowhere in the tests.
TOOLS = {"pytest-xdist", "ruff", "pyright", "pre-commit"}
OURS = {"dsjax", "pallas_kernels", "tests", "experiments"}
# Scripts that make what the tests read, with packages of another environment.
RECORDS = ROOT / "tests" / "golden" / "record"


def named(requirements: list[str]) -> set[str]:
    """The packages of a list of requirements."""
    return {re.split(r"[\[<>=; ]", requirement)[0] for requirement in requirements}


def modules(requirements: list[str]) -> set[str]:
    """What one imports of them."""
    return {OTHER_NAMES.get(name, name) for name in named(requirements)}


REQUIRED = modules(PROJECT["dependencies"])
EXTRAS = {name: modules(packages) for name, packages in PROJECT["optional-dependencies"].items()}
OPTIONAL = set().union(*(packages for name, packages in EXTRAS.items() if name != "dev")) - {"jax"}


@functools.cache
def trees(folder: str) -> dict[Path, ast.Module]:
    paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if RECORDS not in path.parents]
    return {path: ast.parse(path.read_text()) for path in paths}


def imported(tree: ast.Module, *, at_once: bool = False) -> set[str]:
    """Packages of others in a file's import statements; at_once: those that importing the file imports."""
    nodes = tree.body if at_once else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module)
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names - OURS - {"compression"}


def of_package(*, at_once: bool = False) -> dict[str, set[str]]:
    """File -> packages of others, of all that is in the wheel."""
    files = trees("dsjax") | trees("pallas_kernels")
    return {path.relative_to(ROOT).as_posix(): imported(tree, at_once=at_once) for path, tree in files.items()}


def test_what_is_imported_is_required_or_an_extra():
    for path, found in of_package().items():
        assert found <= REQUIRED | OPTIONAL, f"{path} imports {sorted(found - REQUIRED - OPTIONAL)}: no dependency"


def test_an_extra_is_imported_where_it_is_used_and_not_before():
    for path, found in of_package(at_once=True).items():
        assert found <= REQUIRED, f"{path} imports {sorted(found - REQUIRED)} at once, and it may not be installed"


def test_what_is_required_is_imported():
    missing = REQUIRED - set().union(*of_package().values())
    assert not missing, f"pyproject.toml: nothing imports {sorted(missing)}"


def test_every_extra_is_used():
    """By an import, or by its name where that is a setting."""
    texts = {node.value for tree in trees("dsjax").values() for node in ast.walk(tree) if is_text(node)}
    unused = OPTIONAL - set().union(*of_package().values()) - texts
    assert not unused, f"pyproject.toml: nothing uses {sorted(unused)}"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("extra", ["gguf", "parquet", "zstd", "tensorboard"])
def test_the_tests_have_the_extras_that_they_test(extra):
    assert EXTRAS[extra] <= EXTRAS["dev"]


def test_what_the_tests_import_is_installed_with_them():
    local = {path.stem for path in trees("tests")} | {path.parent.name for path in trees("tests")}
    found = set().union(*(imported(tree) for tree in trees("tests").values())) - local
    there = REQUIRED | EXTRAS["dev"]
    assert found <= there, f"the tests import {sorted(found - there)}"
    unused = named(PROJECT["optional-dependencies"]["dev"]) - TOOLS - OPTIONAL - found
    assert not unused, f"pyproject.toml: dev has {sorted(unused)}, which nothing imports"
