"""Llama (arXiv 2302.13971, 2307.09288): its architecture, and its tensors in a Hugging Face folder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform
from dsjax.layers.positions import rope_frequencies
from dsjax.models.block import Architecture
from dsjax.models.config import LlamaConfig, Task

IGNORED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Frequencies that old writers stored."""
PREFIX = "model."
ARCHITECTURES: dict[str, Task] = {
    "LlamaForCausalLM": "language_model",
    "LlamaForSequenceClassification": "classification",
    "LlamaModel": "embedding",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""


def architecture(config: LlamaConfig) -> Architecture:
    """RoPE, RMSNorm, a gated MLP, grouped queries."""
    frequencies = rope_frequencies(
        config.head_size,
        config.rope_base,
        factor=config.rope_factor,
        original_positions=config.rope_original_positions,
        low=config.rope_low,
        high=config.rope_high,
    )
    return Architecture(
        positions="rope",
        max_positions=config.max_positions,
        frequencies=tuple(frequencies.tolist()),
        norm="rms",
        activation="silu",
        gated=True,
        use_bias=False,
        fused_qkv=False,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_size,
        tied=config.tied_embedding or config.task != "language_model",  # no logits, no table of theirs
    )


def split_heads(heads: int) -> Transform:
    """[heads * K, D] <-> [D, heads, K]."""

    def to_ours(theirs: np.ndarray) -> np.ndarray:
        return theirs.reshape(heads, -1, theirs.shape[-1]).transpose(2, 0, 1)

    def to_theirs(ours: np.ndarray) -> np.ndarray:
        return ours.transpose(1, 2, 0).reshape(-1, ours.shape[0])

    return Transform(to_ours, to_theirs)


def entries(config: LlamaConfig) -> tuple[Entry, ...]:
    """Our tensors and theirs."""
    layer = {
        ("attention_norm", "scale"): ("input_layernorm.weight", IDENTITY),
        ("attention", "q", "kernel"): ("self_attn.q_proj.weight", split_heads(config.num_heads)),
        ("attention", "k", "kernel"): ("self_attn.k_proj.weight", split_heads(config.kv_heads)),
        ("attention", "v", "kernel"): ("self_attn.v_proj.weight", split_heads(config.kv_heads)),
        ("attention", "out", "kernel"): ("self_attn.o_proj.weight", TRANSPOSE),
        ("mlp_norm", "scale"): ("post_attention_layernorm.weight", IDENTITY),
        ("mlp", "gate", "kernel"): ("mlp.gate_proj.weight", TRANSPOSE),
        ("mlp", "up", "kernel"): ("mlp.up_proj.weight", TRANSPOSE),
        ("mlp", "down", "kernel"): ("mlp.down_proj.weight", TRANSPOSE),
    }
    return (
        Entry(("embed", "table"), "embed_tokens.weight"),
        *(Entry(("layers", "{i}", *ours), f"layers.{{i}}.{theirs}", how) for ours, (theirs, how) in layer.items()),
        Entry(("final_norm", "scale"), "norm.weight"),
        Entry(("unembed", "table"), "lm_head.weight", optional=architecture(config).tied, prefixed=False),
        Entry(("classifier", "kernel"), "score.weight", TRANSPOSE, optional=True, prefixed=False),
    )


def from_hf(hf: Mapping[str, Any]) -> LlamaConfig:
    """The config of a Hugging Face folder as ours.

    Raises:
        ValueError: an activation, a bias or a scaling of RoPE that is not Llama's.
    """
    if hf.get("hidden_act", "silu") != "silu" or hf.get("attention_bias") or hf.get("mlp_bias"):
        raise ValueError(
            "a llama model has hidden_act silu and no biases; config.json says "
            f"{hf.get('hidden_act')!r}, attention_bias {hf.get('attention_bias')}, mlp_bias {hf.get('mlp_bias')}"
        )
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        model_dim=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or 0,
        head_dim=hf.get("head_dim") or 0,
        mlp_dim=hf["intermediate_size"],
        max_positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        init_std=hf.get("initializer_range", 0.02),
        attention_dropout=hf.get("attention_dropout", 0.0),
        tied_embedding=hf.get("tie_word_embeddings", False),
        **_rope_from_hf(hf),
    )


def _rope_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 keeps all of it in rope_parameters, earlier ones in rope_theta and rope_scaling.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    ours: dict[str, Any] = {"rope_base": float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        ours["rope_factor"] = float(rope["factor"])
    elif kind == "llama3":
        ours["rope_factor"] = float(rope["factor"])
        ours["rope_original_positions"] = int(rope["original_max_position_embeddings"])
        ours["rope_low"], ours["rope_high"] = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    elif kind != "default":
        raise ValueError(f"config.json: the RoPE scaling {kind!r} is not known; known are default, linear and llama3")
    return ours


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    """Our config as a Hugging Face folder's."""
    scaling = None
    if config.rope_original_positions:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_positions,
            "low_freq_factor": config.rope_low,
            "high_freq_factor": config.rope_high,
        }
    elif config.rope_factor != 1:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "attention_dropout": config.attention_dropout,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied_embedding,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
    }
