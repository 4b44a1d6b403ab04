"""LoRA on a model: it starts as the base, its gradients are the chain rule's, and PEFT's files hold the same."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoint.safetensors_file import read_header, read_tensor, write_file
from dsjax.checkpoint.settings import UnknownSettings
from dsjax.layers.context import Context
from dsjax.layers.feed_forward import DenseSpec
from dsjax.layers.linear import Linear
from dsjax.layers.weight import LowRank
from dsjax.models.adapters import Adapter, initial_adapters, is_adapter, merged, with_adapters
from dsjax.models.config import LoRAConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import abstract, segments_of
from dsjax.models.families.family import folders_of
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.peft import read_adapter, write_adapter
from dsjax.models.naming import leaf_names, to_named
from dsjax.models.stack import BlockSpec, Segment
from tests.unit.models.transformer_oracle import large_params, make_tokens

SHAPE = {"vocab_size": 40, "num_layers": 3, "model_dim": 24, "segments": (1, 2)}
FAST = {"xla_backend_optimization_level": 0}  # compiling is what takes the time
MODELS = {
    "bloom": BloomConfig(num_heads=3, **SHAPE),
    "gpt2": GPT2Config(num_heads=4, max_positions=32, **SHAPE),
    "llama": LlamaConfig(num_heads=4, num_kv_heads=2, head_dim=10, **SHAPE),
    "bert": BertConfig(num_heads=4, task="classification", **SHAPE),
}
EVERY = LoRAConfig(rank=3, alpha=5.0, targets=r".*\.kernel")


def draw(config, lora, seed=0):
    """Parameters by name: the base's, and factors of A and B of which none is zero."""
    rng = np.random.default_rng(seed)
    state = nnx.split(with_adapters(abstract(config), lora), nnx.Param)[1]
    shapes = nnx.to_pure_dict(state)
    names = {}
    for (layers, is_stack), leaf in zip(leaf_names(shapes, segments_of(config)), jax.tree.leaves(shapes), strict=True):
        names.update(dict.fromkeys(layers, leaf.shape[is_stack:]))
    factors = {name: rng.normal(size=shape).astype(np.float32) / 4 for name, shape in names.items() if is_adapter(name)}
    return large_params(config), factors


def loss(config, lora=None):
    """Parameters by name -> a loss, its gradient with respect to them, and the features it is made of."""
    config = dataclasses.replace(config, segments=(1,) * config.num_layers)
    model = abstract(config) if lora is None else with_adapters(abstract(config), lora)
    graph, state = nnx.split(model, nnx.Param)
    shapes = nnx.to_pure_dict(state)
    names = [layers[0] for layers, _ in leaf_names(shapes, segments_of(config))]
    tokens = jnp.asarray(make_tokens((2, 7)))

    def value(named):
        leaves = [named[name].reshape(leaf.shape) for name, leaf in zip(names, jax.tree.leaves(shapes), strict=True)]
        features = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(shapes), leaves)).features(tokens)[0]
        return jnp.sum(jnp.sin(jnp.arange(features.size).reshape(features.shape)) * features), features

    def run(named):
        compiled = jax.jit(jax.value_and_grad(value, has_aux=True)).lower(named).compile(compiler_options=FAST)
        (loss, features), gradient = compiled(named)
        return loss, gradient, np.asarray(features)

    return run


