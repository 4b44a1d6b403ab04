"""Models with random-LTD against whole rows in float64, in which dropped tokens are hidden (random_ltd_oracle.py)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.layers.dropout import sample_keys
from dsjax.layers.random_ltd import Dropping
from dsjax.models.config import RandomLTDConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import abstract, segments_of
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.naming import leaf_names
from dsjax.models.stack import check_dropping
from tests.helpers import FAST, assert_close, from_flat, make_rows
from tests.unit.models.random_ltd_oracle import features, slopes_along

B, T = 3, 12
SHAPE = {"vocab_size": 40, "model_dim": 16, "num_heads": 4, "mlp_dim": 24}
# One layer, which drops; of GPT-2 the last two of three.
MODELS = {
    "bloom": BloomConfig(num_layers=1, **SHAPE),
    "gpt2": GPT2Config(num_layers=3, segments=(1, 2), max_positions=T, **SHAPE),
    "llama": LlamaConfig(num_layers=1, num_kv_heads=2, **SHAPE),
    "bert": BertConfig(num_layers=1, max_positions=T, **SHAPE),
}
LAYERS = {"bloom": range(1), "gpt2": range(1, 3), "llama": range(1), "bert": range(1)}


@functools.cache
def rows_of(name: str, kind: str) -> dict[str, np.ndarray]:
    """Rows [B, T]: single documents, packed ones, or texts of other lengths with padding on the right."""
    rows = make_rows(B, T, vocab=40)
    rows = {"tokens": rows["tokens"], "segments": rows["segments"], "positions": rows["positions"]}
    if kind != "packed":
        del rows["positions"]
        rows["segments"] = (np.arange(T) < np.array([[T], [7], [4]])).astype(np.int32)
    if kind == "single":
        del rows["segments"]
    if name == "bert":
        rows["token_types"] = (np.arange(T) >= 5).astype(np.int32) * np.ones((B, 1), np.int32)
    return rows


def dropping_of(layers: range, num_kept: int, length: Any, kept: Any) -> Dropping:
    keys = sample_keys(jax.random.key(3), jnp.int32(0), jnp.arange(B))
    return Dropping(keys, layers, num_kept, jnp.int32(length), jnp.int32(kept))


@functools.cache
def tensors(name: str) -> dict[str, np.ndarray]:
    """Parameters by name that make attention uneven and no norm the identity; nothing is compiled for them."""
    shapes, rng = shapes_of(name), np.random.default_rng(4)
    named = by_name(jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape), shapes), name)
    return {tensor: (value + tensor.endswith("scale")).astype(np.float32) for tensor, value in named.items()}


def by_name(tree: Any, name: str) -> dict[str, np.ndarray]:
    """A tree like the parameters of a model as one layer's tensors by name."""
    named = {}
    leaves = zip(leaf_names(tree, segments_of(MODELS[name])), jax.tree.leaves(tree), strict=True)
    for (names, is_stack), leaf in leaves:
        named.update(zip(names, leaf if is_stack else [leaf], strict=True))
    return named


def shapes_of(name: str) -> Any:
    return nnx.to_pure_dict(nnx.state(abstract(MODELS[name]), nnx.Param))


def weights(shape) -> np.ndarray:
    """The cotangent of the features."""
    return np.random.default_rng(1).standard_normal(shape)


@functools.cache
def program(name: str, kind: str):
    """(params, length, kept, num_kept) -> features, gradient, indices of the layers that drop; num_kept may be None."""
    config, rows = MODELS[name], rows_of(name, kind)
    graph = nnx.graphdef(abstract(config))
    more = {name: value for name, value in rows.items() if name != "tokens"}

    def both(params, length, kept, num_kept):
        dropping = None if num_kept is None else dropping_of(LAYERS[name], num_kept, length, kept)

        def loss(params):
            out = nnx.merge(graph, params).features(rows["tokens"], dropping=dropping, **more)[0]
            return (out * weights(out.shape)).sum(), out

        gradient, out = jax.grad(loss, has_aux=True)(params)
        return out, gradient, None if dropping is None else dropping.indices(jnp.array(LAYERS[name]), T)

    return jax.jit(both, static_argnames="num_kept", compiler_options=FAST)


