"""Every command and every example of the README, in a clean clone with a fresh environment."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Long ones are shortened; `make test` would run this test again.
SHORTER = {
    "make train": "make train ARGS='--set train.steps=6 --set evaluate.every=3 --set sample.max_new_tokens=5'",
    "make test": "make -n test",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "dsjax"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.slow
def test_every_command_and_example_works(clone: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) >= 8 and set(SHORTER) <= set(lines), "the README has lost its commands"
    # Fewer steps where the number does not matter, and nothing evaluated on the way.
    fewer = "train.steps=4 --set evaluate.every=0 --set sample.prompt="
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
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "PYENV_"))},
    }
    script = "set -ex\n" + "\n".join(commands)
    done = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    for made in ("runs/quickstart/summary.json", "runs/quickstart/loss.png", "runs/two-processes/summary.json"):
        assert (clone / made).is_file(), made
