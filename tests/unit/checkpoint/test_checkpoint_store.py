"""CheckpointStore: there and back on any mesh, donated buffers, retention; failures leave nothing half done."""

import dataclasses
import math
import resource
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.checkpoint import manifest
from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointError, CheckpointStore

# Some futures of a save that failed end after orbax has closed its event loop, and complain of it from a C++ callback.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning")


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "key"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


MESH = {"data": 4, "tensor": 2}


def make_state(seed=0):
    mesh = make_mesh(**MESH)
    rng = np.random.default_rng(seed)

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    params = {
        "layers": {str(i): put(rng.normal(size=(16, 8)).astype(np.float32), "data", "tensor") for i in range(3)},
        "scale": put(jnp.asarray(rng.normal(size=8), jnp.bfloat16)),
    }
    moments = Moments(put(jnp.int32(7)), {"layers": {"0": put(rng.normal(size=(16, 8)).astype(np.float32), "tensor")}})
    key = jax.device_put(jax.random.key(seed + 5), NamedSharding(mesh, P()))
    return State(put(jnp.int32(seed)), params, (moments, ()), key)


def make_abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert found.dtype == wanted.dtype
        if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):
            found, wanted = jax.random.key_data(found), jax.random.key_data(wanted)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def make_store(directory, **config):
    return CheckpointStore(directory / "checkpoints", CheckpointConfig(**config))


def save_all(store, steps, **kwargs):
    for step in steps:
        store.save(step, {"w": jnp.full(4, step)}, clocks={}, **kwargs)
    store.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_there_and_back(tmp_path, asynchronous):
    store = make_store(tmp_path, asynchronous=asynchronous)
    assert store.steps() == [] and store.latest_good(pytest.fail) is None
    state = make_state()
    clocks = {"tokens": 2**60, "best": math.inf, "data": {"hash": "ab"}}
    store.save(3, state, clocks=clocks, metric=1.5)
    store.wait()
    assert store.steps() == [3] and store.verify(3) == [] and store.latest_good(pytest.fail) == 3
    assert store.clocks(3) == clocks
    restored = store.restore(3, make_abstract(state))
    assert_equal(restored, state)
    assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(state)]
    assert jax.random.bits(restored.key) == jax.random.bits(state.key)
    assert not list(tmp_path.rglob("*tmp*")) and not list(tmp_path.rglob("*.partial"))
    store.close()


@pytest.mark.parametrize(
    ("axes", "spec"), [({"data": 2, "tensor": 4}, P("tensor")), ({"x": 8}, P()), ({"one": 1}, P()), ({"y": 4}, P("y"))]
)
def test_onto_another_mesh(tmp_path, axes, spec):
    store = make_store(tmp_path)
    state = make_state()
    store.save(1, state, clocks={})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[: math.prod(axes.values())]).reshape(*axes.values()), tuple(axes))
    target = make_abstract(state, NamedSharding(mesh, P()))
    target.params["layers"]["1"] = jax.ShapeDtypeStruct((16, 8), np.float32, sharding=NamedSharding(mesh, spec))
    restored = store.restore(1, target)
    assert_equal(restored, state)
    assert restored.params["layers"]["1"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_donated_buffers_may_be_reused_at_once(tmp_path):
    store = make_store(tmp_path, keep_last=10)
    sharding = NamedSharding(make_mesh(**MESH), P("data", "tensor"))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"big": jax.device_put(np.zeros((1024, 1024), np.float32), sharding), "small": jnp.zeros(3)}
    for step in range(4):  # the save is in flight while the next steps overwrite what it writes
        store.save(step, tree, clocks={})
        for _ in range(3):
            tree = advance(tree)
    store.wait()
    for step in range(4):
        restored = store.restore(step, make_abstract(tree))
        assert all((np.asarray(x) == 3 * step).all() for x in restored.values())


def test_part_of_a_tree(tmp_path):
    store = make_store(tmp_path)
    state = make_state()
    store.save(1, state, clocks={})
    restored = store.restore(1, {"params": make_abstract(state.params)}, partial=True)
    assert_equal(restored, {"params": state.params})


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    store = make_store(tmp_path)
    state = make_state()
    store.save(1, state, clocks={})
    target = make_abstract(state)
    layers = target.params["layers"]
    layers["3"] = layers.pop("2")
    layers["1"] = jax.ShapeDtypeStruct((16, 9), np.float32, sharding=layers["0"].sharding)
    layers["0"] = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=layers["0"].sharding)
    with pytest.raises(ValueError, match="the model changed") as caught:
        store.restore(1, target)
    for line in (
        "missing from the checkpoint: params/layers/3",
        "only in the checkpoint: params/layers/2",
        "different: params/layers/1: the checkpoint has float32[16, 8], the model float32[16, 9]",
        "different: params/layers/0: the checkpoint has float32[16, 8], the model bfloat16[16, 8]",
    ):
        assert line in str(caught.value)
    with pytest.raises(ValueError, match=r"no such checkpoint; there are steps \[1\]"):
        store.restore(2, target)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "no arrays"),
        ({"a": {"b": np.ones(1)}}, "a/b: expected a jax.Array.*got ndarray"),
        ({"a": jnp.zeros((0, 3))}, r"a: shape \(0, 3\) has no elements"),
        ({"a": jax.ShapeDtypeStruct((1,), np.float32)}, "a ShapeDtypeStruct without one"),
    ],
)
def test_what_cannot_be_saved(tmp_path, tree, message):
    store = make_store(tmp_path)
    with pytest.raises(ValueError, match=message):
        store.save(1, tree, clocks={})
    assert store.steps() == []


