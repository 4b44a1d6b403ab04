"""The 1-bit optax transforms on four virtual devices: what optax requires of transforms, and optax's wrappers.

The parameters are a nested tree with a scalar; a worker's loss is the square of its distance from a target of its own,
so that gradients differ between workers and the tensors know nothing of each other. All steps of a case are one
program. Tolerance where two ways must agree: 1e-5 of the largest value, float32 over a dozen steps.
"""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.checkpoint.config import CheckpointConfig
from dsjax.checkpoint.store import CheckpointStore
from dsjax.optimizers import (
    onebit_adam,
    onebit_lamb,
    per_worker,
    scale_by_onebit_adam,
    state_shardings,
    state_specs,
    worker_grads,
    worker_params,
    zero_one_adam,
)
from tests.helpers import FAST

W, STEPS, FREEZE = 4, 12, 5
TARGET = {"a": np.linspace(-1, 2, 6).reshape(2, 3), "n": {"s": np.float64(-1.5), "t": (np.linspace(1, 2, 9),)}}
START = jax.tree.map(lambda t: jnp.full(np.shape(t), 0.3, jnp.float32), TARGET)
ADAM = {"freeze_step": FREEZE, "weight_decay": 0.01}
ZERO_ONE = {"var_freeze_step": 6, "var_update_scaler": 3, "local_step_scaler": 3, "local_step_clipper": 3}


def mesh_of(workers: int = W) -> jax.sharding.Mesh:
    return jax.make_mesh((workers,), ("data",), devices=jax.devices()[:workers], axis_types=(AxisType.Auto,))


def targets(steps: int = STEPS, workers: int = W) -> Any:
    """A target for every step and worker, [T, W, ...]."""
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda t: (t + 0.3 * rng.standard_normal((steps, workers, *np.shape(t)))).astype(np.float32), TARGET
    )


def distance(params: Any, target: Any) -> jax.Array:
    """The loss; a target is [1, ...], this worker's."""
    return sum(jax.tree.leaves(jax.tree.map(lambda p, t: jnp.sum((p - t[0]) ** 2), params, target)), jnp.float32(0))


def train(tx, data, *, start=START, workers: int = W, local: bool = False, loss=distance) -> tuple[Any, Any]:
    """A step for each entry of `data`: parameters after every step [T, ...], and the last state."""
    state = tx.init(start)
    specs = state_specs(state)

    @functools.partial(
        jax.shard_map,
        mesh=mesh_of(workers),
        in_specs=(P(), specs, P(None, "data")),
        out_specs=(P(), specs),
        check_vma=not local,
    )
    def program(params, state, data):
        def step(carry, batch):
            params, state = carry
            _, gradients = worker_grads(loss)(worker_params(params, state), batch)
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        (_, state), history = jax.lax.scan(step, (params, state), data)
        return history, state

    history, state = jax.jit(program).lower(start, state, data).compile(FAST)(start, state, data)
    return jax.tree.map(np.asarray, history), state


def plain_optax(tx, data) -> Any:
    """The same with an optax transform on the mean of the workers' gradients."""

    def step(carry, batch):
        params, state = carry
        mean = jax.tree.map(lambda p, t: 2 * (p - t.mean(0)), params, batch)
        updates, state = tx.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.tree.map(np.asarray, jax.lax.scan(step, (START, tx.init(START)), data)[1])


