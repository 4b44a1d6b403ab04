"""Docstrings begin with a verb or a noun of the field, and public names are words of the field."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEFINITIONS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(path: Path) -> list[str]:
    """Docstrings, and the strings that stand below attributes."""
    tree = ast.parse(path.read_text())
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return found + [node.value for node in strings if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("folder", ["dsjax", "pallas_kernels", "launch", "experiments"])
def test_no_docstring_begins_with_what_or_how(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    first = {path: [text.split()[0] for text in docstrings(path) if text.strip()] for path in files}
    bad = [f"{path.relative_to(ROOT)}: {word} ..." for path, words in first.items() for word in words if word in WORDS]
    assert not bad, "\n".join(bad)


WORDS = {"What", "How"}

# Word of a public name -> the word to use instead.
BANNED = {
    "pace": "schedule",
    "figures": "metrics",
    "alone": "local",
    "peer": "the name of the other program",
    "how": "options, mode or kind",
    "silent": "quiet",
    "beside": "with",
    "told": "report",
}


def public_names(body: list[ast.stmt]) -> list[tuple[int, str]]:
    """Line and name of public classes, functions and their arguments, fields and constants."""
    found: list[tuple[int, str]] = []
    for node in body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [(node.lineno, target.id) for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [(node.lineno, node.name), *public_names(node.body)]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.name == "__init__" or not node.name.startswith("_")
        ):
            given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            found += [(node.lineno, node.name), *((argument.lineno, argument.arg) for argument in given)]
    return [(line, name) for line, name in found if not name.startswith("_")]


@pytest.mark.parametrize("folder", ["dsjax", "pallas_kernels", "launch"])
def test_public_names_are_words_of_the_field(folder):
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {word} is {BANNED[word]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in public_names(ast.parse(path.read_text()).body)
        for word in sorted({*name.lower().split("_")} & {*BANNED})
    ]
    assert not bad, "\n".join(bad)


def test_public_names_are_found():
    tree = ast.parse("class Row:\n    pace: int\n    _own = 1\n    def go(self, peer): ...\ndef _f(how): ...\nA = 1\n")
    assert [name for _, name in public_names(tree.body)] == ["Row", "pace", "go", "self", "peer", "A"]
