"""20 bit flips, 20 truncations, missing files and manifests at random places: each found, named, and stepped over."""

import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    store = CheckpointStore(directory, CheckpointConfig())
    rng = np.random.default_rng(0)
    for step in (1, 2):
        tree = {str(i): jnp.asarray(rng.normal(size=(20, 10))) for i in range(4)}
        store.save(step, tree, clocks={"tokens": step})
    store.close()
    return directory


def flip(file, chance):
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(file, chance):
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def lose(file, chance):
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, lose])
def test_damage_is_found_and_named(tmp_path, pristine, damage):
    hit = set()
    for seed in range(20):
        chance = random.Random(seed)
        directory = tmp_path / f"{seed}"
        shutil.copytree(pristine, directory)
        newest = directory / "step_00000002"
        files = sorted(path for path in newest.rglob("*") if path.is_file() and (damage is lose or path.stat().st_size))
        file = chance.choice(files)
        damage(file, chance)
        hit.add(file.name)
        store = CheckpointStore(directory, CheckpointConfig())
        told = []
        assert store.latest_good(told.append) == 1
        (line,) = told
        assert line.startswith("step_00000002 is not used: ")
        if damage is lose and file.name.startswith("manifest_"):
            assert "incomplete: it has no manifest" in line
        else:
            assert f"{file.relative_to(newest).as_posix()}: " in line and "expected" in line and "found" in line
        assert store.verify(1) == [] and store.clocks(1) == {"tokens": 1}
    assert len(hit) > 5


def test_all_bad(tmp_path, pristine):
    directory = tmp_path / "all"
    shutil.copytree(pristine, directory)
    for manifest in directory.rglob("manifest_*"):
        manifest.unlink()
    told = []
    assert CheckpointStore(directory, CheckpointConfig()).latest_good(told.append) is None
    assert len(told) == 2
