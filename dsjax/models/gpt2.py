"""GPT-2: its architecture, and its tensors in a Hugging Face folder (whose Conv1D keeps kernels as [in, out])."""

from collections.abc import Mapping
from typing import Any

from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform
from dsjax.models.block import Architecture
from dsjax.models.config import GPT2Config, Task

IGNORED = ("lm_head.weight", r"h\.\d+\.attn\.(masked_)?bias")
"""Tied tensors and masks that some writers store."""
PREFIX = "transformer."
ARCHITECTURES: dict[str, Task] = {
    "GPT2LMHeadModel": "language_model",
    "GPT2ForSequenceClassification": "classification",
    "GPT2Model": "language_model",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""

_CUT = Transform(lambda a: a.reshape(*a.shape[:-1], 3, -1), lambda a: a.reshape(*a.shape[:-2], -1))
"""[..., 3 * D] <-> [..., 3, D]: query, key and value blocks."""

_LAYER = {
    ("attention_norm", "scale"): ("ln_1.weight", IDENTITY),
    ("attention_norm", "bias"): ("ln_1.bias", IDENTITY),
    ("attention", "qkv", "kernel"): ("attn.c_attn.weight", _CUT),
    ("attention", "qkv", "bias"): ("attn.c_attn.bias", _CUT),
    ("attention", "out", "kernel"): ("attn.c_proj.weight", IDENTITY),
    ("attention", "out", "bias"): ("attn.c_proj.bias", IDENTITY),
    ("mlp_norm", "scale"): ("ln_2.weight", IDENTITY),
    ("mlp_norm", "bias"): ("ln_2.bias", IDENTITY),
    ("mlp", "up", "kernel"): ("mlp.c_fc.weight", IDENTITY),
    ("mlp", "up", "bias"): ("mlp.c_fc.bias", IDENTITY),
    ("mlp", "down", "kernel"): ("mlp.c_proj.weight", IDENTITY),
    ("mlp", "down", "bias"): ("mlp.c_proj.bias", IDENTITY),
}


def architecture(config: GPT2Config) -> Architecture:
    """Learned positions."""
    return Architecture(positions="learned", max_positions=config.max_positions)


def entries(config: GPT2Config) -> tuple[Entry, ...]:
    """Our tensors and theirs."""
    return (
        Entry(("embed", "table"), "wte.weight"),
        Entry(("positions", "table"), "wpe.weight"),
        *(Entry(("layers", "{i}", *ours), f"h.{{i}}.{theirs}", how) for ours, (theirs, how) in _LAYER.items()),
        Entry(("final_norm", "scale"), "ln_f.weight"),
        Entry(("final_norm", "bias"), "ln_f.bias"),
        Entry(("classifier", "kernel"), "score.weight", TRANSPOSE, optional=True, prefixed=False),
    )


def from_hf(hf: Mapping[str, Any]) -> GPT2Config:
    """The config of a Hugging Face folder as ours.

    Raises:
        ValueError: an activation other than gelu_new.
    """
    if hf.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"activation_function must be gelu_new; config.json says {hf['activation_function']!r}")
    return GPT2Config(
        vocab_size=hf["vocab_size"],
        num_layers=hf["n_layer"],
        model_dim=hf["n_embd"],
        num_heads=hf["n_head"],
        mlp_dim=hf.get("n_inner") or 0,
        max_positions=hf["n_positions"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        init_std=hf.get("initializer_range", 0.02),
        dropout=hf.get("resid_pdrop", 0.0),
        attention_dropout=hf.get("attn_pdrop", 0.0),
    )


def to_hf(config: GPT2Config) -> dict[str, Any]:
    """Our config as a Hugging Face folder's."""
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.model_dim,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim or None,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "tie_word_embeddings": True,
    }
