"""The arrows of the design point one way: every import statement, wherever it stands in a file, is read with ast."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Room -> the rooms that it may import, those to come included. A new room gets a line here.
BASE = {"mesh", "observe"}
KERNELS = {"pallas_kernels"}
LAYERS = BASE | KERNELS | {"layers"}
MODELS = LAYERS | {"collectives", "moe", "models", "checkpoint"}
SETUP = MODELS | {"data", "objectives", "optimizers", "setup"}
RUNS = SETUP | {"runs"}
USES = RUNS | {"plan", "inference", "evaluate"}
TRAIN = USES | {"train"}
ALLOWED = {
    "observe": set(),
    "mesh": {"observe"},
    "pallas_kernels": set(),
    "collectives": BASE | KERNELS,
    "data": BASE | {"checkpoint"},  # a GGUF file holds weights and a tokenizer
    "checkpoint": BASE,
    "layers": BASE | KERNELS,
    "moe": LAYERS | {"collectives"},
    "models": LAYERS | {"collectives", "moe", "checkpoint"},
    "optimizers": BASE | {"collectives"},
    "objectives": MODELS | {"data"},
    "setup": MODELS | {"data", "objectives", "optimizers"},
    "runs": SETUP,
    "inference": RUNS,
    "evaluate": RUNS | {"inference"},
    "plan": RUNS | {"inference", "evaluate"},
    "train": USES,
    "compression": TRAIN,
    "graph": TRAIN,
    "rlhf": TRAIN | {"compression"},
}
# Of dsjax.config, and so of RunConfig: the command, the planner, and the run: its assembly, its folder (which keeps the
# config), its loop and steps, and its summary.
SEES_RUN_CONFIG = {
    "setup/resolve.py",
    "setup/assembly.py",
    "runs/folder.py",
    "plan/plan.py",
    "plan/compile.py",
    "plan/preflight.py",
    "train/loop.py",
    "train/steps.py",
    "train/summary.py",
}
NEVER = {"torch", "transformers", "tensorflow", "clu", "pickle", "cloudpickle", "dill"}


def files_of(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, `from a import b` as a.b."""
    found = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def room_of(dotted: str) -> str:
    """'models' for dsjax.models.transformer, 'pallas_kernels' for pallas_kernels.x; '' for what is not ours."""
    parts = dotted.split(".")
    if parts[0] == "dsjax":
        return parts[1] if len(parts) > 1 else "dsjax"
    return parts[0] if parts[0] in ("pallas_kernels", "experiments", "tests", "launch") else ""


def rooms() -> list[str]:
    found = {path.relative_to(ROOT / "dsjax").parts[0] for path in files_of("dsjax")}
    return sorted(room for room in found if not room.endswith(".py"))


PACKAGE = files_of("dsjax") + files_of("pallas_kernels")
NAMES = {path: path.relative_to(ROOT / "dsjax").as_posix() for path in files_of("dsjax")}


def test_every_room_has_its_line():
    assert set(rooms()) <= {*ALLOWED, "config", "cli"}


@pytest.mark.parametrize("room", [room for room in rooms() if room not in ("config", "cli")])
def test_arrows(room):
    for path in files_of(f"dsjax/{room}"):
        extra = ({room_of(name) for name in imports_of(path)} & set(ALLOWED)) - ALLOWED[room] - {room}
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}; {room} may import {sorted(ALLOWED[room])}"


def test_the_arrows_have_no_cycle():
    def below(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, " -> ".join((*trail, room))
        for name in ALLOWED[room] - {room}:
            below(name, (*trail, room))

    for room in ALLOWED:
        below(room, ())


OPTIMIZER = "dsjax.optimizers.kinds."
# Beside files named config.py: the registry of the families, and the files of sources and optimizers, whose dataclasses
# stand beside what reads or creates them, which imports JAX only then.
LIGHT = ("dsjax.models.families.registry", "dsjax.data.text.", "dsjax.optimizers.registry", OPTIMIZER)


def test_a_config_imports_the_standard_library_and_other_configs_only():
    light = {path for path in files_of("dsjax") if path.name == "config.py" and path.parent.name != "cli"}
    light.add(ROOT / "dsjax/models/families/registry.py")
    for path in light:
        modules = {name.rpartition(".")[0] for name in imports_of(path) if room_of(name)}
        extra = {name for name in modules if not name.endswith(".config") and not name.startswith(LIGHT)}
        extra |= {top for name in imports_of(path) if (top := name.split(".")[0]) != "dsjax"} - sys.stdlib_module_names
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_run_config_composes_rooms_configs_only():
    names = {name for name in imports_of(ROOT / "dsjax/config/run.py") if room_of(name)}
    assert names and all(name.split(".")[-2] == "config" for name in names)
    for path in (ROOT / "dsjax/config/load.py", ROOT / "dsjax/config/docs.py"):
        assert {room_of(name) for name in imports_of(path)} <= {"", "config"}


def test_who_sees_the_run_config():
    for path, name in NAMES.items():
        if name.split("/")[0] in ("cli", "config") or name in SEES_RUN_CONFIG:
            continue
        seen = {imported for imported in imports_of(path) if room_of(imported) == "config"}
        assert not seen, f"dsjax/{name} imports {sorted(seen)}: give it its room's own config"


def test_nobody_imports_the_command_the_experiments_or_the_tests():
    for path in PACKAGE:
        if NAMES.get(path, "").startswith("cli/") or NAMES.get(path) == "__main__.py":
            continue
        seen = {room_of(name) for name in imports_of(path)} & {"cli", "experiments", "tests", "launch"}
        assert not seen, f"{path.relative_to(ROOT)} imports {sorted(seen)}"


def test_orbax_only_in_the_store():
    users = {name for path, name in NAMES.items() if any(i.split(".")[0] == "orbax" for i in imports_of(path))}
    assert users <= {"checkpoint/store.py"}


def test_kernels_import_jax_and_jaxtyping_only():
    for path in files_of("pallas_kernels"):
        tops = {name.split(".")[0] for name in imports_of(path)} - sys.stdlib_module_names
        assert tops <= {"jax", "jaxtyping", "pallas_kernels"}, f"{path.relative_to(ROOT)} imports {sorted(tops)}"


def test_what_is_never_imported():
    for path in PACKAGE + files_of("launch"):
        seen = {name.split(".")[0] for name in imports_of(path)} & NEVER
        assert not seen, f"{path.relative_to(ROOT)} imports {sorted(seen)}"


LIGHT_MODULES = [
    "dsjax",
    "dsjax.cli.main",
    "dsjax.config.load",
    "dsjax.config.docs",
    "dsjax.optimizers",
    "dsjax.optimizers.config",
]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_modules_do_not_import_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_help_does_not_import_jax():
    command = [sys.executable, "-X", "importtime", "-m", "dsjax", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: dsjax" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"jax", "jaxlib", "flax", "numpy", "yaml", "rich"}
