"""Spellings of real checkpoints, tensors that are stored besides, and rates of dropout that a folder says.

The folders are those of tests/golden/settings, whose logits transformers has computed.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsjax.layers.positions import rope_frequencies
from dsjax.models.config import PretrainedConfig
from dsjax.models.formats.config_json import config_from_hf, label_names
from dsjax.models.formats.pretrained import load_pretrained, resolve

GOLDEN = Path(__file__).parents[2] / "golden" / "settings"
# The keys of config.json on the Hub, at their values there but for the sizes.
BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "unk_token_id": 0,
    "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True,
    "model_type": "bloom", "n_embed": 8, "n_inner": None, "n_layer": 3, "num_attention_heads": 2, "offset_alibi": 100,
    "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True, "skip_bias_add_qkv": False, "vocab_size": 19,
    "slow_but_exact": False, "transformers_version": "4.20.0", "use_cache": True, "architectures": ["BloomForCausalLM"],
}  # fmt: skip
BERT_BASE_UNCASED = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": False,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 8, "initializer_range": 0.02,
    "intermediate_size": 12, "layer_norm_eps": 1e-12, "max_position_embeddings": 16, "model_type": "bert",
    "num_attention_heads": 2, "num_hidden_layers": 3, "pad_token_id": 0, "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": True, "vocab_size": 19,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 18,
    "embd_pdrop": 0.1, "eos_token_id": 18, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 3, "n_positions": 16, "resid_pdrop": 0.1, "summary_type": "last",
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 19,
}  # fmt: skip
LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 8, "initializer_range": 0.02, "intermediate_size": 12,
    "max_position_embeddings": 32, "model_type": "llama", "num_attention_heads": 2, "num_hidden_layers": 3,
    "num_key_value_heads": 1, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 100.0,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": 19,
}  # fmt: skip


def gamma_and_beta(tensors):
    spelt = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in spelt.items():
        tensors = {name.replace(new, old): array for name, array in tensors.items()}
    pairs = {"cls.seq_relationship.weight": np.ones((2, 8)), "cls.seq_relationship.bias": np.ones(2)}
    pairs |= {"bert.pooler.dense.weight": np.ones((8, 8)), "bert.pooler.dense.bias": np.ones(8)}
    table = tensors["bert.embeddings.word_embeddings.weight"]
    copies = {"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": tensors["cls.predictions.bias"]}
    return tensors | pairs | copies | {"bert.embeddings.position_ids": np.arange(16)[None]}


def without_prefix(tensors):
    masks = {f"h.{i}.attn.bias": np.tri(16, dtype=np.float32)[None, None] for i in range(3)}
    masks |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
    return {name.removeprefix("transformer."): array for name, array in tensors.items()} | masks


def with_frequencies(tensors):
    stored = rope_frequencies(4, 100.0).astype(np.float16)
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": stored for i in range(3)}


HUB = {  # family -> config.json, what is done to the tensors
    "bloom": (BLOOM_560M, lambda tensors: {name.removeprefix("transformer."): x for name, x in tensors.items()}),
    "bert": (BERT_BASE_UNCASED, gamma_and_beta),
    "gpt2": (GPT2, without_prefix),
    "llama": (LLAMA_2, with_frequencies),
}


def write(family, path, settings, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("family", HUB)
def test_folders_as_the_hub_has_them(family, tmp_path):
    settings, change = HUB[family]
    tensors = load_file(GOLDEN / family / "model.safetensors")
    recorded = np.load(GOLDEN / family / "logits.npz")
    path = write(family, tmp_path / "model", settings, change(tensors))
    got = load_pretrained(path, segments=(3,))(recorded["ids"])
    # float32 both times; the machine code is not optimised here
    np.testing.assert_allclose(got, recorded["base"], atol=3e-5 * np.abs(recorded["base"]).max())


BESIDES = {  # tensors that say something else than what is computed
    "gpt2": [
        ("lm_head.weight", lambda t: t["transformer.wte.weight"] + 1e-3),
        ("transformer.h.1.attn.bias", lambda t: np.ones((1, 1, 16, 16), np.float32)),
        ("transformer.h.1.attn.masked_bias", lambda t: np.zeros((), np.float32)),
    ],
    "bloom": [("lm_head.weight", lambda t: t["transformer.word_embeddings.weight"][::-1])],
    "bert": [
        ("cls.predictions.decoder.weight", lambda t: t["bert.embeddings.word_embeddings.weight"] + 1e-3),
        ("cls.predictions.decoder.bias", lambda t: t["cls.predictions.bias"] + 1e-3),
        ("bert.embeddings.position_ids", lambda t: np.arange(16)[::-1]),
    ],
    "llama": [("model.layers.2.self_attn.rotary_emb.inv_freq", lambda t: rope_frequencies(4, 50.0))],
}


@pytest.mark.parametrize("family", BESIDES)
def test_a_tensor_that_is_passed_over_must_say_what_is_used(family, tmp_path):
    tensors = load_file(GOLDEN / family / "model.safetensors")
    settings = json.loads((GOLDEN / family / "config.json").read_text())
    for number, (name, make) in enumerate(BESIDES[family]):
        path = write(family, tmp_path / f"{number}", settings, tensors | {name: make(tensors)})
        with pytest.raises(ValueError, match=rf"{number}: {name} (is to be the same as|does not hold the values)"):
            load_pretrained(path)
    if family == "llama":
        path = write(family, tmp_path / "tied", settings | {"tie_word_embeddings": True}, tensors)
        with pytest.raises(ValueError, match=r"lm_head.weight is to be the same as model.embed_tokens.weight"):
            load_pretrained(path)


def test_aliases_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"n_layer is 3 and num_hidden_layers is 2, but the two are one setting"):
        config_from_hf(GPT2 | {"num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"hidden_size is 16 and n_embed is 8"):
        config_from_hf(BLOOM_560M | {"hidden_size": 16})


def test_classes_are_counted_as_transformers_counts_them():
    hf = BERT_BASE_UNCASED | {"architectures": ["BertForSequenceClassification"]}
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    number = {"num_labels": 3}
    counts = [config_from_hf(hf | more).num_labels for more in ({}, number, names, names | number)]
    assert counts == [2, 3, 3, 3]
    assert label_names({"num_labels": 3}, config_from_hf(hf | {"num_labels": 3})) == ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(ValueError, match=r"num_labels is 2, but id2label has 3 names"):
        config_from_hf(hf | names | {"num_labels": 2})
    with pytest.raises(ValueError, match=r"problem_type is 'multi_label_classification'; only classifiers"):
        config_from_hf(hf | {"problem_type": "multi_label_classification"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights is False, which is not implemented; it must be True"),
        ({"add_cross_attention": True, "is_decoder": True}, "is_decoder is True.*; add_cross_attention is True"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}, which is not implemented"),
        ({"activation_function": "relu"}, "activation_function must be one of"),
        ({"tie_word_embeddings": "yes"}, "tied_embedding must be true or false; got 'yes'"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(change, said):
    with pytest.raises(ValueError, match=f"(config.json of a gpt2 model: )?{said}"):
        config_from_hf(GPT2 | change)


def test_rates_of_dropout_are_the_folders_unless_the_run_says_otherwise(tmp_path):
    def resolved(family, settings, **given):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(GOLDEN / family, path)
        (path / "config.json").write_text(json.dumps(settings))
        return resolve(PretrainedConfig(init_from=str(path), **given))

    rates = lambda config: (config.dropout, config.attention_dropout)
    assert rates(resolved("gpt2", GPT2)) == (0.1, 0.1)
    assert rates(resolved("gpt2", GPT2, dropout=0.0)) == (0.0, 0.1)
    assert rates(resolved("gpt2", GPT2 | {"embd_pdrop": 0.3}, dropout=0.2, attention_dropout=0.0)) == (0.2, 0.0)
    assert rates(resolved("bert", BERT_BASE_UNCASED | {"classifier_dropout": 0.3})) == (0.1, 0.1)  # has no classifier
    assert rates(resolved("bloom", BLOOM_560M | {"hidden_dropout": 0.25})) == (0.25, 0.0)
    with pytest.raises(ValueError, match=r"embd_pdrop 0.3 and resid_pdrop 0.1, but one rate.*set model.dropout"):
        resolved("gpt2", GPT2 | {"embd_pdrop": 0.3})
    with pytest.raises(ValueError, match=r"hidden_dropout_prob 0.1 and classifier_dropout 0.3"):
        resolved("bert", BERT_BASE_UNCASED | {"classifier_dropout": 0.3}, task="classification")