def test_a_layer_is_the_definition_in_float64():
    rng = np.random.default_rng(0)
    layer = Linear((6, 2, 5), ("embed", "qkv", "heads"), key=jax.random.key(0), std=1.0)
    x, a, b, g = (rng.normal(size=shape) for shape in ((4, 6), (6, 3), (3, 2, 5), (4, 2, 5)))
    w = np.asarray(layer.kernel.merged()[...], np.float64)
    layer.kernel = LowRank(
        layer.kernel,
        nnx.Param(jnp.float32(a), axes=("embed", "rank")),
        nnx.Param(jnp.float32(b), axes=("rank", "qkv", "heads")),
        scale=0.7,
    )
    graph, state = nnx.split(layer)
    run = lambda state: jnp.sum(nnx.merge(graph, state)(jnp.float32(x), Context()) * jnp.float32(g))
    gradient = nnx.to_pure_dict(jax.grad(run)(state))
    want = np.tensordot(x, w, 1) + 0.7 * np.tensordot(x @ a, b, 1)
    np.testing.assert_allclose(layer(jnp.float32(x), Context()), want, atol=2e-6)
    back = np.tensordot(g, b, ((1, 2), (1, 2)))  # [4, 3]: g B^T
    np.testing.assert_allclose(gradient["kernel"]["lora_a"], 0.7 * x.T @ back, atol=2e-5)
    np.testing.assert_allclose(gradient["kernel"]["lora_b"], 0.7 * np.tensordot((x @ a).T, g, 1), atol=2e-5)


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_gradients_are_the_chain_rule_of_the_merged_model(name):
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW', in float64 from a plain model's dW'."""
    config = MODELS[name]
    base, factors = draw(config, EVERY)
    whole = {}
    for path, value in base.items():
        stem = path.removesuffix("kernel")
        whole[path] = value
        if stem + "lora_a" in factors:
            product = np.tensordot(factors[stem + "lora_a"].astype(np.float64), factors[stem + "lora_b"], 1)
            whole[path] = (value + EVERY.scale * product).astype(np.float32)
    value, plain, _ = loss(config)(whole)
    got_value, got, _ = loss(config, EVERY)({**base, **factors})
    assert abs(got_value - value) <= 1e-5 * abs(value) + 1e-4
    checked = 0
    for path in factors:
        stem, last = path.rsplit(".", 1)
        dw = np.asarray(plain[f"{stem}.kernel"], np.float64)
        a, b = factors[f"{stem}.lora_a"].astype(np.float64), factors[f"{stem}.lora_b"].astype(np.float64)
        flat = dw.reshape(len(dw), -1)
        want = flat @ b.reshape(len(b), -1).T if last == "lora_a" else (a.T @ flat).reshape(b.shape)
        scale = np.abs(want).max()
        # Sums of a few hundred float32 products, here and in the plain model: 2e-5 of the largest value.
        np.testing.assert_allclose(got[path], EVERY.scale * want, atol=2e-5 * EVERY.scale * scale + 1e-6)
        checked += scale > 0
    assert checked == len(factors)


@pytest.mark.parametrize("name", ["gpt2"])
def test_it_starts_as_the_base_bit_for_bit_however_layers_are_stacked(name):
    config = MODELS[name]
    drawn = {}
    for runs in ((1, 2), (1, 1, 1)):
        cut = dataclasses.replace(config, segments=runs)
        shapes = nnx.to_pure_dict(nnx.split(with_adapters(abstract(cut), EVERY), nnx.Param)[1])
        only = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if is_adapter(jax.tree_util.keystr(path, simple=True, separator=".")) else None,
            shapes,
        )
        made = jax.jit(lambda key, only=only, cut=cut: initial_adapters(only, segments_of(cut), key))(jax.random.key(3))
        drawn[runs] = {path: np.asarray(value) for path, value in to_named(made, segments_of(cut)).items()}
    first = drawn[(1, 2)]
    for other in drawn.values():
        assert other.keys() == first.keys()
        assert all((other[path] == first[path]).all() for path in first)
    assert all((value == 0).all() == path.endswith("lora_b") for path, value in first.items())
    factors = [value for path, value in first.items() if path.endswith("lora_a")]
    assert len({value.tobytes() for value in factors}) == len(factors)  # no two layers draw the same
    base = large_params(config)
    assert (loss(config)(base)[2] == loss(config, EVERY)({**base, **first})[2]).all()


def test_targets_that_match_nothing_name_what_there_is():
    lora = LoRAConfig(targets=r"attention\.(q|v)\.kernel")
    with pytest.raises(ValueError, match=r"matches no kernel.*there are: attention.out.kernel, attention.qkv.kernel"):
        with_adapters(abstract(MODELS["gpt2"]), lora)
    adapted = with_adapters(abstract(MODELS["llama"]), lora)
    tree = nnx.to_pure_dict(nnx.state(adapted, nnx.Param))
    names = [name for layers, _ in leaf_names(tree, adapted.segment_specs) for name in layers]
    assert {name.split(".", 2)[2] for name in names if is_adapter(name)} == {
        f"attention.{part}.lora_{factor}" for part in "qv" for factor in "ab"
    }


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0.0}, {"targets": "("}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=r"rank must be|not a regular expression"):
        LoRAConfig(**bad)


