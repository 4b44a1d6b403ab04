"""BERT (arXiv 1810.04805): its architecture, and its tensors in a Hugging Face folder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform
from dsjax.models.block import Architecture
from dsjax.models.config import BertConfig, Task
from dsjax.models.llama import split_heads

IGNORED = ("embeddings.position_ids", r"cls\.predictions\.decoder\.(weight|bias)", r"cls\.seq_relationship\..*")
"""Numbers that some writers store, tied tensors, and the head for pairs of sentences, which nothing here uses."""
PREFIX = "bert."
ARCHITECTURES: dict[str, Task] = {
    "BertModel": "embedding",
    "BertForMaskedLM": "language_model",
    "BertForPreTraining": "language_model",
    "BertForSequenceClassification": "classification",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""


def architecture(config: BertConfig) -> Architecture:
    """Both directions, norms after the residuals; a head for masked words, or a pooler for all else."""
    return Architecture(
        positions="learned",
        max_positions=config.max_positions,
        causal=False,
        norm_first=False,
        embedding_norm=True,
        activation="gelu",
        fused_qkv=False,
        token_types=config.token_types,
        masked_head=config.task == "language_model",
        pooler=config.task != "language_model",
    )


def entries(config: BertConfig) -> tuple[Entry, ...]:
    """Our tensors and theirs."""
    kernel = split_heads(config.num_heads)
    bias = Transform(lambda theirs: theirs.reshape(config.num_heads, -1), np.ravel)
    layer = {
        ("attention", "out", "kernel"): ("attention.output.dense.weight", TRANSPOSE),
        ("attention", "out", "bias"): ("attention.output.dense.bias", IDENTITY),
        ("attention_norm", "scale"): ("attention.output.LayerNorm.weight", IDENTITY),
        ("attention_norm", "bias"): ("attention.output.LayerNorm.bias", IDENTITY),
        ("mlp", "up", "kernel"): ("intermediate.dense.weight", TRANSPOSE),
        ("mlp", "up", "bias"): ("intermediate.dense.bias", IDENTITY),
        ("mlp", "down", "kernel"): ("output.dense.weight", TRANSPOSE),
        ("mlp", "down", "bias"): ("output.dense.bias", IDENTITY),
        ("mlp_norm", "scale"): ("output.LayerNorm.weight", IDENTITY),
        ("mlp_norm", "bias"): ("output.LayerNorm.bias", IDENTITY),
    }
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        layer["attention", ours, "kernel"] = (f"attention.self.{theirs}.weight", kernel)
        layer["attention", ours, "bias"] = (f"attention.self.{theirs}.bias", bias)
    predictions = {
        ("masked_head", "dense", "kernel"): ("transform.dense.weight", TRANSPOSE),
        ("masked_head", "dense", "bias"): ("transform.dense.bias", IDENTITY),
        ("masked_head", "norm", "scale"): ("transform.LayerNorm.weight", IDENTITY),
        ("masked_head", "norm", "bias"): ("transform.LayerNorm.bias", IDENTITY),
        ("masked_head", "bias"): ("bias", IDENTITY),
    }
    return (
        Entry(("embed", "table"), "embeddings.word_embeddings.weight"),
        Entry(("positions", "table"), "embeddings.position_embeddings.weight"),
        Entry(("token_types", "table"), "embeddings.token_type_embeddings.weight"),
        Entry(("embed_norm", "scale"), "embeddings.LayerNorm.weight"),
        Entry(("embed_norm", "bias"), "embeddings.LayerNorm.bias"),
        *(Entry(("layers", "{i}", *o), f"encoder.layer.{{i}}.{t}", how) for o, (t, how) in layer.items()),
        *(Entry(o, f"cls.predictions.{t}", how, optional=True, prefixed=False) for o, (t, how) in predictions.items()),
        Entry(("pooler", "dense", "kernel"), "pooler.dense.weight", TRANSPOSE, optional=True),
        Entry(("pooler", "dense", "bias"), "pooler.dense.bias", optional=True),
        Entry(("classifier", "kernel"), "classifier.weight", TRANSPOSE, optional=True, prefixed=False),
        Entry(("classifier", "bias"), "classifier.bias", optional=True, prefixed=False),
    )


def from_hf(hf: Mapping[str, Any]) -> BertConfig:
    """The config of a Hugging Face folder as ours.

    Raises:
        ValueError: an activation or positions that are not BERT's.
    """
    if hf.get("hidden_act", "gelu") != "gelu" or hf.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            "a bert model has hidden_act gelu and position_embedding_type absolute; config.json says "
            f"{hf.get('hidden_act')!r} and {hf.get('position_embedding_type')!r}"
        )
    return BertConfig(
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        model_dim=hf["hidden_size"],
        num_heads=hf["num_attention_heads"],
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        token_types=hf.get("type_vocab_size", 2),
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        init_std=hf.get("initializer_range", 0.02),
        dropout=hf.get("hidden_dropout_prob", 0.0),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.0),
    )


def to_hf(config: BertConfig) -> dict[str, Any]:
    """Our config as a Hugging Face folder's."""
    return {
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }
