"""Which meshes fit which models, and what a config.json must say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config.load import from_dict
from dsjax.config.run import RunConfig
from dsjax.config.schema import sections
from dsjax.models.config import AnyModelConfig, PretrainedConfig
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.build import check_divisible
from dsjax.models.families.family import architecture_of, family_of
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.families.registry import FAMILIES
from dsjax.models.formats.config_json import config_from_hf, config_to_hf


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
        family_of("bloom").hugging_face.to_hf(BloomConfig(model_dim=24, num_heads=6, mlp_dim=40))


def test_the_registry_says_what_a_run_file_may_give():
    """The loader's union is the registry's dataclasses; each says its own name, and its code reads and writes it."""
    assert set(sections(AnyModelConfig)) == {line.config for line in FAMILIES.values()} | {PretrainedConfig}
    for kind, line in FAMILIES.items():
        config = line.config()
        assert (
            config.kind == kind
            and from_dict(RunConfig, {"model": {"kind": kind}, "train": {"steps": 1}}).model == config
        )
        folders = family_of(kind).hugging_face
        assert {*folders.classes.values()} == {*family_of(kind).tasks}


def test_one_device_of_tensor_computes_a_part_of_every_size():
    config = LlamaConfig(num_heads=8, num_kv_heads=2, head_dim=48, model_dim=64, mlp_dim=96, vocab_size=40)
    whole = architecture_of(config)
    half, quarter = whole.on_one_device(2), whole.on_one_device(4)
    assert (half.num_heads, half.num_kv_heads, half.head_dim, half.hidden_dim, half.vocab_size) == (4, 1, 48, 48, 20)
    # Two heads of keys cannot be split over four devices: each holds both, for its two heads of queries.
    assert (quarter.num_heads, quarter.num_kv_heads, quarter.head_dim, quarter.model_dim) == (2, 2, 48, 64)
    assert whole.on_one_device(1) == whole
