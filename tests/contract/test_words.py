"""Docstrings begin with a verb or a noun of the field."""

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


@pytest.mark.parametrize("folder", ["dsjax", "pallas_kernels", "launch"])
def test_no_docstring_begins_with_what_or_how(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    first = {path: [text.split()[0] for text in docstrings(path) if text.strip()] for path in files}
    bad = [f"{path.relative_to(ROOT)}: {word} ..." for path, words in first.items() for word in words if word in WORDS]
    assert not bad, "\n".join(bad)


WORDS = {"What", "How"}