def test_retention(tmp_path):
    store = make_store(tmp_path, keep_last=2, keep_best=1, keep_every=40)
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, math.nan), (50, None), (60, math.inf), (70, 5.0)]:
        save_all(store, [step], metric=loss)
    assert store.steps() == [20, 40, 60, 70]
    assert sorted(path.name for path in store.directory.iterdir()) == [f"step_000000{step}" for step in store.steps()]


def test_a_saved_step_is_not_overwritten(tmp_path):
    store = make_store(tmp_path)
    save_all(store, [5])
    with pytest.raises(CheckpointError, match="step 5 is already saved"):
        store.save(5, {"w": jnp.zeros(4)}, clocks={})
    assert store.verify(5) == []


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_bad_ones_never_push_out_good_ones_and_make_room(tmp_path):
    save_all(make_store(tmp_path, keep_last=3), [10, 20, 30])
    store = make_store(tmp_path, keep_last=1, keep_best=0)
    flip(next(path for path in (store.directory / "step_00000030").rglob("d/*") if path.stat().st_size))
    (store.directory / "step_00000020" / "manifest_00000_of_00001.txt").unlink()
    (store.directory / "saving_1_step_00000040.orbax-checkpoint-tmp").mkdir()
    told = []
    assert store.latest_good(told.append) == 10
    assert [line.split(" is not used: ")[0] for line in told] == ["step_00000040", "step_00000030", "step_00000020"]
    assert "interrupted" in told[0] and "expected SHA-256" in told[1] and "no manifest" in told[2]
    save_all(store, [15])  # newer ones are not its business, and do not count as the newest
    assert store.steps() == [15, 30]
    save_all(store, [30])  # takes the place of the bad one
    assert store.verify(30) == [] and store.steps() == [30] and len(list(store.directory.iterdir())) == 1


@contextmanager
def file_size_limit(size):
    """Writes beyond `size` bytes of a file fail with a real OSError of the kernel (EFBIG; a full disk gives ENOSPC)."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))


# tensorstore's writes that are still going when orbax gives up report to orbax's event loop, which is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("limit", [0, 300, 20_000], ids=["nothing fits", "metadata fails", "tensors fail"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk(tmp_path, caplog, limit, asynchronous):
    store = make_store(tmp_path, keep_last=1, keep_best=0, asynchronous=asynchronous)
    tree = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)))}
    store.save(1, tree, clocks={})
    store.wait()
    with (
        file_size_limit(limit),
        pytest.raises(CheckpointError, match=r"cannot save .*step_00000002: .*[Ff]ile too large"),
    ):
        store.save(2, tree, clocks={})
        store.wait()
    assert store.latest_good(lambda line: None) == 1 and store.steps() == [1]
    assert caplog.text == ""  # one message, no tracebacks beside it
    store.wait()
    store.save(2, tree, clocks={})  # there is room again
    store.wait()
    assert store.steps() == [2] and store.verify(2) == []
    assert_equal(store.restore(2, make_abstract(tree)), tree)
    save_all(store, [3])
    assert [path.name for path in store.directory.iterdir()] == ["step_00000003"]


def test_a_failure_is_told_by_the_next_save(tmp_path):
    store = make_store(tmp_path)
    with file_size_limit(0):
        store.save(1, {"w": jnp.ones(4)}, clocks={})
        while store._save is not None and store._save.thread is not None and store._save.thread.is_alive():
            time.sleep(0.01)
    with pytest.raises(CheckpointError, match="step_00000001"):
        store.save(2, {"w": jnp.ones(4)}, clocks={})
    save_all(store, [2])
    assert store.steps() == [2]


def test_no_manifest_no_checkpoint(tmp_path, monkeypatch):
    """The disk fills between the commit and the manifest."""
    store = make_store(tmp_path, keep_last=1, keep_best=0)
    save_all(store, [1])

    def fail(folder, part, *, num_parts):
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_part", fail)
        store.save(2, {"w": jnp.ones(4)}, clocks={})
        with pytest.raises(CheckpointError, match=r"step_00000002.*No space left on device"):
            store.close()
    assert [path.name for path in store.directory.iterdir()] == ["step_00000001"]


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    store = make_store(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot save .*checkpoints"):
        store.save(1, {"w": jnp.ones(4)}, clocks={})
