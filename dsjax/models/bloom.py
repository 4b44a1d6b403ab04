"""BLOOM (arXiv 2211.05100): its architecture, and its tensors in a Hugging Face folder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform
from dsjax.models.block import Architecture
from dsjax.models.config import BloomConfig, Task

IGNORED = ("lm_head.weight",)
"""Tensors that some writers store although they are tied."""
PREFIX = "transformer."
ARCHITECTURES: dict[str, Task] = {
    "BloomForCausalLM": "language_model",
    "BloomForSequenceClassification": "classification",
    "BloomModel": "language_model",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""


def architecture(config: BloomConfig) -> Architecture:
    """ALiBi, a LayerNorm after the embedding."""
    return Architecture(positions="alibi", embedding_norm=True, residual_after_norm=config.residual_after_norm)


def entries(config: BloomConfig) -> tuple[Entry, ...]:
    """Our tensors and theirs."""
    heads = config.num_heads

    def kernel_to_ours(theirs: np.ndarray) -> np.ndarray:
        """[H * 3 * K, D], query, key and value interleaved per head -> [D, 3, H * K]."""
        dim = theirs.shape[1]
        return theirs.reshape(heads, 3, -1, dim).transpose(3, 1, 0, 2).reshape(dim, 3, -1)

    def kernel_to_theirs(ours: np.ndarray) -> np.ndarray:
        dim = ours.shape[0]
        return ours.reshape(dim, 3, heads, -1).transpose(2, 1, 3, 0).reshape(-1, dim)

    def bias_to_ours(theirs: np.ndarray) -> np.ndarray:
        return theirs.reshape(heads, 3, -1).transpose(1, 0, 2).reshape(3, -1)

    def bias_to_theirs(ours: np.ndarray) -> np.ndarray:
        return ours.reshape(3, heads, -1).transpose(1, 0, 2).reshape(-1)

    layer = {
        ("attention_norm", "scale"): ("input_layernorm.weight", IDENTITY),
        ("attention_norm", "bias"): ("input_layernorm.bias", IDENTITY),
        ("attention", "qkv", "kernel"): (
            "self_attention.query_key_value.weight",
            Transform(kernel_to_ours, kernel_to_theirs),
        ),
        ("attention", "qkv", "bias"): ("self_attention.query_key_value.bias", Transform(bias_to_ours, bias_to_theirs)),
        ("attention", "out", "kernel"): ("self_attention.dense.weight", TRANSPOSE),
        ("attention", "out", "bias"): ("self_attention.dense.bias", IDENTITY),
        ("mlp_norm", "scale"): ("post_attention_layernorm.weight", IDENTITY),
        ("mlp_norm", "bias"): ("post_attention_layernorm.bias", IDENTITY),
        ("mlp", "up", "kernel"): ("mlp.dense_h_to_4h.weight", TRANSPOSE),
        ("mlp", "up", "bias"): ("mlp.dense_h_to_4h.bias", IDENTITY),
        ("mlp", "down", "kernel"): ("mlp.dense_4h_to_h.weight", TRANSPOSE),
        ("mlp", "down", "bias"): ("mlp.dense_4h_to_h.bias", IDENTITY),
    }
    return (
        Entry(("embed", "table"), "word_embeddings.weight"),
        Entry(("embed_norm", "scale"), "word_embeddings_layernorm.weight"),
        Entry(("embed_norm", "bias"), "word_embeddings_layernorm.bias"),
        *(Entry(("layers", "{i}", *ours), f"h.{{i}}.{theirs}", how) for ours, (theirs, how) in layer.items()),
        Entry(("final_norm", "scale"), "ln_f.weight"),
        Entry(("final_norm", "bias"), "ln_f.bias"),
        Entry(("classifier", "kernel"), "score.weight", TRANSPOSE, optional=True, prefixed=False),
    )


def from_hf(hf: Mapping[str, Any]) -> BloomConfig:
    """The config of a Hugging Face folder as ours."""
    return BloomConfig(
        vocab_size=hf["vocab_size"],
        num_layers=hf["n_layer"],
        model_dim=hf["hidden_size"] if "hidden_size" in hf else hf["n_embed"],
        num_heads=hf["n_head"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        init_std=hf.get("initializer_range", 0.02),
        dropout=hf.get("hidden_dropout", 0.0),
        attention_dropout=hf.get("attention_dropout", 0.0),
        residual_after_norm=hf.get("apply_residual_connection_post_layernorm", False),
    )


def to_hf(config: BloomConfig) -> dict[str, Any]:
    """Our config as a Hugging Face folder's.

    Raises:
        ValueError: a hidden width that BLOOM does not have.
    """
    if config.hidden_dim != 4 * config.model_dim:
        raise ValueError(
            f"a BLOOM folder has mlp_dim = 4 * model_dim = {4 * config.model_dim}; got {config.hidden_dim}"
        )
    return {
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "hidden_size": config.model_dim,
        "n_head": config.num_heads,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "apply_residual_connection_post_layernorm": config.residual_after_norm,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
