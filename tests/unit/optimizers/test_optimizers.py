"""Each optimizer against its algorithm in float64 numpy, tensor by tensor also where layers and experts are stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from dsjax.optimizers.api import UpdateInputs, lift
from dsjax.optimizers.config import OptimizerConfig
from dsjax.optimizers.create import create_optimizer
from dsjax.optimizers.kinds.adamw import AdamWConfig
from dsjax.optimizers.kinds.lamb import LambConfig
from dsjax.optimizers.kinds.sgd import SGDConfig
from dsjax.optimizers.lamb import scale_by_layer_trust_ratio

# A stack of three layers' matrices, a stack of three biases, a matrix and a bias; the stack's layers differ in size. Of
# experts two layers of three: matrices and biases.
LEADING = {"w": 1, "b": 1, "table": 0, "scale": 0, "experts": 2, "biases": 2}
SHAPES = {"w": (3, 4, 5), "b": (3, 5), "table": (6, 4), "scale": (4,), "experts": (2, 3, 4, 5), "biases": (2, 3, 5)}
IS_MATRIX = {"w": True, "b": False, "table": True, "scale": False, "experts": True, "biases": False}
STEPS, RATE = 5, 0.03


def make_tensors(seed):
    rng = np.random.default_rng(seed)
    sizes = {"w": np.array([1, 10, 0.1])[:, None, None], "b": np.array([1, 5, 0])[:, None]}
    sizes["experts"] = np.array([[1, 10, 0.1], [3, 0, 2]])[:, :, None, None]
    return {name: rng.standard_normal(shape) * sizes.get(name, 1) for name, shape in SHAPES.items()}


def apart(name, value):
    """The single tensors of a leaf."""
    return list(value.reshape(-1, *value.shape[LEADING[name] :])) if LEADING[name] else [value]


def adam(history, c):
    """Adam's direction after the last of some gradients, from its definition."""
    m = v = 0.0
    for g in history:
        m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g**2
    t = len(history)
    return m / (1 - c.b1**t) / (np.sqrt(v / (1 - c.b2**t)) + c.eps)


def sgd(history, c):
    velocity = 0.0
    for g in history:
        velocity = c.momentum * velocity + g
    return history[-1] + c.momentum * velocity if c.nesterov else velocity


def direction(config: OptimizerConfig, w, history, is_matrix: bool):
    """What is subtracted, times the learning rate, of one layer's tensor."""
    decay = config.weight_decay * w if config.decay_mask == "all" or is_matrix else 0.0
    if isinstance(config, SGDConfig):
        return sgd(history, config) + decay
    update = adam(history, config) + decay
    if isinstance(config, AdamWConfig):
        return update
    norms = np.linalg.norm(w), np.linalg.norm(update)
    return update * (norms[0] / norms[1] if min(norms) > 0 else 1.0)


@pytest.mark.parametrize(
    "config",
    [
        AdamWConfig(),
        AdamWConfig(b1=0.8, b2=0.99, eps=1e-3, weight_decay=0.3, decay_mask="all"),
        LambConfig(),
        LambConfig(weight_decay=0.0, b2=0.9),
        SGDConfig(),
        SGDConfig(momentum=0.0, weight_decay=0.0),
        SGDConfig(nesterov=True, decay_mask="all"),
    ],
    ids=lambda config: config.kind,
)
@pytest.mark.usefixtures("standard_promotion")  # of optax's own step counts
def test_steps_are_the_algorithm(config):
    params = make_tensors(0)
    optimizer = create_optimizer(config, jax.tree.map(jnp.float32, params), LEADING)
    update = jax.jit(optimizer.updates["full"])
    ours = jax.tree.map(jnp.float32, params)
    state, gradients = optimizer.init(ours), [make_tensors(step) for step in range(1, STEPS + 1)]
    for step in range(STEPS):
        rate = RATE * (step + 1)
        changes, state = update(
            jax.tree.map(jnp.float32, gradients[step]),
            state,
            UpdateInputs(params=ours, learning_rate=jnp.float32(rate)),
        )
        ours = jax.tree.map(jnp.add, ours, changes)
        for name, value in params.items():
            history = [apart(name, g[name]) for g in gradients[: step + 1]]
            done = [
                w - rate * direction(config, w, [tensors[i] for tensors in history], IS_MATRIX[name])
                for i, w in enumerate(apart(name, value))
            ]
            params[name] = np.stack(done).reshape(value.shape)
    for name, want in params.items():
        # A few roundings a step, in float32.
        np.testing.assert_allclose(ours[name], want, atol=5e-6 * np.abs(want).max(), err_msg=name)


def test_a_stacks_layers_do_not_know_each_other():
    """Ten times the first layer changes the first layer's trust ratio alone."""
    scale = scale_by_layer_trust_ratio({"w": 1})
    w, u = jnp.float32(make_tensors(0)["w"]), jnp.float32(make_tensors(1)["w"])
    run = lambda w: scale.update({"w": u}, scale.init({"w": w}), {"w": w})[0]["w"]
    larger = run(w.at[0].multiply(10))
    np.testing.assert_array_equal(larger[1:], run(w)[1:])
    np.testing.assert_allclose(larger[0], 10 * run(w)[0], rtol=1e-6)


def test_the_trust_ratio_needs_parameters():
    with pytest.raises(ValueError, match="the trust ratio needs the parameters"):
        scale_by_layer_trust_ratio({"w": 1}).update({"w": jnp.ones((2, 2))}, optax.EmptyState())


def test_states_lie_like_their_parameters():
    """Moments get their parameter's spec, counts are whole; also when two parameters have the same shape."""
    specs = {
        "w": PartitionSpec(None, None, "tensor"),
        "b": PartitionSpec("fsdp"),
        "table": PartitionSpec("x"),
        "scale": PartitionSpec(),
        "experts": PartitionSpec(None, "expert", None, ("tensor", "fsdp")),
        "biases": PartitionSpec(None, "expert", None),
    }
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    for config, moments in ((AdamWConfig(), 2), (LambConfig(), 2), (SGDConfig(), 1), (SGDConfig(momentum=0.0), 0)):
        optimizer = create_optimizer(config, shapes, LEADING)
        state = jax.eval_shape(optimizer.init, shapes)
        got = optimizer.state_specs(state, specs)
        is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
        assert jax.tree.structure(got, is_leaf=is_spec) == jax.tree.structure(state)
        found = jax.tree.leaves(got, is_leaf=is_spec)
        for spec in specs.values():
            assert found.count(spec) == moments + (spec == PartitionSpec()) * (len(found) - len(specs) * moments)


def test_any_optax_transform_is_an_optimizer():
    optimizer = lift(optax.chain(optax.scale_by_rms(), optax.scale(2.0)))
    assert optimizer.gradients == "mean" and optimizer.stage(17, None) == "full"
    params = {"w": jnp.ones(3)}
    inputs = UpdateInputs(params=params, learning_rate=jnp.float32(0.1))
    changes, _ = optimizer.updates["full"]({"w": jnp.array([1.0, -4.0, 9.0])}, optimizer.init(params), inputs)
    np.testing.assert_allclose(changes["w"], -0.2 / np.sqrt(0.1) * np.array([1, -1, 1]), rtol=1e-6)
