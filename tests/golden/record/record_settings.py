"""Every key of four config classes of transformers at another value, and whether the logits move. See README.md here.

    python record_settings.py ../settings

writes per family a Hugging Face folder (float32 weights, config.json), cases.json and logits.npz. A case has

    key, change    the key that is looked at, and what is changed in config.json (null for a key that is left out)
    effect         moves: the logits are those in logits.npz under the case's number; same: they are those of the base;
                   shape: the weights no longer fit; error: transformers refuses the config
    tensors        the group of tensors of extra.safetensors that the folder has besides, or "without <names>"

All is computed in float32 by the eager attention.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import BertConfig, BloomConfig, GPT2Config, LlamaConfig

IDS = np.array([[3, 14, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9]])
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 100.0}
ROPE = {"rope_theta": 100.0, "rope_type": "default"}

BASES = {
    "gpt2": (
        GPT2Config,
        "GPT2LMHeadModel",
        {"vocab_size": 19, "n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2},
    ),
    "bloom": (BloomConfig, "BloomForCausalLM", {"vocab_size": 19, "hidden_size": 8, "n_layer": 3, "n_head": 2}),
    "llama": (
        LlamaConfig,
        "LlamaForCausalLM",
        {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "max_position_embeddings": 32, "rope_parameters": ROPE},
    ),
    "bert": (
        BertConfig,
        "BertForMaskedLM",
        {"vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
        | {"max_position_embeddings": 16},
    ),
}  # fmt: skip

ALL = {
    "transformers_version": "4.20.0", "output_hidden_states": True, "return_dict": False, "dtype": "float16",
    "chunk_size_feed_forward": 7, "is_encoder_decoder": True, "problem_type": "regression", "_name_or_path": "x",
    "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"b": 0, "a": 1}, "output_attentions": True,
    "use_cache": False, "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5, "initializer_range": 0.5,
    "vocab_size": 20,
}  # fmt: skip
OTHER = {
    "gpt2": ALL | {
        "n_positions": 17, "n_embd": 10, "n_layer": 2, "n_head": 4, "n_inner": 24, "activation_function": "gelu",
        "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "layer_norm_epsilon": 0.1, "summary_type": "last",
        "summary_use_proj": False, "summary_activation": "tanh", "summary_proj_to_labels": False,
        "summary_first_dropout": 0.3, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True, "add_cross_attention": True, "tie_word_embeddings": False,
    },
    "bloom": ALL | {
        "hidden_size": 10, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": 0.1, "hidden_dropout": 0.3,
        "apply_residual_connection_post_layernorm": True, "attention_dropout": 0.3, "pretraining_tp": 2,
        "slow_but_exact": True, "tie_word_embeddings": False,
    },
    "llama": ALL | {
        "hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_act": "gelu", "max_position_embeddings": 48, "rms_norm_eps": 0.1,
        "pretraining_tp": 2, "tie_word_embeddings": True, "rope_parameters": ROPE | {"rope_theta": 5.0},
        "attention_bias": True, "attention_dropout": 0.3, "mlp_bias": True, "head_dim": 6,
    },
    "bert": ALL | {
        "hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16,
        "hidden_act": "gelu_new", "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3,
        "max_position_embeddings": 17, "type_vocab_size": 3, "layer_norm_eps": 0.1, "classifier_dropout": 0.3,
        "is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False,
    },
}  # fmt: skip
# More values, and keys that only older versions write or that stand for another: key -> the whole change.
MORE = {
    "gpt2": [
        ("activation_function", {"activation_function": "gelu_pytorch_tanh"}),
        ("activation_function", {"activation_function": "relu"}),
        ("hidden_size", {"hidden_size": 8, "n_embd": None}),
        ("num_attention_heads", {"num_attention_heads": 4, "n_head": None}),
        ("num_hidden_layers", {"num_hidden_layers": 3, "n_layer": None}),
        ("max_position_embeddings", {"max_position_embeddings": 16, "n_positions": None}),
        ("n_ctx", {"n_ctx": 16}),
        ("layer_norm_epsilon", {"layer_norm_epsilon": 0.1, "scale_attn_by_inverse_layer_idx": True}),
    ],
    "bloom": [
        ("n_embed", {"n_embed": 8, "hidden_size": None}),
        ("num_attention_heads", {"num_attention_heads": 4, "n_head": None}),
        ("num_hidden_layers", {"num_hidden_layers": 3, "n_layer": None}),
        ("seq_length", {"seq_length": 64}),
        ("offset_alibi", {"offset_alibi": 100}),
        ("attention_softmax_in_fp32", {"attention_softmax_in_fp32": True}),
        ("skip_bias_add", {"skip_bias_add": True, "skip_bias_add_qkv": False, "bias_dropout_fusion": True}),
    ],
    "llama": [
        ("rope_theta", {"rope_theta": 7.0, "rope_parameters": None}),
        (
            "rope_scaling",
            {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_parameters": None, "rope_theta": 100.0},
        ),
        ("rope_scaling", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "rope_parameters": None}),
        ("rope_parameters", {"rope_parameters": LLAMA3}),
        ("rope_parameters", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
        (
            "rope_parameters",
            {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        ),
        ("rope_parameters", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
        ("rope_parameters", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
        (
            "rope_parameters",
            {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}},
        ),
        ("head_dim", {"head_dim": 4}),
        ("max_sequence_length", {"max_sequence_length": 32}),
    ],
    "bert": [
        ("hidden_act", {"hidden_act": "relu"}),
        ("position_embedding_type", {"position_embedding_type": "absolute"}),
        ("position_embedding_type", {"position_embedding_type": "relative_key"}),
        ("pooler_type", {"pooler_type": "first_token_transform", "pooler_fc_size": 768, "directionality": "bidi"}),
        ("gradient_checkpointing", {"gradient_checkpointing": True}),
    ],
}  # fmt: skip
EXTRA = {"gpt2": ["lm_head.weight"], "bloom": ["lm_head.weight"], "llama": []}
EXTRA["bert"] = ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"]


def draw(model: torch.nn.Module, names: list[str], seed: int) -> dict[str, np.ndarray]:
    """float32 values: no bias is zero, no norm is one, logits are of order 1 and more."""
    rng, values = np.random.default_rng(seed), {}
    for name in sorted(names):
        shape = tuple(model.state_dict()[name].shape)
        value = rng.standard_normal(shape) * (0.3 if len(shape) == 1 else 0.8)
        is_norm = len(shape) == 1 and ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight")
        values[name] = (value + is_norm).astype(np.float32)
    return values


def build(family: str, settings: dict) -> torch.nn.Module:
    """A model of a config.json, as transformers reads it."""
    config = BASES[family][0].from_dict(json.loads(json.dumps(settings)))
    config._attn_implementation = "eager"
    return getattr(transformers, BASES[family][1])(config).eval()


def stored_names(model: torch.nn.Module) -> list[str]:
    """Names of the tensors that a folder of this model has."""
    tied = set(model.all_tied_weights_keys)
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in tied]


def logits(model: torch.nn.Module, values: dict[str, np.ndarray]) -> np.ndarray | None:
    """None where the weights are not those that the model needs."""
    state = model.state_dict()
    values = {name: torch.from_numpy(value) for name, value in values.items() if name in state}
    if set(stored_names(model)) - values.keys() or any(state[k].shape != v.shape for k, v in values.items()):
        return None
    model.load_state_dict(values, strict=False)
    with torch.no_grad():
        return model(torch.from_numpy(IDS), return_dict=True).logits.numpy()


def changed(settings: dict, change: dict) -> dict:
    return {key: value for key, value in (settings | change).items() if key not in change or change[key] is not None}


def record(family: str, folder: Path) -> None:
    """Write one folder."""
    config_class, class_name, base = BASES[family]
    settings = config_class(**base, architectures=[class_name]).to_dict()
    model = build(family, settings)
    values = draw(model, stored_names(model), seed=1)
    untied = build(family, settings | {"tie_word_embeddings": False})
    extra = draw(untied, EXTRA[family], seed=2)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    if extra:
        save_file(extra, folder / "extra.safetensors", metadata={"format": "pt"})
    want = logits(model, values)
    found, cases = {"base": want}, []
    decided = {"model_type", "architectures"}  # these choose the class
    assert OTHER[family].keys() | decided == settings.keys(), OTHER[family].keys() ^ settings.keys()
    todo = [(key, {key: value}) for key, value in OTHER[family].items()] + MORE[family]
    for number, (key, change) in enumerate(todo):
        case = {"key": key, "change": change, "effect": "same", "tensors": ""}
        given = values
        if key == "tie_word_embeddings":
            case["tensors"] = "extra" if extra else "without lm_head.weight"
            given = values | extra if extra else {name: v for name, v in values.items() if name != "lm_head.weight"}
        try:
            got = logits(build(family, changed(settings, change)), given)
        except Exception as error:  # whatever transformers raises is a refusal
            case["effect"], case["said"], got = "error", f"{type(error).__name__}: {error}"[:120], want
        if got is None:
            case["effect"] = "shape"
        elif case["effect"] == "same" and np.abs(got - want).max() > 1e-5 * np.abs(want).max():
            case["effect"], found[str(number)] = "moves", got
        cases.append(case)
        print(family, case["effect"], change, case.get("said", ""))
    (folder / "cases.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    np.savez_compressed(folder / "logits.npz", ids=IDS, **found)


def main() -> None:
    """Record all families."""
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    for family in BASES:
        record(family, root / family)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    (root / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
