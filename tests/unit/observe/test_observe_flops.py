"""FLOPs and tokens of steps with random-LTD: against published numbers, and against the matrix products of a trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.data.curriculum.difficulty import grown
from dsjax.models.config import RandomLTDConfig
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.objectives.registry import objective_of
from dsjax.observe.flops import Matrices, layer_tokens, model_flops_per_token, training_flops
from dsjax.plan.jaxpr import dot_flops
from dsjax.setup.step import GradientInputs, StepOptions, make_gradient
from tests.helpers import make_rows, make_training


def test_layer_tokens_of_upstreams_tutorial():
    """What the CIFAR tutorial of DeepSpeed prints after its last step: 32 of 197 tokens growing to all of them."""
    kept = grown(np.arange(5474), 3910, least=32, most=197, quantum=8)
    tokens = layer_tokens(rows=32, length=197, kept=kept, num_layers=12, dropping_layers=10)
    assert tokens.sum() == 305_784_192
    whole = layer_tokens(rows=32, length=197, kept=197, num_layers=12, dropping_layers=10)
    assert tokens.sum() / (5474 * whole) == pytest.approx(0.7384, abs=5e-5)


def test_a_layers_flops_are_those_of_the_papers():
    """Forward 24 D^2 s + 4 D s^2 of a layer of GPT, three times that with the backward pass; data as arrays."""
    D, s, kept = 2048, np.array([512, 2048, 2048]), np.array([128, 128, 4096])
    f = lambda tokens: 24 * D**2 * tokens + 4 * D * tokens**2
    layers = Matrices(12 * D**2, 0, num_layers=24, attention_dim=D, dropping_layers=22)
    got = training_flops(layers, rows=3, length=s, kept=kept)
    np.testing.assert_allclose(got, 3 * 3 * (2 * f(s) + 22 * f(np.minimum(kept, s))), rtol=1e-15)


@pytest.mark.parametrize("causal", [False, True])
def test_a_step_that_drops_nothing_is_palms(causal):
    """6 N + 4 F + 12 L H Q T for a token, half of the attention's where a query sees the keys before it."""
    layers = Matrices(1000, 700, num_layers=5, attention_dim=48, dropping_layers=3)
    got = training_flops(layers, rows=8, length=96, kept=96, causal=causal)
    attention = 12 * 5 * 48 * 96 / (2 if causal else 1)
    assert float(got) == pytest.approx(8 * 96 * (6 * 5700 + attention), rel=1e-12)
    per_token = model_flops_per_token(
        5700, num_layers=5, model_dim=48, sequence_length=96, num_frozen=300, causal=causal
    )
    assert per_token == pytest.approx(6 * 5700 + 4 * 300 + attention, rel=1e-12)


def test_a_step_is_its_programs_matrix_products():
    """Traced, not compiled, and to the last multiplication: with all 16 tokens, and with 6 in the middle layers."""
    config = GPT2Config(vocab_size=64, num_layers=4, model_dim=32, num_heads=4, max_positions=16, mlp_dim=80)
    training = make_training(config=config)
    inputs = GradientInputs(training.model.shapes, jax.random.key(0), jnp.int32(0), training.place(make_rows()))
    random_ltd = RandomLTDConfig(steps=1, min_kept=1, quantum=1)
    products = {}
    for kept in (None, 6):
        options = StepOptions(objective=objective_of("language_model"), random_ltd=random_ltd)
        program = make_gradient(training.model, training.layout, options, per_worker=False, num_kept=kept)
        counts = None if kept is None else np.array([16, kept], np.int32)
        products[kept] = dot_flops(jax.make_jaxpr(program)(dataclasses.replace(inputs, counts=counts)).jaxpr)
    layer = 32 * 3 * 32 + 32 * 32 + 2 * 32 * 80
    matrices = Matrices(layer, 64 * 32, num_layers=4, attention_dim=32, dropping_layers=2)
    flops = training_flops(matrices, rows=16, length=16, kept=np.array([16, 6]))
    assert [products[None], products[6]] == flops.tolist()
