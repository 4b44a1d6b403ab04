"""Every test is in one of two tiers, `make test` and `make test-slow`, by its own marker alone; CI runs both."""

import ast
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAST, SLOW = "not slow", "slow"


def recipe(target: str) -> str:
    """The commands of a target of the Makefile, printed and not run."""
    command = ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/installed", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_two_tiers_are_all_tests_and_no_test_is_in_both():
    fast, slow = (recipe(target) for target in ("test", "test-slow"))
    assert fast.count(f"-m '{FAST}'") == slow.count(f"-m '{SLOW}'") == 1
    # The same tests, but for the marker: no path, -k, --ignore or --deselect in one of them.
    assert fast.replace(f"-m '{FAST}'", "") == slow.replace(f"-m '{SLOW}'", "")
    both = fast + (ROOT / "pyproject.toml").read_text()
    assert not [word for word in (" -k", "--ignore", "--deselect", "norecursedirs", "python_files") if word in both]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests", "dsjax", "pallas_kernels"]
    assert "-m" not in settings["addopts"].split()


def test_ci_runs_both():
    text = (ROOT / ".ci" / "run").read_text()
    assert "in install lint types models test test-slow; do" in text


def test_only_a_marker_in_a_tests_own_file_makes_it_slow():
    """Never a hook or a helper: who reads a test sees its tier."""
    said = 0
    for path in sorted((ROOT / "tests").rglob("*.py")):
        marks = [node for node in ast.walk(ast.parse(path.read_text())) if is_slow(node)]
        assert not marks or path.name.startswith("test_"), f"{path.relative_to(ROOT)} marks tests of other files"
        said += len(marks)
        assert path.stem != "conftest" or "slow" not in path.read_text(), f"{path.relative_to(ROOT)} chooses a tier"
    assert said > 10


def is_slow(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "slow" and ast.unparse(node) == "pytest.mark.slow"