@functools.cache
def run(name: str, kind: str, *, num_kept: int | None, length: int = T, kept: int = T):
    """Features, gradients by name, and which tokens each layer kept, [B, T] bool."""
    params = from_flat(tensors(name), shapes_of(name), segments_of(MODELS[name]))
    out, gradient, indices = jax.device_get(program(name, kind)(params, length, kept, num_kept=num_kept))
    kept_by = dict(zip(LAYERS[name], [] if indices is None else indices, strict=indices is not None))
    return out, by_name(gradient, name), {n: (at[:, :, None] == np.arange(T)).any(1) for n, at in kept_by.items()}


CASES = [
    ("bloom", "packed"),
    ("gpt2", "packed"),
    ("llama", "packed"),
    ("bert", "packed"),
    ("bert", "padded"),
    *[pytest.param(name, "single", marks=pytest.mark.slow) for name in ("bloom", "gpt2", "llama", "bert")],
    pytest.param("bloom", "padded", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_outputs_and_gradients_are_those_of_hidden_tokens(name, kind):
    """5 of the first 10 positions in 7 slots."""
    config, rows = MODELS[name], rows_of(name, kind)
    out, gradient, kept = run(name, kind, num_kept=7, length=10, kept=5)
    assert [*kept] == [*LAYERS[name]] and all((which.sum(1) == 5).all() for which in kept.values())
    named = tensors(name)
    want = features(named, config, rows, kept)
    # float32 against float64, through three layers.
    np.testing.assert_allclose(out, want, atol=2e-5)
    assert np.abs(out - features(named, config, rows, {})).max() > 0.1

    rng = np.random.default_rng(2)
    directions = {tensor: rng.standard_normal(value.shape) for tensor, value in named.items() if tensor in gradient}
    loss = lambda tensors: float((features(tensors, config, rows, kept) * weights(out.shape)).sum())
    for tensor, slope in slopes_along(loss, named, directions).items():
        scale = np.linalg.norm(gradient[tensor]) * np.linalg.norm(directions[tensor])
        got = (gradient[tensor].astype(np.float64) * directions[tensor]).sum()
        assert abs(got - slope) <= 2e-5 * scale + 1e-5, tensor


def test_all_tokens_kept_is_the_whole_row():
    out, gradient, kept = run("llama", "packed", num_kept=T)
    want, want_gradient, _ = run("llama", "packed", num_kept=None)
    assert kept[0].all()
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert_close(gradient, want_gradient, 1e-6, what="llama")


def test_how_many_are_kept_is_no_new_program():
    outs = [run("gpt2", "single", num_kept=7, length=10, kept=kept)[0] for kept in (5, 1, 7)]
    assert program("gpt2", "single")._cache_size() == 1
    assert np.abs(outs[0] - outs[1]).max() > 0.1 and np.abs(outs[0] - outs[2]).max() > 0.1


@pytest.mark.parametrize(
    ("segments", "first", "last", "working"),
    [((), 2, 1, "[2, 9, 1]"), ((1, 11), 1, 1, "[1, 10, 1]"), ((12,), 0, 3, "[9, 3]"), ((6, 6), 2, 2, "[2, 8, 2]")],
)
def test_a_run_of_layers_drops_all_over_or_not_at_all(segments, first, last, working):
    config = GPT2Config(segments=segments)
    random_ltd = RandomLTDConfig(steps=1, first_layers=first, last_layers=last)
    with pytest.raises(ValueError, match="random_ltd drops tokens in layers") as raised:
        check_dropping(segments_of(config), random_ltd.layers(12))
    message = str(raised.value)
    assert f"set model.segments to {working}" in message and "random_ltd.first_layers" in message
    lengths = tuple(int(length) for length in working.strip("[]").split(","))
    for works in (lengths, (1,) * 12):
        check_dropping(segments_of(dataclasses.replace(config, segments=works)), random_ltd.layers(12))


def test_a_model_refuses_a_run_that_is_partly_dropped_and_too_few_layers():
    dropping = dropping_of(range(1, 2), 4, T, 4)
    with pytest.raises(ValueError, match=r"set model.segments to \[1, 1, 1\]"):
        abstract(MODELS["gpt2"]).features(jnp.zeros((B, T), int), dropping=dropping)
    with pytest.raises(ValueError, match="the model has 2"):
        RandomLTDConfig(steps=1).layers(2)
