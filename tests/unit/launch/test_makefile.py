"""Which Python the Makefile takes and when it installs, with small shell scripts in place of the Pythons."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="no make")

# What a version manager leaves on the PATH for a version that is not chosen.
SHIM = "#!/bin/sh\necho 'command not found' >&2\nexit 127\n"
# Too old: the Makefile's question about the version gets a no.
OLD = "#!/bin/sh\nexit 1\n"
# Answers the question with yes; `-m venv` makes a folder whose python writes down what pip was asked for.
USABLE = """#!/bin/sh
if [ "$1" = -c ]; then exit 0; fi
echo "$0 $*" >> "$LOG"
for folder; do :; done
mkdir -p "$folder/bin"
printf '#!/bin/sh\\nif [ "$1" = -c ]; then exit 0; fi\\necho "$0 $*" >> "$LOG"\\n' > "$folder/bin/python"
chmod +x "$folder/bin/python"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "bin").mkdir()
    return tmp_path


def make(folder: Path, *targets: str, **pythons: str) -> tuple[int, str, list[str]]:
    """make with only the given programs (python3_14="...") and the system's tools on the PATH."""
    for name, text in pythons.items():
        program = folder / "bin" / name.replace("_", ".")
        program.write_text(text)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for tool in ("sh", "rm", "mkdir", "touch", "chmod", "find"):
        link, there = folder / "bin" / tool, shutil.which(tool)
        if there and not link.exists():
            link.symlink_to(there)
    log = folder / "log"
    environment = {"PATH": str(folder / "bin"), "LOG": str(log), "HOME": os.environ.get("HOME", "/")}
    assert MAKE
    done = subprocess.run([MAKE, *targets], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


def test_the_first_python_that_runs_and_is_new_enough_is_taken(folder: Path):
    code, err, calls = make(folder, "install", python3_14=SHIM, python3_13=OLD, python3_12=USABLE, python3=USABLE)
    assert code == 0, err
    assert calls[0].endswith("/bin/python3.12 -m venv --clear .venv")
    assert "--editable .[dev]" in calls[1] and len(calls) == 2


def test_no_usable_python_is_one_line_that_says_what_to_install(folder: Path):
    code, err, calls = make(folder, "install", python3_12=SHIM, python3=OLD)
    assert code and not calls
    first, *rest = err.splitlines()
    assert "Python 3.12 or newer" in first and "apt install python3.12-venv" in first and "make PYTHON=" in first
    assert all(line.startswith("make:") for line in rest)


def test_a_named_python_goes_first(folder: Path):
    (folder / "mine").mkdir()
    code, err, _ = make(folder, "install", python3=USABLE)
    assert code == 0, err
    shutil.rmtree(folder / ".venv")
    shutil.copy(folder / "bin" / "python3", folder / "mine" / "python")
    _, _, calls = make(folder, "install", f"PYTHON={folder}/mine/python")
    assert calls[2] == f"{folder}/mine/python -m venv --clear .venv"


def test_it_installs_again_only_when_pyproject_has_changed(folder: Path):
    assert len(make(folder, "install", python3=USABLE)[2]) == 2
    assert len(make(folder, "install")[2]) == 2
    newer = (folder / ".venv" / "installed").stat().st_mtime + 10
    os.utime(folder / "pyproject.toml", (newer, newer))
    calls = make(folder, "install")[2]
    assert len(calls) == 3 and "pip install" in calls[2]  # into the same .venv


def test_gpu_installs_the_extra(folder: Path):
    calls = make(folder, "install", "GPU=1", python3=USABLE)[2]
    assert "--editable .[dev,cuda13]" in calls[-1]


def test_gpu_check_takes_the_python_that_is_there_and_installs_nothing(folder: Path):
    records = '#!/bin/sh\necho "$0 $*" >> "$LOG"\n'
    code, err, calls = make(folder, "gpu-check", "ARGS=--rehearse --only x", python3=records)
    assert code == 0, err
    assert [call.rpartition("/")[2] for call in calls] == ["run.py --rehearse --only x"]
    assert calls[0].startswith(f"{folder}/bin/python3 experiments/gpu_check/") and not (folder / ".venv").exists()
    shutil.copy(folder / "bin" / "python3", folder / "mine")
    assert make(folder, "gpu-check", f"PYTHON={folder}/mine")[2][1].startswith(f"{folder}/mine experiments/")


def test_clean_keeps_runs_and_sources(folder: Path):
    for name in (
        "runs/a",
        "dsjax/__pycache__",
        "pallas_kernels",
        "launch",
        "tests",
        "experiments",
        ".cache/x",
        ".hypothesis",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "dsjax" / "code.py").touch()
    assert make(folder, "install", "clean", python3=USABLE)[0] == 0
    left = {path.name for path in folder.iterdir()}
    assert {"runs", "dsjax", "Makefile", "pyproject.toml"} <= left
    assert not {".venv", ".cache", ".hypothesis"} & left
    assert (folder / "dsjax" / "code.py").exists() and not (folder / "dsjax" / "__pycache__").exists()