def assert_close(found, wanted, steps=slice(None), *, share: float = 1e-5) -> None:
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        tolerance = share * np.abs(b).max()
        np.testing.assert_allclose(a[steps], b[steps], rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@functools.cache
def reference() -> Any:
    """1-bit Adam by itself."""
    return train(onebit_adam(0.05, mesh=mesh_of(), **ADAM), targets())[0]


# What optax asks of its transforms: its parabola and its Rosenbrock function, from its starting points.


def two_targets(params: dict, noise: dict) -> jax.Array:
    x, (a, b) = params["parabola"] + noise["parabola"][0], params["rosenbrock"]
    return jnp.sum((x - jnp.array([1.0, -1.0, 1.0])) ** 2) + (1 - a) ** 2 + 100 * (b - a**2) ** 2


@pytest.mark.parametrize("kind", ["adam", "lamb", "zero_one"])
def test_converges_on_optaxs_targets(kind):
    steps = 3000
    rate = optax.cosine_decay_schedule(0.1 if kind == "lamb" else 0.3, steps)
    tx = {
        "adam": lambda: onebit_adam(rate, mesh=mesh_of(), freeze_step=600, b1=0.8),
        "lamb": lambda: onebit_lamb(rate, mesh=mesh_of(), freeze_step=600),
        "zero_one": lambda: zero_one_adam(rate, mesh=mesh_of(), var_freeze_step=600, local_step_clipper=4),
    }[kind]()
    start = {"parabola": jnp.array([-1.0, 10.0, 1.0]), "rosenbrock": jnp.array([0.0, 0.0])}
    noise = {"parabola": np.tile(np.array([-1.5, -0.5, 0.5, 1.5], np.float32)[None, :, None], (steps, 1, 3))}
    history, _ = train(tx, noise, start=start, local=kind == "zero_one", loss=two_targets)
    np.testing.assert_allclose(history["parabola"][-1], [1, -1, 1], atol=3e-2)
    np.testing.assert_allclose(history["rosenbrock"][-1], [1, 1], atol=3e-2)


def test_one_program_and_dtypes_and_shardings_are_kept():
    mesh = mesh_of()
    tx = onebit_adam(0.05, mesh=mesh, freeze_step=2)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), START)
    params, state = jax.device_put(low, NamedSharding(mesh, P())), tx.init(low)
    specs, shardings = state_specs(state), state_shardings(state, mesh)
    state = jax.device_put(state, shardings)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs))
    def step(params, state, batch):
        updates, state = tx.update(worker_grads(distance)(params, batch)[1], state, params)
        assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
        return optax.apply_updates(params, updates), state

    data = targets(5)
    for t in range(5):
        params, state = step(params, state, jax.tree.map(lambda x, t=t: x[t], data))
    assert step._cache_size() == 1
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, shardings))
    feedback = state[0].inner.feedback
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype(jnp.float32)}
    for carry in jax.tree.leaves(feedback.worker):
        assert carry.sharding.spec == P("data") and len({row.tobytes() for row in np.asarray(carry)}) == W


# Optax's wrappers


def test_inject_hyperparams():
    wrapped = optax.inject_hyperparams(onebit_adam, static_args=("mesh", "freeze_step"))
    found, state = train(wrapped(optax.constant_schedule(0.05), b1=0.9, mesh=mesh_of(), **ADAM), targets())
    # b2 is an array now, and 1 - b2 in float32 off by 1.3e-5.
    assert_close(found, reference(), share=5e-5)
    assert state.hyperparams["b1"] == np.float32(0.9)


def test_chain_with_added_decay():
    scaled = scale_by_onebit_adam(mesh=mesh_of(), freeze_step=FREEZE)
    decay = optax.add_decayed_weights(0.01)
    assert_close(train(optax.chain(scaled, decay, optax.scale_by_learning_rate(0.05)), targets())[0], reference())


def test_multi_steps():
    """Two micro-batches whose mean is one of the reference's batches."""
    inner = optax.MultiSteps(onebit_adam(0.05, mesh=mesh_of(), **ADAM), 2).gradient_transformation()
    offset = lambda x: np.stack([x + 0.7, x - 0.7], 1).reshape(-1, *x.shape[1:])
    found, state = train(per_worker(inner, W), jax.tree.map(offset, targets()))
    assert_close(jax.tree.map(lambda x: x[1::2], found), reference())
    assert_close(jax.tree.map(lambda x: x[2::2], found), jax.tree.map(lambda x: x[1:-1:2], found))
    assert state.acc_grads.value["a"].shape == (W, 2, 3)


def test_partition_and_masked():
    """Some tensors by 1-bit Adam, others by Adam on the average; and one that a mask leaves out and holds still."""
    average = optax.stateless(lambda g, _: jax.lax.pmean(g, "data"))
    adam = optax.chain(average, optax.adamw(0.05, weight_decay=0.01))
    own = optax.masked(onebit_adam(0.05, mesh=mesh_of(), **ADAM), {"a": True, "n": {"s": False, "t": (True,)}})
    still = optax.chain(average, optax.set_to_zero())
    held = optax.masked(still, {"a": False, "n": {"s": True, "t": (False,)}})
    labels = {"a": "bits", "n": {"s": "bits", "t": ("whole",)}}
    found, _ = train(optax.partition({"bits": optax.chain(own, held), "whole": adam}, labels), targets())
    assert_close(found["a"], reference()["a"])
    assert_close(found["n"]["t"], plain_optax(optax.adamw(0.05, weight_decay=0.01), targets())["n"]["t"])
    assert (found["n"]["s"] == START["n"]["s"]).all()


