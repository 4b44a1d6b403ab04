"""The views of a cache: rows at positions of their own, and families with a norm after the residual."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.transformer import Transformer
from tests.unit.models.transformer_oracle import MODELS, SHAPE, build, make_tokens

NUM_SLOTS = 24
TWO_AND_TWO = LlamaConfig(num_heads=4, num_kv_heads=2, **SHAPE | {"num_layers": 4, "segments": (2, 1, 1)})


@pytest.fixture(scope="module", params=["bloom-4", "gpt2", "rope"])
def model(request):
    """ALiBi, learned positions, and RoPE with fewer heads of keys in a scanned segment."""
    return build(TWO_AND_TWO if request.param == "rope" else MODELS[request.param])


@pytest.mark.parametrize("new", [1, 3])
def test_rows_at_positions_of_their_own_are_whole_rows(model, new):
    """Prompts of 9, 4 and 1 tokens, then `new` more at once to each: the features of whole rows."""
    tokens, lengths = make_tokens((3, 9 + new)), np.array([9, 4, 1])
    graph, state = nnx.split(model, nnx.Param)

    @jax.jit
    def by_slots(params, prompts, more):
        model: Transformer = nnx.merge(graph, params)
        positions = np.broadcast_to(np.arange(9), prompts.shape)
        # What follows a short prompt is overwritten before anything may see it.
        _, cache = model.prefill(prompts, prompts >= 0, positions, num_slots=NUM_SLOTS)
        at = lengths[:, None] + np.arange(new)
        valid = np.ones((3, NUM_SLOTS), bool)
        return model.decode(more, cache, start=jax.numpy.asarray(lengths), valid=valid, positions=at)[0]

    more = np.take_along_axis(tokens, lengths[:, None] + np.arange(new), axis=1)
    got = np.asarray(by_slots(nnx.to_pure_dict(state), tokens[:, :9], more))
    whole, _ = jax.jit(lambda params: nnx.merge(graph, params).features(tokens))(nnx.to_pure_dict(state))
    want = np.take_along_axis(np.asarray(whole), (lengths[:, None] + np.arange(new))[..., None], axis=1)
    # Sums over some 24 slots instead of 10 positions, in float32.
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_family_with_a_norm_after_the_residual_writes():
    """Generation over the cache is repeated full passes."""
    plain = build(dataclasses.replace(MODELS["gpt2"], num_layers=3))
    architecture = dataclasses.replace(plain.architecture, norm_first=False)
    model = Transformer(plain.config, architecture, key=jax.random.key(3))
    for parameter in jax.tree.leaves(nnx.state(model), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        parameter[...] = parameter[...] if parameter.ndim < 3 else 9 * parameter[...]
    tokens = make_tokens((2, 5))
    row = tokens
    for _ in range(6):
        padded = np.pad(row, ((0, 0), (0, 16 - row.shape[1])))
        row = np.concatenate([row, np.asarray(model(padded))[:, row.shape[1] - 1].argmax(-1)[:, None]], axis=1)
    made = model.generate(tokens, max_new_tokens=6)
    np.testing.assert_array_equal(made, row)
    assert len(set(made[:, 5:].ravel().tolist())) > 2  # not one token over and over
