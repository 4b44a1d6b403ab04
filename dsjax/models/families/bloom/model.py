"""BLOOM (arXiv 2211.05100): its architecture, and its tensors in a Hugging Face folder."""

from typing import Any

import numpy as np

from dsjax.checkpoint.settings import Settings
from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform, Unread
from dsjax.models.architecture import Architecture, sizes
from dsjax.models.families.bloom.config import BloomConfig
from dsjax.models.families.config import Task
from dsjax.models.families.family import Family, HuggingFace
from dsjax.models.families.tied import copied_head, untied_head
from dsjax.models.transformer import Transformer

_CLASSES: dict[str, Task] = {
    "BloomForCausalLM": "language_model",
    "BloomForSequenceClassification": "classification",
    "BloomModel": "language_model",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""
_MEGATRON = "of the program that trained BLOOM; transformers does not read it"
_FREE = {
    **dict.fromkeys(("attention_softmax_in_fp32", "masked_softmax_fusion", "bias_dropout_fusion"), _MEGATRON),
    **dict.fromkeys(("skip_bias_add", "skip_bias_add_qkv", "offset_alibi"), _MEGATRON),
    "seq_length": "used: how long the rows of its training were",
    **dict.fromkeys(("pretraining_tp", "slow_but_exact"), "in which order sums are taken"),
}
"""Keys of config.json that change no number, each with the reason."""
_FIXED: dict[str, tuple[Any, ...]] = {"n_inner": (None,)}
"""Keys that are refused unless they have one of these values."""


def architecture(config: BloomConfig) -> Architecture:
    """ALiBi, a LayerNorm after the embedding."""
    return Architecture(
        **sizes(config),
        positions="alibi",
        embedding_norm=True,
        residual_after_norm=config.residual_after_norm,
        tied=config.tied_embedding or config.task != "language_model",  # no logits, no table of theirs
    )


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
        *untied_head(config),
        Entry(("classifier", "kernel"), "score.weight", TRANSPOSE, optional=True, prefixed=False),
    )


def dropouts(task: Task) -> dict[str, float | None]:
    """Keys of what is one rate here, `dropout`, with transformers' defaults."""
    return {"hidden_dropout": 0.0}


def unread(config: BloomConfig) -> tuple[Unread, ...]:
    """Tensors that a folder may have besides: a second copy of the embedding."""
    return copied_head(config, "word_embeddings.weight")


def from_hf(hf: Settings) -> BloomConfig:
    """The config of a Hugging Face folder as ours."""
    return BloomConfig(
        vocab_size=hf.take("vocab_size"),
        num_layers=hf.take("n_layer", alias="num_hidden_layers"),
        model_dim=hf.take("hidden_size", alias="n_embed"),
        num_heads=hf.take("n_head", alias="num_attention_heads"),
        norm_eps=hf.take("layer_norm_epsilon", 1e-5),
        init_std=hf.take("initializer_range", 0.02),
        dropout=hf.take("hidden_dropout", 0.0),
        attention_dropout=hf.take("attention_dropout", 0.0),
        residual_after_norm=hf.take("apply_residual_connection_post_layernorm", False),
        tied_embedding=hf.take("tie_word_embeddings", True),
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
        "tie_word_embeddings": config.tied_embedding,
        "use_cache": True,
    }


FAMILY = Family(
    tasks=("language_model", "classification"),
    architecture=architecture,
    build=Transformer,
    hugging_face=HuggingFace(
        classes=_CLASSES,
        prefix="transformer.",
        free=_FREE,
        fixed=_FIXED,
        from_hf=from_hf,
        to_hf=to_hf,
        entries=entries,
        unread=unread,
        dropouts=dropouts,
    ),
)