# With nothing compressed


def test_before_the_freeze_it_is_adamw():
    wanted = plain_optax(optax.adamw(0.05, weight_decay=0.01), targets())
    assert_close(reference(), wanted, slice(FREEZE))
    assert np.abs(reference()["a"][FREEZE] - wanted["a"][FREEZE]).max() > 1e-3  # the first compressed step


@pytest.mark.parametrize(("kind", "workers"), [("adam", 1), ("lamb", 1), ("zero_one", 1), ("lamb", W)])
def test_full_steps_are_optaxs(kind, workers):
    data, mesh = targets(workers=workers), mesh_of(workers)
    biases = {"weight_decay": 0.01, "decay_mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)}
    with warnings.catch_warnings(action="ignore"):  # of one worker
        tx = {
            "adam": lambda: onebit_adam(0.05, mesh=mesh, freeze_step=STEPS, **biases),
            "lamb": lambda: onebit_lamb(0.05, mesh=mesh, freeze_step=STEPS, max_coeff=1e9, min_coeff=0, **biases),
            "zero_one": lambda: zero_one_adam(0.05, mesh=mesh, var_freeze_step=STEPS, **biases),
        }[kind]()
    found, _ = train(tx, data, workers=workers, local=kind == "zero_one")
    mask = biases["decay_mask"]
    wanted = optax.lamb(0.05, eps=1e-8, weight_decay=0.01, mask=mask) if kind == "lamb" else None
    assert_close(found, plain_optax(wanted or optax.adamw(0.05, weight_decay=0.01, mask=mask), data))


# Gradients and state


def test_worker_grads_are_each_workers_own():
    """And the trap that they are for: jax.grad of what all workers share is the sum, on each of them."""
    data = jax.tree.map(lambda x: x[0], targets(1))

    def both(params, batch):
        value, own = worker_grads(distance)(params, batch)
        assert jax.typeof(own["a"]).manual_axis_type.varying == {"data"}
        again = worker_grads(distance)(own, batch)[1]  # parameters that are the worker's own already
        summed = jax.grad(lambda p: distance(p, batch))(params)
        return value[None], own["a"][None], summed["a"], again["a"][None]

    out = (P("data"), P("data"), P(), P("data"))
    run = jax.shard_map(both, mesh=mesh_of(), in_specs=(P(), P("data")), out_specs=out)
    value, own, summed, _ = jax.jit(run)(START, data)
    wanted = 2 * (np.asarray(START["a"]) - data["a"])
    np.testing.assert_allclose(own, wanted, rtol=1e-6)
    np.testing.assert_allclose(summed, wanted.sum(0), rtol=1e-5)
    assert len(set(value.tolist())) == W


def test_a_state_is_saved_and_restored(tmp_path):
    """0/1 Adam's, between two meetings, under a wrapper: all that differs between workers comes back."""
    mesh = mesh_of()
    tx = per_worker(optax.chain(optax.identity(), zero_one_adam(0.05, mesh=mesh, **ZERO_ONE)), W)
    _, state = train(tx, targets(11), local=True)
    shardings = state_shardings(state, mesh)
    state = jax.device_put(jax.device_get(state), shardings)
    (shift,) = {x.sharding.spec for x in jax.tree.leaves(state[1].inner.displaced.shift)}
    assert shift == P("data") and np.abs(state[1].inner.displaced.shift["a"]).max() > 0
    store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig())
    store.save(1, state, clocks={"steps": 1})
    store.wait()
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    restored = store.restore(1, abstract)
    store.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# What a user may get wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": "workers"}, r"axis = 'workers' is not an axis of the mesh; it has \{'data': 4\}"),
        ({"parity": "deepspeed"}, "parity = 'deepspeed'; allowed are '', 'deepspeed-0.19.6'"),
        ({"granularity": "layer"}, "allowed are 'fused', 'tensor', 'group'"),
        ({"scale": "max"}, "allowed are 'l2', 'l1'"),
        ({"freeze_step": 0}, "freeze_step must be an int of 1 or more; got 0"),
        ({"freeze_step": 2.5}, "freeze_step must be an int of 1 or more; got 2.5"),
        ({"freeze_step": True}, "freeze_step must be an int of 1 or more; got True"),
        ({"freeze_step": jnp.array(5)}, "got an array. With optax.inject_hyperparams name it in static_args"),
        ({"freeze_step": np.array(5)}, "freeze_step must be a Python int, known before the program is compiled"),
    ],
)
@pytest.mark.parametrize("make", [onebit_adam, onebit_lamb])
def test_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(0.1, **({"mesh": mesh_of(), "freeze_step": 5} | arguments))


