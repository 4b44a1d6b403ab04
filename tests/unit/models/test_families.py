"""Which meshes fit which models, and what a config.json must say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.models.config import BertConfig, BloomConfig, GPT2Config, LlamaConfig
from dsjax.models.families.registry import FAMILIES, check_divisible, config_from_hf, config_to_hf


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 16))
def test_a_refused_mesh_names_what_does_not_fit_and_sizes_that_do(heads, vocab, tensor):
    config = BloomConfig(num_heads=heads, model_dim=heads * 4, vocab_size=vocab)
    dims = {"num_heads": heads, "mlp_dim": heads * 16, "vocab_size": vocab}
    bad = {name: size for name, size in dims.items() if size % tensor}
    if not bad:
        return check_divisible(config, {"tensor": tensor})
    with pytest.raises(ValueError) as caught:
        check_divisible(config, {"tensor": tensor})
    message = str(caught.value)
    assert message.startswith(f"mesh.tensor = {tensor} does not divide ")
    assert all((f"model.{name} = {size}" in message) == (name in bad) for name, size in dims.items())
    listed = message.split("divide the model are ")[1].split(";")[0].split(", ")
    assert listed
    assert all(size % int(near) == 0 for near in listed for size in dims.values())


def test_the_nearest_sizes_are_near():
    config = GPT2Config(num_heads=12, model_dim=768, vocab_size=50304)
    with pytest.raises(ValueError, match=r"mesh.tensor = 5 does not divide .* are 3, 4, 6"):
        check_divisible(config, {"tensor": 5})


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=40, num_layers=3, model_dim=24, num_heads=6, dropout=0.1, residual_after_norm=True),
        GPT2Config(vocab_size=40, num_layers=3, model_dim=24, num_heads=6, mlp_dim=40, max_positions=7, norm_eps=1e-6),
        LlamaConfig(vocab_size=40, model_dim=24, num_heads=6, num_kv_heads=3, head_dim=8, mlp_dim=40, rope_factor=2.0),
        LlamaConfig(
            mlp_dim=40,
            num_kv_heads=4,
            head_dim=64,
            rope_factor=8.0,
            rope_original_positions=64,
            tied_embedding=True,
            task="classification",
            num_labels=5,
        ),
        BertConfig(vocab_size=40, num_layers=3, model_dim=24, num_heads=6, mlp_dim=40, dropout=0.1),
        BertConfig(task="embedding", mlp_dim=40),
        BertConfig(task="classification", num_labels=3, mlp_dim=40),
    ],
)
def test_configs_go_to_hugging_face_and_back(config):
    hf = config_to_hf(config)
    assert config_from_hf(hf) == config


def test_a_config_json_that_is_not_ours():
    with pytest.raises(ValueError, match=r"model_type is 'mamba'; known are bert, bloom, gpt2, llama"):
        config_from_hf({"model_type": "mamba"})
    with pytest.raises(ValueError, match=r"config.json of a bloom model lacks the key 'n_layer'"):
        config_from_hf({"model_type": "bloom", "vocab_size": 3})
    with pytest.raises(ValueError, match=r"activation_function must be one of gelu_new, .*gelu; .* says 'relu'"):
        config_from_hf({"model_type": "gpt2", "activation_function": "relu"})
    with pytest.raises(ValueError, match=r"a BLOOM folder has mlp_dim = 4 \* model_dim = 96; got 40"):
        FAMILIES["bloom"].to_hf(BloomConfig(model_dim=24, num_heads=6, mlp_dim=40))
