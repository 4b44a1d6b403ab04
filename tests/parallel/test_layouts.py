"""The gradient of one model is the same on every mesh: all 20 ways to cut 8 devices into the four axes.

The tolerance: sums over rows, heads and vocabulary are taken in another order on every mesh, in float32. The largest
difference seen is 1e-6 of a tensor's largest value; a missing or doubled term is of order 1.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.layers.dropout import sample_keys
from dsjax.mesh.config import AXES, MeshConfig
from dsjax.models.families.gpt2.config import GPT2Config
from tests.helpers import FAST, MESHES, ONE, TINY, assert_close, batch_loss, make_rows, make_training

TOLERANCE = 1e-5
KEY, STEP = jax.random.key(5), jnp.int32(3)
SIZES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
# With these, of any two axes both are cut, either one alone, and neither; the other thirteen are in the slow tier.
PAIRWISE = [
    (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8),
    (1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 1, 2), (2, 2, 2, 1),
]  # fmt: skip
ALL = [pytest.param(sizes, marks=[] if sizes in PAIRWISE else [pytest.mark.slow]) for sizes in SIZES]


# Learned positions, attention dropout, and a first layer that is not scanned.
OTHER = GPT2Config(
    vocab_size=64,
    num_layers=3,
    segments=(1, 2),
    model_dim=32,
    num_heads=8,
    max_positions=16,
    dropout=0.1,
    attention_dropout=0.1,
)


@functools.cache
def reference(config=TINY):
    """Loss and gradients by the shortest way: one device, one batch, no layout, no accumulation, one mean."""
    one = make_training(ONE, config)
    rows = make_rows()

    def mean_loss(params):
        keys = sample_keys(KEY, STEP, np.arange(16, dtype=np.int32))
        loss, tokens = batch_loss(nnx.merge(one.model.graph, params), rows, keys=keys)
        return loss / tokens

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss), compiler_options=FAST)(one.params())
    return float(loss), one.named(gradients)


def test_there_are_twenty_factorisations():
    assert len(SIZES) == 20


def test_the_first_tier_has_every_pair_of_axes_cut_and_not_cut():
    assert set(PAIRWISE) <= set(SIZES) and {SIZES.index(sizes) % 4 for sizes in PAIRWISE} == {0, 1, 2, 3}
    for one, other in itertools.combinations(range(4), 2):
        assert len({(sizes[one] > 1, sizes[other] > 1) for sizes in PAIRWISE}) == 4


@pytest.mark.parametrize("sizes", ALL, ids=["x".join(map(str, sizes)) for sizes in SIZES])
def test_gradient_is_that_of_one_device(sizes):
    # The ZeRO stage goes round with the sizes, so that every stage meets several meshes.
    mesh = MeshConfig(**dict(zip(AXES, sizes, strict=True)), zero_stage=SIZES.index(sizes) % 4)
    check(make_training(mesh), *reference(), what=str(sizes))


@pytest.mark.slow  # test_families.py has other models, test_steps.py this mesh
def test_another_model_too():
    check(make_training(MESHES["all"], OTHER), *reference(OTHER), what="all")


def check(training, loss, expected, *, what):
    state = dataclasses.replace(training.state(), key=KEY, step=STEP)
    gradients, metrics = training.gradient(state, make_rows(), accumulation=2)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-6)
    assert int(metrics["tokens"]) == make_rows()["loss_mask"].sum()
    assert_close(training.named(gradients), expected, TOLERANCE, what=what)
