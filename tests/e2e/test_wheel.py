"""The wheel: both packages and the presets, and a run file that is found in it from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installed wheel, without what it depends on; built from a clean clone, as git has it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*build, str(folder / "clone")], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow  # setuptools comes from the package index; tests/contract looks at pyproject.toml
def test_it_holds_the_packages_and_the_presets(installed: Path):
    assert {path.name for path in installed.iterdir() if ".dist-info" not in path.name} == {"dsjax", "pallas_kernels"}
    own = {path.relative_to(CONFIGS): path.read_bytes() for path in CONFIGS.rglob("*") if path.is_file()}
    there = installed / "dsjax" / "configs"
    found = {path.relative_to(there): path.read_bytes() for path in there.rglob("*") if path.is_file()}
    assert found == own and len(own) > 50
    code = sorted(
        path.relative_to(ROOT) for name in ("dsjax", "pallas_kernels") for path in (ROOT / name).rglob("*.py")
    )
    assert [path for path in code if not (installed / path).is_file()] == []


@pytest.mark.slow
def test_the_command_finds_a_preset_from_anywhere(installed: Path, tmp_path: Path):
    command = [sys.executable, "-m", "dsjax", "config", "show", "configs/run/quickstart.yaml", "--origins"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(installed / "dsjax" / "configs" / "run" / "quickstart.yaml") in done.stdout
