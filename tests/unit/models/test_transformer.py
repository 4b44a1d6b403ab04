"""The decoders against float64 numpy; padding, packing and segments change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.models.families.bloom.config import BloomConfig
from tests.unit.models.transformer_oracle import MODELS, build, exact_gelu, large_params, make_tokens, row_logits

T = 9
# float32 against float64, logits of size 1 to 3.
TOLERANCE = 1e-5


@functools.cache
def model_and_oracle(name: str):
    config = MODELS[name]
    alibi = config.kind == "bloom"
    extra = {"residual_after_norm": config.residual_after_norm} if isinstance(config, BloomConfig) else {}
    if name == "gpt2-variant":
        extra = {"by_layer": True, "act": exact_gelu}
    oracle = functools.partial(
        row_logits, large_params(config), heads=config.num_heads, num_layers=2, alibi=alibi, **extra
    )
    return build(config), oracle


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_formula(name):
    model, oracle = model_and_oracle(name)
    tokens = make_tokens((2, T))
    logits = model(tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (2, T, 40)
    np.testing.assert_allclose(logits, [oracle(row) for row in tokens], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bloom-6", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(name, side):
    model, oracle = model_and_oracle(name)
    tokens, lengths = make_tokens((3, T)), [T, 5, 1]
    places = np.arange(T)
    mask = np.array([places < n if side == "right" else places >= T - n for n in lengths]).astype(np.int32)
    logits = np.asarray(model(tokens, mask))
    for row, real in enumerate(mask == 1):
        np.testing.assert_allclose(logits[row, real], oracle(tokens[row, real]), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bloom-4", "gpt2"])
def test_packed_documents_do_not_see_each_other(name):
    model, oracle = model_and_oracle(name)
    tokens = make_tokens((1, T))
    segments = np.array([[1, 1, 1, 1, 2, 2, 3, 3, 3]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 0, 1, 2]], np.int32)
    logits = np.asarray(model.logits(model.features(tokens, segments=segments, positions=positions)[0]))[0]
    for document in (slice(0, 4), slice(4, 6), slice(6, 9)):
        np.testing.assert_allclose(logits[document], oracle(tokens[0, document]), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "segments"), [("bloom-4", (5,)), ("bloom-4", (2, 3)), ("bloom-4", (1,) * 5), ("gpt2-variant", (2, 3))]
)
def test_segments_change_nothing(name, segments):
    plain = dataclasses.replace(MODELS[name], num_layers=5)
    config = dataclasses.replace(plain, segments=segments)
    tokens = make_tokens((2, T))
    np.testing.assert_allclose(build(config)(tokens), build(plain)(tokens), atol=TOLERANCE)


@pytest.mark.usefixtures("standard_promotion")  # jax.nn.dot_product_attention promotes bfloat16 itself
def test_bfloat16_computes_in_bfloat16_and_gives_float32():
    model = build(dataclasses.replace(MODELS["bloom-4"], compute_dtype="bfloat16"))
    tokens = make_tokens((2, T))
    assert model.features(tokens)[0].dtype == jnp.bfloat16
    exact = model_and_oracle("bloom-4")[1]
    logits = model(tokens)
    assert logits.dtype == jnp.float32
    want = np.array([exact(row) for row in tokens])
    # Eight bits a step over two layers.
    np.testing.assert_allclose(logits, want, atol=0.05 * np.abs(want).max())


def test_dropout_needs_keys_and_a_rate():
    config = dataclasses.replace(MODELS["bloom-4"], dropout=0.2, attention_dropout=0.2)
    model, tokens = build(config), make_tokens((2, T))
    keys = jax.random.split(jax.random.key(0), 2)
    plain, _ = model.features(tokens)
    np.testing.assert_array_equal(plain, model_and_oracle("bloom-4")[0].features(tokens)[0])
    assert float(jnp.abs(model.features(tokens, keys=keys)[0] - plain).max()) > 0.1
