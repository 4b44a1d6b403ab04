"""One of several processes that save together; started by test_checkpoint_processes.py."""

import os
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

VALUE = np.arange(32 * 8, dtype=np.float32).reshape(32, 8)


def main(directory: Path, address: str, process: int, count: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, process)
    from dsjax.checkpoint.config import CheckpointConfig
    from dsjax.checkpoint.store import CheckpointError, CheckpointStore

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def put(value: np.ndarray, *spec: str) -> jax.Array:
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, P(*spec)), lambda index: value[index])

    def layout(**specs: P) -> dict:
        shapes = {"rows": (VALUE.shape, np.float32), "columns": (VALUE.shape, np.float32), "step": ((), np.int32)}
        shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        return {name: jax.ShapeDtypeStruct(*shapes[name], sharding=shardings[name]) for name in shapes}

    store = CheckpointStore(directory, CheckpointConfig(keep_last=2, keep_best=0))
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"rows": put(VALUE, "data"), "columns": put(VALUE, "tensor", "data"), "step": put(np.int32(0).reshape(()))}
    for step in range(4):  # the same program runs on while the files are written
        store.save(step, tree, clocks={"step": step})
        tree = advance(tree)
    store.wait()
    assert store.steps() == [2, 3]
    try:
        store.save(3, tree, clocks={})
    except CheckpointError as error:
        assert "step 3 is already saved" in str(error)
    else:
        raise AssertionError("step 3 was saved twice")

    multihost_utils.sync_global_devices("before the damage")
    if process == 0:
        file = max((directory / "step_00000003").rglob("d/*"), key=lambda path: path.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    multihost_utils.sync_global_devices("after the damage")
    told: list[str] = []
    assert store.latest_good(told.append) == 2
    assert len(told) == 1 and f"{file.name if process == 0 else ''}: expected SHA-256" in told[0], told
    restored = store.restore(2, layout(rows=P("tensor"), columns=P(None, "data"), step=P()))
    for name, value in restored.items():
        for shard in value.addressable_shards:
            wanted = VALUE[shard.index] + 2 if name != "step" else jnp.int32(2)
            np.testing.assert_array_equal(np.asarray(shard.data), wanted)
    store.save(3, restored, clocks={"step": 3})
    store.wait()

    if process == 1:  # the disk is full for one of them: all are told, soon, and all go on
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    began = time.monotonic()
    try:
        store.save(4, tree, clocks={})
        store.wait()
    except CheckpointError as error:
        message = str(error)
    else:
        raise AssertionError("nobody noticed")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert time.monotonic() - began < 30
    assert "process 0: cannot save" in message and "another process failed" in message, message
    assert "process 1: cannot save" in message and "File too large" in message, message
    assert store.steps() == [2, 3]
    store.save(5, tree, clocks={"step": 5})
    store.close()

    multihost_utils.sync_global_devices("the end")
    print("done", flush=True)
    time.sleep(0.0 if process else 1.0)  # process 0 holds the others' connection
    os._exit(0)  # a thread of orbax still waits, for minutes, for the process that failed


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
