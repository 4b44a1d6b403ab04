"""The runner of experiments/gpu_check with items that go wrong in every way, and what the command needs to be there."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import pallas_kernels
from pallas_kernels.checks import all_checks

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "experiments" / "gpu_check"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up, and run.py imports items
    spec.loader.exec_module(module)
    return module


items = load("items")
run = load("run")
del sys.modules["items"], sys.modules["run"]  # common names: other experiments have a run.py, too

FAKE = """
import os, signal, subprocess, sys, time
from item import Outcome

def good(context):
    context.note(two=2)
    return Outcome(ours="as it should be", passed=True)

def misses(context):
    assert context.earlier["fake:good"] == {"two": 2}
    return Outcome(ours="40%", passed=False)

def measures(context):
    return Outcome(ours="40 ms", passed=None)

def raises(context):
    context.note(half="done")
    raise RuntimeError("it does not compile\\nfor a long story")

def crashes(context):
    os.kill(os.getpid(), signal.SIGSEGV)

def leaves(context):
    os._exit(0)

def lingers(context):  # its runner is killed outright, so it has to end by itself
    time.sleep(5)

def hangs(context):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    context.note(child=child.pid)
    time.sleep(600)
"""


def fake(function: str, *, limit: float = 30.0, **options) -> object:
    return items.Item(name=function, target="a target", limit=limit, function=f"fake:{function}", **options)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def plan(tmp_path: Path):
    (tmp_path / "fake.py").write_text(FAKE)
    return lambda seconds: run.Plan(
        tmp_path / "out" / "results.json", tmp_path / "work", rehearse=False, seconds=seconds, checks=(tmp_path,)
    )


def test_whatever_an_item_does_the_others_run_and_all_is_written(plan, capsys):
    table = [
        fake("raises"), fake("crashes"), fake("hangs", limit=2.0), fake("leaves"), fake("good"), fake("misses"),
        fake("measures"), fake("good", needs=("no_such_package",)), fake("raises", may_be_unseen=True),
    ]  # fmt: skip
    this = plan(120.0)
    run.run_items(table, this)
    results = json.loads(this.path.read_text())
    assert results["finished"] and not this.path.with_suffix(".new").exists()
    found = results["items"]
    assert [(each["verdict"], each["ours"]) for each in found] == [
        ("failed", "RuntimeError: it does not compile"),
        ("failed", "ended by SIGSEGV"),
        ("failed", "stopped after 2 s"),
        ("failed", "exit code 0"),
        ("met", "as it should be"),
        ("missed", "40%"),
        ("measured", "40 ms"),
        ("skipped", "no no_such_package here"),
        ("not seen", "RuntimeError: it does not compile"),
    ]
    # What was noted before the end is kept, and so is the end of the log; what an item started ends with it.
    assert found[0]["figures"] == {"half": "done"} and "Traceback" in "\n".join(found[0]["log"])
    assert sys.platform != "linux" or not alive(found[2]["figures"]["child"])
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())


def test_what_does_not_fit_any_more_is_not_run_and_the_first_results_are_on_the_disk(plan):
    this = plan(3.0)
    began = time.monotonic()
    entries = run.run_items([fake("good", limit=4.0), fake("hangs"), fake("hangs", limit=3.5), fake("good")], this)
    # Half of 30 s does not fit into 3, half of 3.5 does, and then nothing is left.
    assert [each["verdict"] for each in entries] == ["met", "not run", "failed", "not run"]
    assert entries[1]["ours"] == entries[3]["ours"] == "no time left"
    assert time.monotonic() - began < 20


def test_a_run_that_is_killed_has_told_what_was_known(plan, tmp_path):
    this = plan(60.0)
    this.checks[0].joinpath("start.py").write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import run, pathlib\n"
        "item = lambda name: run.Item(name=name, target='', limit=60.0, function=f'fake:{name}')\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "plan = run.Plan(here / 'out' / 'results.json', here / 'work', False, 60.0, (here,))\n"
        "run.run_items([item('good'), item('lingers')], plan)\n"
    )
    process = subprocess.Popen([sys.executable, str(tmp_path / "start.py")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and "as it should be" in process.stdout.readline()
        process.kill()
    finally:
        process.kill()
        process.communicate()
    results = json.loads(this.path.read_text())
    assert [each["verdict"] for each in results["items"]] == ["met"] and not results["finished"]


def test_an_item_whose_runner_was_killed_ends_at_its_limit(plan, tmp_path):
    message = {"function": "fake:hangs", "rehearse": True, "work": str(tmp_path), "earlier": {}, "limit": 0.1}
    (tmp_path / "message.json").write_text(json.dumps(message))
    command = [sys.executable, str(FOLDER / "checks" / "child.py"), str(tmp_path)]
    done = subprocess.run(command, env=plan(1.0).environment(), timeout=60, check=False)
    os.kill(json.loads((tmp_path / "result.json").read_text())["figures"]["child"], signal.SIGKILL)
    assert done.returncode == -signal.SIGALRM


def test_the_table_fits_and_names_functions_that_there_are():
    assert len(run.HEAD) <= 100
    assert len({item.function for item in items.ITEMS}) == len({item.name for item in items.ITEMS}) == len(items.ITEMS)
    for item in items.ITEMS:
        assert len(item.name) <= run.WIDTHS["item"] and 0 < len(item.target) <= run.WIDTHS["target"]
        module, _, function = item.function.partition(":")
        assert f"def {function}(context: Context) -> Outcome:" in (FOLDER / "checks" / f"{module}.py").read_text()


def test_every_op_has_cases():
    folder = Path(pallas_kernels.__path__[0])
    for op in sorted(path.parent.name for path in folder.glob("*/api.py")):
        assert (folder / op / "check.py").exists(), f"{op} has no check.py: see pallas_kernels/checks.py"
    names = {check.name.split()[0] for check in all_checks()}
    assert names >= set(pallas_kernels.__all__), "an op without a case"


HIDDEN = (
    "grain", "tokenizers", "safetensors", "jinja2", "matplotlib", "hypothesis", "xdist", "pyarrow", "gguf",
    "tensorboardX", "wandb", "torch", "transformers", "triton",
)  # fmt: skip
# Of data what a run's config (with its sources) and schedule need, which is no more than numpy.
ASSEMBLY = {f"dsjax.data.{name}" for name in ("config", "curriculum", "curriculum.difficulty", "rows", "rows.shape")}
BARE = """
import importlib, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)

