"""The processor and the pages of memory, and the program that is started once more to have large ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.observe.host import memory_pages, processor

ROOT = Path(__file__).parents[3]
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1

processor\t: 1
vendor_id\t: other
"""
WITHOUT = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "DSJAX_KEEP_MEMORY")}
GIVES_LARGE_PAGES = memory_pages()["huge_pages"] == "madvise" and memory_pages()["libc"].startswith("glibc")
needs_large_pages = pytest.mark.skipif(
    not GIVES_LARGE_PAGES, reason=f"large pages: {memory_pages()['huge_pages']}, {memory_pages()['libc']}"
)

SHOW = """
import json, os, sys
from dsjax.observe.host import restart_with_huge_pages
first = os.getpid()
restart_with_huge_pages()
restart_with_huge_pages()
print(json.dumps({"tunables": os.environ.get("GLIBC_TUNABLES"), "argv": sys.argv[1:], "stdin": sys.stdin.read()}))
"""

# A few steps of training whose temporaries are some 100 MB, and what the parameters are after them.
TRAIN = """
import hashlib, json, resource
from dsjax.observe.host import restart_with_huge_pages
restart_with_huge_pages()
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", "{cache}")
import numpy as np
from dsjax.mesh.config import MeshConfig
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.setup.step import GradientInputs
from tests.helpers import make_rows, make_training
config = GPT2Config(vocab_size=256, num_layers=2, model_dim=64, num_heads=2, max_positions=256, segments=(2,))
training = make_training(MeshConfig(data=1), config)
state, batch = training.fresh_state(), training.place(make_rows(16, 256, vocab=256))
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    gradients, figures = training.programs.gradient(GradientInputs(state.params, state.key, state.step, batch))
    state, _ = training.programs.updates["full"](state, gradients, figures["loss"], np.float32(1e-3))
    jax.block_until_ready(state)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state.params))).hexdigest()
print(json.dumps({{"faults": sorted(faults[3:])[2], "digest": digest}}))
"""


def run(script: Path, *arguments: str, stdin: str = "", **environment: str) -> dict:
    """What a script prints, as a program of its own."""
    variables = WITHOUT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_processor_is_that_of_the_first_core(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    assert processor(root=tmp_path) == {"vendor": "AuthenticAMD", "name": "AMD EPYC", "family": "25", "model": "17"}
    assert processor(root=tmp_path / "nowhere") == {}


@pytest.mark.parametrize("setting", ["always", "madvise", "never"])
def test_the_systems_setting_is_the_word_in_brackets(tmp_path, setting):
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    words = " ".join(f"[{word}]" if word == setting else word for word in ("always", "madvise", "never"))
    (folder / "enabled").write_text(words + "\n")
    assert memory_pages(root=tmp_path)["huge_pages"] == setting
    assert memory_pages(root=tmp_path / "nowhere")["huge_pages"] == "unknown"


@needs_large_pages
def test_a_script_starts_once_more_with_its_arguments_its_input_and_the_users_own_settings(tmp_path):
    script = tmp_path / "show me.py"
    script.write_text(SHOW)
    asked = "glibc.malloc.hugetlb=1"
    found = run(script, "--a b", "", stdin="text")
    assert found == {"tunables": asked, "argv": ["--a b", ""], "stdin": "text"}
    assert (
        run(script, GLIBC_TUNABLES="glibc.malloc.tcache_count=7")["tunables"] == f"glibc.malloc.tcache_count=7:{asked}"
    )
    for tunables in ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=2"):  # the user's word counts
        assert run(script, GLIBC_TUNABLES=tunables)["tunables"] == tunables
    assert run(script, DSJAX_KEEP_MEMORY="0")["tunables"] is None


def test_python_without_a_program_is_not_started_again():
    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, input="", env=WITHOUT, check=True
    )
    assert json.loads(done.stdout)["tunables"] is None


@needs_large_pages
def test_the_command_tells_what_it_runs_with():
    command = [sys.executable, "-m", "dsjax", "env"]
    shown = [
        subprocess.run(command, capture_output=True, text=True, env=WITHOUT | more, check=True).stdout
        for more in ({"JAX_PLATFORMS": "cpu"}, {"JAX_PLATFORMS": "cpu", "DSJAX_KEEP_MEMORY": "0"})
    ]
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1; large ones: madvise" in shown[0]
    assert "memory pages      as it is; large ones: madvise" in shown[1]


@pytest.mark.slow
@needs_large_pages
def test_steps_make_next_to_no_page_faults_and_the_bits_are_the_same(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(cache=tmp_path / "cache"))
    with_huge, without = run(script), run(script, DSJAX_KEEP_MEMORY="0")
    assert with_huge["digest"] == without["digest"]
    # Less is left the larger the temporaries are: the edges of what is mapped, and what is smaller than 2 MiB.
    assert without["faults"] > 5_000
    assert with_huge["faults"] < without["faults"] / 10
