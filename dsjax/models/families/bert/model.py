"""BERT (arXiv 1810.04805): its architecture, and its tensors in a Hugging Face folder."""

import dataclasses
from typing import Any

import numpy as np

from dsjax.checkpoint.settings import Settings
from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform, Unread
from dsjax.models.architecture import Architecture, sizes
from dsjax.models.families.bert.config import BertConfig
from dsjax.models.families.config import Task
from dsjax.models.families.family import Family, HuggingFace
from dsjax.models.families.llama.model import split_heads
from dsjax.models.transformer import Transformer

_CLASSES: dict[str, Task] = {
    "BertModel": "embedding",
    "BertForMaskedLM": "language_model",
    "BertForPreTraining": "language_model",
    "BertForSequenceClassification": "classification",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""
_POOLER = "of BERT's first program; transformers does not read it, its pooler is the one that is meant"
_FREE = {
    **dict.fromkeys(("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"), _POOLER),
    **dict.fromkeys(("pooler_size_per_head", "pooler_type", "directionality"), _POOLER),
}
"""Keys of config.json that change no number, each with the reason."""
_FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "position_embedding_type": ("absolute", None)}
"""Keys that are refused unless they have one of these values."""


def architecture(config: BertConfig) -> Architecture:
    """Both directions, norms after the residuals; a head for masked words, or a pooler for all else."""
    return Architecture(
        **sizes(config),
        positions="learned",
        max_positions=config.max_positions,
        causal=False,
        norm_first=False,
        embedding_norm=True,
        activation="gelu",
        fused_qkv=False,
        token_types=config.token_types,
        tied=config.tied_embedding or config.task != "language_model",  # no logits, no table of theirs
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
    untied = not config.tied_embedding
    predictions = {
        ("masked_head", "dense", "kernel"): ("transform.dense.weight", TRANSPOSE),
        ("masked_head", "dense", "bias"): ("transform.dense.bias", IDENTITY),
        ("masked_head", "norm", "scale"): ("transform.LayerNorm.weight", IDENTITY),
        ("masked_head", "norm", "bias"): ("transform.LayerNorm.bias", IDENTITY),
        # The decoder has a bias of its own only where it has a table of its own; older folders name it as the tied one.
        ("masked_head", "bias"): ("decoder.bias" if untied else "bias", IDENTITY),
    }
    if untied:
        predictions["unembed", "table"] = ("decoder.weight", IDENTITY)
    entries = (
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
    return tuple(dataclasses.replace(entry, others=_older_names(entry.theirs)) for entry in entries)


def _older_names(name: str) -> tuple[str, ...]:
    """Of norms those of the first program, as bert-base-uncased has them."""
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta", "decoder.bias": "bias"}
    return tuple(name.removesuffix(new) + old for new, old in older.items() if name.endswith(new))


def dropouts(task: Task) -> dict[str, float | None]:
    """Keys of what is one rate here, `dropout`, with transformers' defaults; None is the rate of the others."""
    return {"hidden_dropout_prob": 0.1} | ({"classifier_dropout": None} if task == "classification" else {})


def unread(config: BertConfig) -> tuple[Unread, ...]:
    """Tensors that a folder may have besides: positions, second copies, and the head for pairs of sentences."""
    pairs, positions = Unread(r"cls\.seq_relationship\..*"), Unread("embeddings.position_ids", holds=_is_range)
    if config.task != "language_model":
        return pairs, positions, Unread(r"cls\.predictions\..*")
    if not config.tied_embedding:
        return pairs, positions, Unread(r"cls\.predictions\.bias")  # transformers adds the decoder's, not this one
    return (
        pairs,
        positions,
        Unread(r"cls\.predictions\.decoder\.weight", same_as="embeddings.word_embeddings.weight"),
        Unread(r"cls\.predictions\.decoder\.bias", same_as="cls.predictions.bias"),
    )


def _is_range(stored: np.ndarray) -> bool:
    return bool((stored.reshape(-1) == np.arange(stored.size)).all())


def from_hf(hf: Settings) -> BertConfig:
    """The config of a Hugging Face folder as ours."""
    hf.take("classifier_dropout", None)  # compared with hidden_dropout_prob where it is used, in training
    return BertConfig(
        vocab_size=hf.take("vocab_size"),
        num_layers=hf.take("num_hidden_layers"),
        model_dim=hf.take("hidden_size"),
        num_heads=hf.take("num_attention_heads"),
        mlp_dim=hf.take("intermediate_size"),
        max_positions=hf.take("max_position_embeddings"),
        token_types=hf.take("type_vocab_size", 2),
        norm_eps=hf.take("layer_norm_eps", 1e-12),
        init_std=hf.take("initializer_range", 0.02),
        dropout=hf.take("hidden_dropout_prob", 0.1),
        attention_dropout=hf.take("attention_probs_dropout_prob", 0.1),
        tied_embedding=hf.take("tie_word_embeddings", True),
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
        "tie_word_embeddings": config.tied_embedding,
    }


FAMILY = Family(
    tasks=("language_model", "classification", "embedding"),
    architecture=architecture,
    build=Transformer,
    hugging_face=HuggingFace(
        classes=_CLASSES,
        prefix="bert.",
        free=_FREE,
        fixed=_FIXED,
        from_hf=from_hf,
        to_hf=to_hf,
        entries=entries,
        unread=unread,
        dropouts=dropouts,
    ),
)
