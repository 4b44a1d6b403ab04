"""Llama (arXiv 2302.13971, 2307.09288): its architecture, and its tensors in a Hugging Face folder."""

from typing import Any

import numpy as np

from dsjax.checkpoint.settings import Settings, shown
from dsjax.checkpoint.tensor_map import IDENTITY, TRANSPOSE, Entry, Transform, Unread
from dsjax.layers.positions import rope_frequencies
from dsjax.models.architecture import Architecture, sizes
from dsjax.models.families.config import Task
from dsjax.models.families.family import Family, HuggingFace
from dsjax.models.families.llama.config import LlamaConfig
from dsjax.models.families.tied import copied_head, untied_head
from dsjax.models.transformer import Transformer

_CLASSES: dict[str, Task] = {
    "LlamaForCausalLM": "language_model",
    "LlamaForSequenceClassification": "classification",
    "LlamaModel": "embedding",
}
"""Classes of transformers -> our task; the first is what a config.json without a class means."""
_FREE = {
    "pretraining_tp": "in which order sums are taken",
    "max_sequence_length": "max_position_embeddings under its first name, which transformers does not read",
}
"""Keys of config.json that change no number, each with the reason."""
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_interleaved": (False, None),
}
"""Keys that are refused unless they have one of these values."""


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
        **sizes(config),
        positions="rope",
        max_positions=config.max_positions,
        frequencies=tuple(frequencies.tolist()),
        norm="rms",
        activation="silu",
        gated=True,
        use_bias=False,
        fused_qkv=False,
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
        *untied_head(config),
        Entry(("classifier", "kernel"), "score.weight", TRANSPOSE, optional=True, prefixed=False),
    )


def dropouts(task: Task) -> dict[str, float | None]:
    """Keys of what is one rate here, `dropout`: Llama has none."""
    return {}


def unread(config: LlamaConfig) -> tuple[Unread, ...]:
    """Tensors that a folder may have besides: a copy of the embedding, and the frequencies that old writers stored."""
    # Scaling divided the positions then, not the frequencies; stored in 16 bits they have 3 digits.
    plain = rope_frequencies(config.head_size, config.rope_base)
    ours = np.array(architecture(config).frequencies)

    def holds(stored: np.ndarray) -> bool:
        close = lambda want: np.allclose(np.asarray(stored, np.float64), want, rtol=1e-2, atol=1e-7)
        return any(stored.shape == want.shape and close(want) for want in (plain, ours))

    inverse = Unread(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", holds=holds)
    return (*copied_head(config, "embed_tokens.weight"), inverse)


def from_hf(hf: Settings) -> LlamaConfig:
    """The config of a Hugging Face folder as ours.

    Raises:
        ValueError: a scaling of RoPE that is not known.
    """
    return LlamaConfig(
        vocab_size=hf.take("vocab_size"),
        num_layers=hf.take("num_hidden_layers"),
        model_dim=hf.take("hidden_size"),
        num_heads=hf.take("num_attention_heads"),
        num_kv_heads=hf.take("num_key_value_heads", None) or 0,
        head_dim=hf.take("head_dim", None) or 0,
        mlp_dim=hf.take("intermediate_size"),
        max_positions=hf.take("max_position_embeddings", 2048),
        norm_eps=hf.take("rms_norm_eps", 1e-6),
        init_std=hf.take("initializer_range", 0.02),
        attention_dropout=hf.take("attention_dropout", None) or 0.0,
        tied_embedding=hf.take("tie_word_embeddings", False),
        **_rope_from_hf(hf),
    )


def _rope_from_hf(hf: Settings) -> dict[str, Any]:
    # transformers 5 keeps all of it in rope_parameters, earlier ones in rope_theta and rope_scaling.
    scaling, parameters = hf.take("rope_scaling", None), hf.take("rope_parameters", None)
    name = "rope_scaling" if scaling else "rope_parameters"
    base = hf.take("rope_theta", None) or 10000.0
    rope = Settings(scaling or parameters or {}, f"{hf.source}: {name}", free=_ROPE_FREE, fixed=_ROPE_FIXED)
    ours: dict[str, Any] = {"rope_base": float(rope.take("rope_theta", None) or base)}
    kind = rope.take("rope_type", "default", alias="type")
    if kind == "linear":
        ours["rope_factor"] = float(rope.take("factor"))
    elif kind == "llama3":
        ours["rope_factor"] = float(rope.take("factor"))
        ours["rope_original_positions"] = int(rope.take("original_max_position_embeddings"))
        ours["rope_low"], ours["rope_high"] = float(rope.take("low_freq_factor")), float(rope.take("high_freq_factor"))
    elif kind != "default":
        raise ValueError(
            f"{rope.source}: the RoPE scaling {shown(kind)} is not known; known are default, linear and llama3"
        )
    rope.check()
    return ours


_OTHER_SCALING = "of a kind of scaling that this model does not have"
_ROPE_FREE = {
    "factor": _OTHER_SCALING,
    "original_max_position_embeddings": _OTHER_SCALING,
    "low_freq_factor": _OTHER_SCALING,
    "high_freq_factor": _OTHER_SCALING,
    "beta_fast": _OTHER_SCALING,
    "beta_slow": _OTHER_SCALING,
}
_ROPE_FIXED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0, None),
    "attention_factor": (1.0, None),
    "mscale": (1.0, None),
    "mscale_all_dim": (1.0, None),
}


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


FAMILY = Family(
    tasks=("language_model", "classification", "embedding"),
    architecture=architecture,
    build=Transformer,
    hugging_face=HuggingFace(
        classes=_CLASSES,
        prefix="model.",
        free=_FREE,
        fixed=_FIXED,
        from_hf=from_hf,
        to_hf=to_hf,
        entries=entries,
        unread=unread,
        dropouts=dropouts,
    ),
)
