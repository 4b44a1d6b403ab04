"""A GGUF file of a Llama gives the model that a Hugging Face folder of the same tensors gives."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from gguf_files import write_gguf

from dsjax.checkpoint.safetensors_folder import open_folder
from dsjax.checkpoint.settings import UnknownSettings
from dsjax.models.families.build import create
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.formats.config_json import config_from_hf, config_to_hf
from dsjax.models.formats.gguf import halves_from_pairs
from dsjax.models.formats.pretrained import load_pretrained, open_weights, save_pretrained

CONFIG = LlamaConfig(
    vocab_size=40,
    num_layers=2,
    model_dim=24,
    num_heads=6,
    num_kv_heads=2,
    mlp_dim=40,
    max_positions=32,
    tied_embedding=True,
    rope_base=1000.0,
    segments=(2,),
    init_std=0.3,
)
IDS = np.arange(12).reshape(2, 6) * 3 % 40
STACK = {  # Hugging Face -> llama.cpp, as its converter names them
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def permute(weights, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(
        weights.shape
    )  # fmt: skip


def metadata_of(config, **changes):
    values = {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.model_dim,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_base,
        "llama.rope.dimension_count": config.head_size,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return {key: value for key, value in values.items() if value is not None}


def tensors_of(folder, config):
    """The folder's tensors as llama.cpp's converter writes them."""
    tensors = {}
    for name in folder.names():
        stem = name.removeprefix("model.").removesuffix(".weight")
        array = folder.read(name)
        if stem.startswith("layers."):
            _, number, part = stem.split(".", 2)
            heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.kv_heads}
            array = permute(array, heads[part]) if part in heads else array
            tensors[f"blk.{number}.{STACK[part]}.weight"] = array
        else:
            tensors[f"{ENDS[stem]}.weight"] = array
    return tensors


def folder_of(config, path):
    model = create(config, key=jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), nnx.state(model, nnx.Param))
    nnx.update(model, noisy)
    save_pretrained(model, path)
    return open_folder(path)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {}),
        (dataclasses.replace(CONFIG, tied_embedding=False, num_kv_heads=6), {"llama.attention.head_count_kv": None}),
        (
            dataclasses.replace(CONFIG, head_dim=8, num_kv_heads=3, rope_factor=2.0),
            {
                "llama.attention.key_length": 8,
                "llama.attention.value_length": 8,
                "llama.rope.scaling.type": "linear",
                "llama.rope.scaling.factor": 2.0,
            },
        ),
    ],
    ids=["tied", "untied", "wide heads, scaled"],
)
def test_the_same_model_as_from_a_folder(config, changes, tmp_path):
    folder = folder_of(config, tmp_path / "hf")
    file = write_gguf(tmp_path / "model", metadata_of(config, **changes), tensors_of(folder, config))  # no suffix
    weights = open_weights(file)
    assert weights.names() == folder.names()
    assert dataclasses.replace(config_from_hf(weights.config), init_std=0.3, segments=(2,)) == dataclasses.replace(
        config, head_dim=config.head_size
    )
    for name in folder.names():
        assert weights.shape(name) == folder.shape(name)
        np.testing.assert_array_equal(weights.read(name), folder.read(name), err_msg=name)
    ours, theirs = load_pretrained(file, segments=(2,)), load_pretrained(folder.path, segments=(2,))
    np.testing.assert_array_equal(ours(IDS), theirs(IDS))


def test_rows_are_put_back():
    rows = np.random.default_rng(0).standard_normal((24, 5))
    for heads in (1, 2, 3, 6):
        np.testing.assert_array_equal(halves_from_pairs(permute(rows, heads), heads), rows)


def llama3_divisors(head_dim, base, factor, original, low=1.0, high=4.0):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    divisors = []
    for i in range(0, head_dim, 2):
        length = 2 * np.pi * base ** (i / head_dim)
        if length < original / high:
            divisors.append(1.0)
        elif length > original / low:
            divisors.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama_3s_scaling_is_found_from_its_divisors(tmp_path):
    config = dataclasses.replace(
        CONFIG, model_dim=48, num_kv_heads=3, num_heads=3, head_dim=16, rope_base=500_000.0, max_positions=131_072
    )
    tensors = tensors_of(folder_of(config, tmp_path / "hf"), config)
    freqs = llama3_divisors(16, 500_000.0, 32.0, 8192)
    assert 1 < np.sort(np.unique(freqs))[1] < 32, "one lies between"
    file = write_gguf(tmp_path / "a.gguf", metadata_of(config), {**tensors, "rope_freqs.weight": freqs})
    assert open_weights(file).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    load_pretrained(file, segments=(2,))
    other = {**tensors, "rope_freqs.weight": freqs + np.float32(0.1)}
    with pytest.raises(ValueError, match=r"are not the divisors of Llama 3.1's rule"):
        open_weights(write_gguf(tmp_path / "b.gguf", metadata_of(config), other))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tensors_of(folder_of(CONFIG, tmp_path_factory.mktemp("parts") / "hf"), CONFIG)


MISTAKES = {
    "block_count": ({"llama.block_count": None}, "metadata lack llama.block_count"),
    "head counts": ({"llama.attention.head_count_kv": [2, 1]}, r"head_count_kv is \[2, 1\]; expected one int"),
    "type": ({"llama.embedding_length": "24"}, "embedding_length is '24'; expected one int"),
    "zero": ({"llama.context_length": 0}, "context_length is 0; expected a size above 0"),
    "experts": ({"llama.expert_count": 8}, "a mixture of experts"),
    "rope": ({"llama.rope.dimension_count": 2}, "of which RoPE turns 2; all three must be equal"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "the RoPE scaling 'yarn' is not known; known are none, linear"),
    "part": ({"split.no": 1, "split.count": 3}, "part 2 of 3 of a model; .*llama-gguf-split --merge"),
    "adapter": ({"general.type": "adapter"}, "general.type is 'adapter'; only a model is read"),
    "fixed": (
        {"llama.logit_scale": 0.5, "llama.attention.causal": False},
        r"x.gguf: llama.attention.causal is False, which is not implemented.*; llama.logit_scale is 0.5, which",
    ),
    "layers": ({"llama.block_count": 3}, r"missing: model.layers.2.input_layernorm.weight \[24\]"),
    "width": ({"llama.feed_forward_length": 41}, r"misshapen: model.layers.1.mlp.up_proj.weight \[40, 24\]"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_metadata_that_are_missing_or_do_not_fit(mistake, parts, tmp_path):
    changes, said = MISTAKES[mistake]
    file = write_gguf(tmp_path / "x.gguf", metadata_of(CONFIG, **changes), parts)
    with pytest.raises(ValueError, match=said):
        load_pretrained(file)


def test_metadata_that_nobody_knows_are_named_and_the_others_are_not(parts, tmp_path):
    known = {"llama.vocab_size": 40, "llama.rope.scaling.finetuned": False, "split.count": 1, "split.no": 0}
    known |= {"general.name": "x", "general.type": "model", "quantize.imatrix.file": "y", "tokenizer.ggml.pre": "z"}
    known |= {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.attention.causal": True}
    open_weights(write_gguf(tmp_path / "a.gguf", metadata_of(CONFIG, **known), parts))  # warnings are errors
    with pytest.warns(UnknownSettings, match=r"b.gguf: unknown settings, which are passed over: llama.new_thing; if"):
        open_weights(write_gguf(tmp_path / "b.gguf", metadata_of(CONFIG, **known, **{"llama.new_thing": 1}), parts))


def test_tensors_and_architectures_that_are_not_known(parts, tmp_path):
    extra = {"blk.0.attn_q.bias": np.ones(24, np.float32), "blk.0.odd.weight": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match=r"(?s)extra: blk.0.odd.weight \[2\].*extra: model.layers.0.*q_proj.bias"):
        load_pretrained(write_gguf(tmp_path / "a.gguf", metadata_of(CONFIG), {**parts, **extra}))
    with pytest.raises(ValueError, match=r"general.architecture is 'mamba'; known are llama"):
        load_pretrained(write_gguf(tmp_path / "b.gguf", {}, parts, architecture="mamba"))
    with pytest.raises(ValueError, match=r"no tensor token_embd.weight of two dimensions"):
        open_weights(write_gguf(tmp_path / "c.gguf", metadata_of(CONFIG), {}))
    twice = {**parts, "model.norm.weight": parts["output_norm.weight"]}
    with pytest.raises(ValueError, match="under another name"):
        open_weights(write_gguf(tmp_path / "d.gguf", metadata_of(CONFIG), twice))


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match=r"a file, but no GGUF file; expected a folder with config.json"):
        open_weights(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": "40"}, "vocab_size must be a whole number; got '40'"),
        ({"num_hidden_layers": True}, "num_layers must be a whole number; got True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": []}}, "llama model holds a value of the wrong type"),
        ({"architectures": 7}, "holds a value of the wrong type"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; known are"),
        ({"intermediate_size": None}, "mlp_dim must be a whole number"),
    ],
)
def test_a_config_json_with_values_of_other_types(change, said):
    hf = {**config_to_hf(CONFIG), **change}
    with pytest.raises(ValueError, match=said):
        config_from_hf(hf)
