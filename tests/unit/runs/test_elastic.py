"""Another number of workers than a checkpoint had: what was kept for each, also of stacks of experts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.runs.elastic import restore_by_name

ARRAY = "layers.1.mlp.bank"


class Stored:
    """A checkpoint in memory."""

    def __init__(self, arrays):
        self.arrays = arrays

    def tensors(self, step):
        return {name: (x.shape, x.dtype) for name, x in self.arrays.items()}

    def restore(self, step, wanted, partial=False):
        return {name: jax.device_put(self.arrays[name], shape.sharding) for name, shape in wanted.items()}


def test_what_single_workers_kept_is_brought_together_also_of_experts():
    """Three experts of 0/1 Adam, from 3 workers (which 2 devices cannot share evenly) to 2; and a plain tensor."""
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    before = {f"params.{ARRAY}": draw(3, 4), "params.norm": draw(4), "opt_state.skipped": np.int32(1)}
    for tree in ("shift", "mu"):
        before |= {f"opt_state.displaced.{tree}.{ARRAY}": draw(3, 3, 4), f"opt_state.displaced.{tree}.norm": draw(3, 4)}
    before["opt_state.displaced.skipped"] = np.array([0, 2, 0], np.int32)
    before["opt_state.displaced.rates"] = draw(3)
    before[f"opt_state.feedback.worker.{ARRAY}"] = draw(3, 3, 1, 8)
    array = lambda spec, *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    wanted = {f"params.{ARRAY}": array(P(), 3, 4), "params.norm": array(P(), 4)}
    wanted["opt_state.skipped"] = array(P(), dtype=jnp.int32)
    for tree in ("shift", "mu"):
        wanted[f"opt_state.displaced.{tree}.{ARRAY}"] = array(P(None, "data", None), 3, 2, 4)
        wanted[f"opt_state.displaced.{tree}.norm"] = array(P("data", None), 2, 4)
    wanted["opt_state.displaced.skipped"] = array(P("data"), 2, dtype=jnp.int32)
    wanted["opt_state.displaced.rates"] = array(P("data"), 2)
    wanted[f"opt_state.feedback.worker.{ARRAY}"] = array(P(None, "data", None, None), 3, 2, 1, 8)

    told = []
    found = restore_by_name(Stored(before), 7, wanted, told.append)
    assert told == ["the checkpoint is of 3 workers, this run has 2: errors of the one-bit mean begin at zero again"]
    assert found.keys() == wanted.keys()
    for name, shape in wanted.items():
        assert found[name].shape == shape.shape and found[name].sharding.is_equivalent_to(shape.sharding, shape.ndim)
    for name, dim in ((ARRAY, 1), ("norm", 0)):
        shift, mu = (before[f"opt_state.displaced.{tree}.{name}"] for tree in ("shift", "mu"))
        np.testing.assert_allclose(found[f"params.{name}"], before[f"params.{name}"] + shift.mean(dim), rtol=1e-6)
        each = np.repeat(mu.mean(dim, keepdims=True), 2, axis=dim)
        np.testing.assert_allclose(found[f"opt_state.displaced.mu.{name}"], each, rtol=1e-6)
        assert not found[f"opt_state.displaced.shift.{name}"].any()
    assert int(found["opt_state.skipped"]) == 3 and not found[f"opt_state.feedback.worker.{ARRAY}"].any()
