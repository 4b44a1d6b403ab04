"""Bytes, against XLA's own count of the compiled programs and against brute force on small ones."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.plan.compile import lower_programs, measure
from dsjax.plan.jaxpr import dot_flops, flatten
from dsjax.plan.memory import peak_bytes, residual_bytes
from dsjax.plan.plan import plan, require_memory
from dsjax.setup.assembly import assemble
from tests.unit.plan.plan_configs import config, layout_of

SHAPE = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 16 * 16 * 4


def peak(f, *shapes, **options):
    return peak_bytes(flatten(jax.make_jaxpr(f)(*shapes).jaxpr), **options)


def test_a_chain_of_products_holds_two_at_a_time():
    assert peak(lambda x: (((x @ x) @ x) @ x) @ x, SHAPE) == 2 * ONE


def test_elementwise_chains_are_fused_or_in_place():
    assert peak(lambda x: jnp.sin(jnp.cos(x) * 2 + 1).sum(), SHAPE) == 0
    assert peak(lambda x: jnp.tanh(x @ x) @ x, SHAPE) == ONE


def test_a_result_is_not_temporary_and_neither_is_what_becomes_it():
    assert peak(lambda x: (x @ x) * 2, SHAPE) == 0
    assert peak(lambda x: (x @ x) * 2, SHAPE, donated=True) == ONE


def test_what_nobody_uses_is_not_there():
    assert peak(lambda x: ((x @ x) @ x, x)[1], SHAPE) == 0


@settings(deadline=None, max_examples=10)
@given(length=st.integers(2, 6), width=st.sampled_from([4, 8, 16]))
def test_a_scan_keeps_what_its_backward_pass_reads(length, width):
    weights = jax.ShapeDtypeStruct((length, width, width), jnp.float32)
    x = jax.ShapeDtypeStruct((3, width), jnp.float32)

    def loss(weights, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0].sum()

    jaxpr = jax.make_jaxpr(lambda weights, x: jax.vjp(loss, weights, x)[1])(weights, x).jaxpr
    one = 3 * width * 4
    # Of every iteration its input and tanh's derivative; the weights are arguments.
    assert residual_bytes(jaxpr, [1, 1]) == 2 * length * one


def test_products_in_a_scan_count_as_often_as_it_runs():
    def f(x):
        return jax.lax.scan(lambda h, _: (h @ x, None), x, length=5)[0]

    assert dot_flops(jax.make_jaxpr(f)(SHAPE).jaxpr) == 5 * 2 * 16**3


@pytest.mark.parametrize(("kind", "remat"), [("gpt2", "full"), ("bloom", "none")])
def test_one_device_against_xla(kind, remat):
    run = config(kind=kind, remat=remat, accumulation=2)
    layout, predicted = layout_of(run), plan(run, num_devices=1)
    for name, lowered in lower_programs(assemble(run, layout=layout)).items():
        found, ours = measure(lowered, dict(layout.mesh.shape)), getattr(predicted, name)
        assert ours.arguments == pytest.approx(found["arguments"], rel=0.02)
        assert ours.temporary == pytest.approx(found["temporary"], rel=0.25)


# The heads together are wider than the model.
LLAMA = {"num_kv_heads": 2, "head_dim": 24, "mlp_dim": 160, "max_positions": 32}
BERT = {"max_positions": 32, "segments": (4,)}


@pytest.mark.parametrize(("kind", "more"), [("llama", LLAMA), ("bert", BERT)])
def test_other_families_against_xla(kind, more):
    run = config(kind=kind, more=more)
    layout, predicted = layout_of(run), plan(run, num_devices=1)
    for name, lowered in lower_programs(assemble(run, layout=layout)).items():
        found, ours = measure(lowered, dict(layout.mesh.shape)), getattr(predicted, name)
        assert ours.arguments == pytest.approx(found["arguments"], rel=0.02)
        assert ours.temporary == pytest.approx(found["temporary"], rel=0.25)


@pytest.mark.parametrize(("kind", "more"), [("llama", LLAMA), ("bert", BERT)])
def test_other_families_products_are_those_of_the_formula(kind, more):
    run = config(kind=kind, more=more)
    needs = plan(run, num_devices=1)
    kv = 2 * 64 * 2 * 24 if kind == "llama" else 2 * 64 * 64
    heads = 4 * 24 if kind == "llama" else 64
    layer = 2 * 64 * heads + kv + (3 * 64 * 160 if kind == "llama" else 2 * 64 * 256)
    outside = 64 * 256 + (0 if kind == "llama" else 64 * 64)  # logits; BERT transforms its features before them
    per_token = 6 * (4 * layer + outside) + 12 * 4 * heads * 32
    assert needs.model_flops == per_token * needs.step_tokens
    # Rows of 32 tokens are not cut into blocks, so the full square of attention is computed.
    assert needs.step_flops == needs.model_flops


def test_whole_heads_of_keys_and_values_cost_every_device_all_of_them():
    """Eight devices with a head of queries each, and all four heads of keys and values."""
    run = config(kind="llama", more={"num_heads": 8, "num_kv_heads": 4, "mlp_dim": 160}, tensor=8)
    needs = plan(run)
    layers, width, head, kv, devices = 4, 64, 8, 4, 8
    projected = 6 * 2 * width * head * kv * (devices - 1)
    chosen = 4 * 2 * head * kv * devices  # products with zeros and ones, forward and backward, for keys and values
    assert needs.step_flops == needs.model_flops + layers * (projected + chosen) * needs.step_tokens


def test_without_remat_the_products_are_those_of_the_formula():
    run = config(kind="gpt2", remat="none")
    needs = plan(run, num_devices=1)
    # Attention in causal blocks does less than the formula's full square, never less than half of it.
    model, tokens = run.model, needs.step_tokens
    attention = 12 * model.num_layers * model.model_dim * run.data.sequence_length * tokens
    assert needs.model_flops - attention / 2 <= needs.step_flops <= needs.model_flops
    assert plan(config(kind="gpt2", remat="full"), num_devices=1).step_flops > 1.2 * needs.step_flops


def test_the_moving_average_and_every_moment_are_counted():
    plain, averaged = plan(config(), num_devices=1), plan(config(ema_decay=0.9), num_devices=1)
    assert (plain.memory.ema, averaged.memory.ema) == (0, plain.memory.parameters)
    assert plain.peak == sum(vars(plain.memory).values())


def test_dropout_is_traced():
    assert plan(config(dropout=0.1), num_devices=1).memory.residuals > plan(config(), num_devices=1).memory.residuals


def test_more_than_there_is_is_refused_before_anything_is_allocated():
    run = config(width=65536, num_layers=96, vocab_size=65536)
    with pytest.raises(ValueError, match=r"needs .* TiB .* available on this host; largest are .* --force"):
        require_memory(assemble(run, layout=layout_of(run)))
    require_memory(assemble(config(), layout=layout_of(config())))


def test_the_sum_of_a_parameters_shards_is_the_parameter():
    # BLOOM: a table of positions would be split over fsdp only.
    whole = plan(config(kind="bloom"), num_devices=1).memory
    split = plan(config(kind="bloom", fsdp=4, tensor=2, zero_stage=3), num_devices=8).memory
    # Norms and biases along the model's width are on both tensor halves.
    assert whole.parameters <= 8 * split.parameters <= 1.02 * whole.parameters