def test_steps_of_zero_one_adam_are_static():
    for name in ZERO_ONE:
        with pytest.raises(ValueError, match=f"{name} must be an int of 1 or more; got -1"):
            zero_one_adam(0.1, mesh=mesh_of(), **(ZERO_ONE | {name: -1}))


def test_inject_hyperparams_without_static_steps():
    wrapped = optax.inject_hyperparams(onebit_adam, static_args="mesh")(0.1, mesh=mesh_of(), freeze_step=5)
    with pytest.raises(ValueError, match=r"name it in static_args=\('freeze_step', ...\)"):
        wrapped.init(START)


@pytest.mark.parametrize("make", [onebit_adam, onebit_lamb])
def test_one_worker_is_told(make):
    with pytest.warns(UserWarning, match="the axis 'data' has one worker: nothing is compressed") as told:
        make(0.1, mesh=mesh_of(1), freeze_step=5)
    assert len(told) == 1 and told[0].filename == __file__


def test_masks_fit_the_parameters():
    for name in ("momentum_mask", "decay_mask"):
        for mask in ({"a": True}, lambda p: {"a": True}):
            with pytest.raises(ValueError, match=f"{name} must have the structure of the parameters"):
                onebit_adam(0.1, mesh=mesh_of(), freeze_step=5, **{name: mask}).init(START)
    rows = {"a": np.ones((2, 1)), "n": {"s": np.ones(()), "t": (np.ones(9),)}}
    with pytest.raises(ValueError, match=r"momentum_mask\['a'\] has shape \(2, 1\); it must have .* \(2, 3\)"):
        onebit_adam(0.1, mesh=mesh_of(), freeze_step=5, momentum_mask=rows).init(START)


def update_once(tx, state, *, params: Any = START, local: bool = False) -> None:
    specs = state_specs(state)
    step = lambda gradients, state: tx.update(gradients, state, params)
    mapped = jax.shard_map(step, mesh=mesh_of(), in_specs=(P(), specs), out_specs=(P(), specs), check_vma=not local)
    jax.eval_shape(mapped, START, state)


def test_a_state_in_another_dtype():
    tx = onebit_adam(0.1, mesh=mesh_of(), freeze_step=5)
    half = lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x
    state = tx.init(START)
    errors = jax.tree.map(half, state[0].inner.feedback)
    with pytest.raises(ValueError, match=r"state is kept in float32, moments and errors; got float16 in .*mu"):
        update_once(tx, jax.tree.map(half, state))
    only_errors = dataclasses.replace(state[0], inner=dataclasses.replace(state[0].inner, feedback=errors))
    with pytest.raises(ValueError, match=r"got float16 in .feedback.worker"):
        update_once(tx, (only_errors, *state[1:]))


def test_how_an_update_is_called():
    tx = onebit_adam(0.1, mesh=mesh_of(), freeze_step=5)
    with pytest.raises(ValueError, match="pass the parameters: update"):
        update_once(tx, tx.init(START), params=None)
    with pytest.raises(ValueError, match=r"runs inside jax.shard_map over the mesh's axis 'data'"):
        tx.update(START, tx.init(START), START)
    local = zero_one_adam(0.1, mesh=mesh_of(), **ZERO_ONE)
    with pytest.raises(ValueError, match=r"0/1 Adam needs jax.shard_map\(..., check_vma=False\)"):
        update_once(local, local.init(START))