THEIRS = {  # module in transformers -> [shape of lora_A, of lora_B]
    "bloom": {"transformer.h.1.self_attention.query_key_value": [[3, 24], [72, 3]]},
    "gpt2": {"transformer.h.1.attn.c_attn": [[3, 24], [72, 3]], "transformer.h.2.mlp.c_fc": [[3, 24], [96, 3]]},
    "llama": {
        "model.layers.1.self_attn.q_proj": [[3, 24], [40, 3]],
        "model.layers.0.self_attn.v_proj": [[3, 24], [20, 3]],
    },
    "bert": {"bert.encoder.layer.2.attention.self.query": [[3, 24], [24, 3]], "bert.pooler.dense": [[3, 24], [24, 3]]},
}


@pytest.mark.parametrize("name", MODELS)
def test_peft_files_hold_the_same_and_mean_the_same(name, tmp_path):
    config = MODELS[name]
    _, factors = draw(config, EVERY)
    if name == "bert":
        factors |= {"classifier.kernel": np.ones((24, 2), np.float32), "classifier.bias": np.ones(2, np.float32)}
    write_adapter(Adapter(EVERY, factors), tmp_path / "adapter", config=config, base="the/base")
    stored = {
        path: read_tensor(info) for path, info in read_header(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    for module, shapes in THEIRS[name].items():
        for factor, shape in zip("AB", shapes, strict=True):
            assert list(stored[f"base_model.model.{module}.lora_{factor}.weight"].shape) == shape
    settings_ = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings_["r"], settings_["lora_alpha"], settings_["fan_in_fan_out"]) == (3, 5.0, name == "gpt2")
    assert settings_["modules_to_save"] == (["classifier"] if name == "bert" else None)
    again = read_adapter(tmp_path / "adapter", config)
    assert (again.config.rank, again.config.alpha) == (3, 5.0) and again.tensors.keys() == factors.keys()
    assert all((again.tensors[path] == value).all() for path, value in factors.items())
    _same_delta_as_torch(config, factors, stored, in_first=name == "gpt2")


def _same_delta_as_torch(config, factors, stored, *, in_first):
    """PEFT adds s lora_B @ lora_A (transposed for Conv1D) to the module's weight: in its layout, our merged one."""
    folders = folders_of(config)
    for entry in folders.entries(config):
        ours = ".".join(entry.ours).replace("{i}", "1")
        stem = ours.removesuffix("kernel")
        if not ours.endswith("kernel") or stem + "lora_a" not in factors:
            continue
        theirs = (folders.prefix if entry.prefixed else "") + entry.theirs.replace("{i}", "1").removesuffix(".weight")
        delta = stored[f"base_model.model.{theirs}.lora_B.weight"] @ stored[f"base_model.model.{theirs}.lora_A.weight"]
        product = np.tensordot(factors[stem + "lora_a"], factors[stem + "lora_b"], 1)
        want = entry.transform.to_theirs(product)
        np.testing.assert_allclose(delta.T if in_first else delta, want, atol=1e-5)


def test_target_modules_match_what_was_trained_and_nothing_else(tmp_path):
    """By PEFT's rule: a module is a target if its name is one of these or ends with a dot and one of these."""
    config = MODELS["bert"]
    lora = dataclasses.replace(EVERY, targets=r"(attention\.(q|v)|mlp\.down)\.kernel")
    _, factors = draw(config, lora)
    write_adapter(Adapter(lora, factors), tmp_path / "a", config=config, base="b")
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    trained = {
        path.split("base_model.model.")[1].rsplit(".lora", 1)[0]
        for path in read_header(tmp_path / "a/adapter_model.safetensors")
    }
    every = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
             "intermediate.dense", "output.dense"}  # fmt: skip
    modules = {f"bert.encoder.layer.{i}.{name}" for i in range(3) for name in every} | {
        "bert.pooler.dense",
        "classifier",
    }
    matched = {module for module in modules if any(module == t or module.endswith(f".{t}") for t in targets)}
    assert matched == trained and {"query", "value"} <= set(targets)


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 5), alpha=st.floats(0.5, 40), seed=st.integers(0, 99))
def test_merging_is_addition_and_leaves_the_base_alone(rank, alpha, seed):
    rng = np.random.default_rng(seed)
    tree = {"segments": {0: {0: {"mlp": {"up": {"kernel": jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)}}}}}}
    segments = (Segment((BlockSpec(DenseSpec(3)),), 2),)
    before = np.array(tree["segments"][0][0]["mlp"]["up"]["kernel"])
    a, b = rng.normal(size=(4, rank)).astype(np.float32), rng.normal(size=(rank, 3)).astype(np.float32)
    tensors = {"layers.1.mlp.up.lora_a": a, "layers.1.mlp.up.lora_b": b}
    both = merged(tree, Adapter(LoRAConfig(rank=rank, alpha=alpha), tensors), segments)
    got = np.asarray(both["segments"][0][0]["mlp"]["up"]["kernel"])
    assert (np.asarray(tree["segments"][0][0]["mlp"]["up"]["kernel"]) == before).all() and (got[0] == before[0]).all()
    want = before[1].astype(np.float64) + alpha / rank * (a.astype(np.float64) @ b)
    np.testing.assert_allclose(got[1], want, atol=2e-6 * max(1, np.abs(want).max()))