sys.meta_path.insert(0, Hide())
for name in {modules}:
    importlib.import_module(name)
import pytest
code = pytest.main(["tests/gpu", "--confcutdir=tests/gpu", "--collect-only", "-qq", "-p", "no:cacheprovider"])
ours = sorted(name for name in sys.modules if name.startswith("dsjax.data.") and name not in {assembly})
ours = [name for name in ours if not name.startswith("dsjax.data.text")]
sys.exit(f"imported: {{ours}}" if ours else code)
"""


def test_neither_grain_nor_tokenizers_nor_extras_are_needed(tmp_path):
    """All that the command imports, late imports included, and tests/gpu, with what JAX, flax and optax bring alone."""
    late = ["jax_worker", "pallas_kernels.sign_pack.mosaic"]
    modules = [*dict.fromkeys(item.function.partition(":")[0] for item in items.ITEMS), *late]
    script = BARE.format(hidden=set(HIDDEN), modules=modules, assembly=ASSEMBLY)
    plan = run.Plan(tmp_path / "results.json", tmp_path, rehearse=True, seconds=1.0)
    # Plugins that are installed here would be imported by pytest.
    environment = plan.environment() | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line for line in done.stdout.splitlines() if line.startswith("tests/gpu/test_")]
    assert len(collected) == len(list((ROOT / "tests" / "gpu").glob("test_*.py"))) > 0, done.stdout
