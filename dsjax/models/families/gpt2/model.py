"""GPT-2: its architecture, and its tensors in a Hugging Face folder (whose Conv1D keeps kernels as [in, out])."""

from typing import Any, Literal

import numpy as np

from dsjax.checkpoint.settings import Settings
from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform, Unread
from dsjax.models.architecture import Architecture, sizes
from dsjax.models.families.config import Task
from dsjax.models.families.family import Family, HuggingFace
from dsjax.models.families.gpt2.config import GPT2Config
from dsjax.models.families.tied import copied_head, untied_head
from dsjax.models.transformer import Transformer

_CLASSES: dict[str, Task] = {
    "GPT2LMHeadModel": "language_model",
    "GPT2ForSequenceClassification": "classification",
    "GPT2Model": "language_model",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""
_SUMMARY = "of the head of GPT2DoubleHeadsModel, a class that is not read"
_FREE = {
    **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"), _SUMMARY),
    "summary_first_dropout": _SUMMARY,
    "n_ctx": "n_positions under its first name, which transformers does not read",
    "reorder_and_upcast_attn": "scores in float32, as they are here in any case",
}
"""Keys of config.json that change no number, each with the reason."""
_FIXED: dict[str, tuple[Any, ...]] = {"scale_attn_weights": (True,)}
"""Keys that are refused unless they have one of these values."""
_ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}

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
    return Architecture(
        **sizes(config),
        positions="learned",
        max_positions=config.max_positions,
        activation=config.activation,
        scores_by_layer=config.scores_by_layer,
        tied=config.tied_embedding or config.task != "language_model",  # no logits, no table of theirs
    )


def entries(config: GPT2Config) -> tuple[Entry, ...]:
    """Our tensors and theirs."""
    return (
        Entry(("embed", "table"), "wte.weight"),
        Entry(("positions", "table"), "wpe.weight"),
        *(Entry(("layers", "{i}", *ours), f"h.{{i}}.{theirs}", how) for ours, (theirs, how) in _LAYER.items()),
        Entry(("final_norm", "scale"), "ln_f.weight"),
        Entry(("final_norm", "bias"), "ln_f.bias"),
        *untied_head(config),
        Entry(("classifier", "kernel"), "score.weight", TRANSPOSE, optional=True, prefixed=False),
    )


def dropouts(task: Task) -> dict[str, float | None]:
    """Keys of what is one rate here, `dropout`, with transformers' defaults."""
    return {"embd_pdrop": 0.1, "resid_pdrop": 0.1}


def unread(config: GPT2Config) -> tuple[Unread, ...]:
    """Tensors that a folder may have besides: a second copy of the embedding, and masks."""
    return (
        *copied_head(config, "wte.weight"),
        Unread(r"h\.\d+\.attn\.bias", holds=_is_causal_mask),
        Unread(r"h\.\d+\.attn\.masked_bias", holds=lambda score: bool((score <= -1e4).all())),
    )


def _is_causal_mask(stored: np.ndarray) -> bool:
    return stored.ndim >= 2 and bool((stored.astype(bool) == np.tri(*stored.shape[-2:], dtype=bool)).all())


def from_hf(hf: Settings) -> GPT2Config:
    """The config of a Hugging Face folder as ours.

    Raises:
        ValueError: an activation that is not known.
    """
    activation = hf.take("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation_function must be one of {', '.join(_ACTIVATIONS)}; {hf.source} says {activation!r}"
        )
    hf.take("embd_pdrop", None)  # compared with resid_pdrop where it is used, in training
    return GPT2Config(
        vocab_size=hf.take("vocab_size"),
        num_layers=hf.take("n_layer", alias="num_hidden_layers"),
        model_dim=hf.take("n_embd", alias="hidden_size"),
        num_heads=hf.take("n_head", alias="num_attention_heads"),
        mlp_dim=hf.take("n_inner", None) or 0,
        max_positions=hf.take("n_positions", alias="max_position_embeddings"),
        norm_eps=hf.take("layer_norm_epsilon", 1e-5),
        init_std=hf.take("initializer_range", 0.02),
        dropout=hf.take("resid_pdrop", 0.1),
        attention_dropout=hf.take("attn_pdrop", 0.1),
        activation=_ACTIVATIONS[activation],
        scores_by_layer=hf.take("scale_attn_by_inverse_layer_idx", False),
        tied_embedding=hf.take("tie_word_embeddings", True),
    )


def to_hf(config: GPT2Config) -> dict[str, Any]:
    """Our config as a Hugging Face folder's."""
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
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
        "scale_attn_by_inverse_layer_idx": config.scores_by_layer,
        "tie_word_embeddings": config.tied_embedding,
    }


FAMILY = Family(
    tasks=("language_model", "classification"),
    architecture=architecture,
    build=Transformer,
    hugging_face=HuggingFace(
        classes=_CLASSES,
        prefix="transformer.",
        kernels_in_first=True,
        free=_FREE,
        fixed=_FIXED,
        from_hf=from_hf,
        to_hf=to_hf,
        entries=entries,
        unread=unread,
        dropouts=dropouts,
    ),
)