def test_adapters_that_do_not_fit(tmp_path):
    config = MODELS["llama"]
    _, factors = draw(config, EVERY)
    path = tmp_path / "a"
    write_adapter(Adapter(EVERY, factors), path, config=config, base="b")
    with pytest.raises(ValueError, match=r"does not fit a gpt2 model.*\n.*unknown: base_model.model.model.layers.0"):
        read_adapter(path, MODELS["gpt2"])
    stored = {name: read_tensor(info) for name, info in read_header(path / "adapter_model.safetensors").items()}
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    spoiled = {**stored, name: stored[name][:2]}
    del spoiled["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"]
    write_file(path / "adapter_model.safetensors", spoiled, metadata={})
    with pytest.raises(
        ValueError, match=r"misshapen: .*q_proj.lora_A.weight \[2, 24\]: expected \[r, in\] with r = 3"
    ) as caught:
        read_adapter(path, config)
    assert "alone: layers.2.mlp.up.lora_a" in str(caught.value) and "alone: layers.1.attention.q.lora_b" in str(
        caught.value
    )
    settings_ = json.loads((path / "adapter_config.json").read_text())
    for change, said in [
        ({"use_dora": True}, "use_dora is True, which is not implemented"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"r": "8"}, "r and rank_pattern must be"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"bias": "all", "layer_replication": [[0, 2]]}, r"bias is 'all'.*layer_replication is \[\[0, 2\]\]"),
        ({"use_velora": 1, "trainable_token_indices": [1]}, "trainable_token_indices is"),
    ]:
        (path / "adapter_config.json").write_text(json.dumps({**settings_, **change}))
        with pytest.raises(ValueError, match=said):
            read_adapter(path, config)
    (path / "adapter_config.json").write_text(json.dumps({**settings_, "use_magic": True}))
    write_file(path / "adapter_model.safetensors", stored, metadata={})
    with pytest.warns(UnknownSettings, match=r"adapter_config.json: unknown settings.*: use_magic; if"):
        read_adapter(path, config)
    stored[name][0, 0] = np.nan
    write_file(path / "adapter_model.safetensors", stored, metadata={})
    (path / "adapter_config.json").write_text(json.dumps(settings_))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.lora_A.weight holds 1 of 72 values that are NaN"):
        read_adapter(path, config)
    with pytest.raises(ValueError, match=r"is not an adapter: it needs adapter_config.json"):
        read_adapter(tmp_path, config)
    tree = {"embed": {"table": jnp.zeros((2, 2))}}
    with pytest.raises(ValueError, match=r"the adapter is not for this model, which lacks: layers.0"):
        merged(tree, Adapter(EVERY, factors), segments_of(config))


def test_an_embedding_trained_beside_a_tied_table_is_refused(tmp_path):
    """PEFT leaves the logits with the old table; with ensure_weight_tying both are the new one."""
    config, path = MODELS["gpt2"], tmp_path / "a"
    _, factors = draw(config, EVERY)
    factors = {**factors, "embed.table": np.ones((40, 24), np.float32)}
    write_adapter(Adapter(EVERY, factors), path, config=config, base="b")
    with pytest.raises(ValueError, match=r"an embedding of its own.*ensure_weight_tying is not set"):
        read_adapter(path, config)
    settings_ = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**settings_, "ensure_weight_tying": True}))
    assert (read_adapter(path, config).tensors["embed.table"] == 1).all()
    read_adapter(path, dataclasses.replace(config, tied_embedding=False))
