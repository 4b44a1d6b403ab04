"""A GGUF file read as if it were a Hugging Face folder: its config, and its tensors' names and layouts.

A family's file here has the part of config.json that the metadata decide, names, and what is stored in another order:
Llama's queries and keys, whose rows are put so that RoPE turns neighbours (2i, 2i + 1) instead of (i, i + K/2).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.checkpoint.gguf_file import GGUFFile, open_gguf
from dsjax.checkpoint.settings import Settings, shown
from dsjax.layers.positions import rope_frequencies

_LLAMA_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj",
    "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
    "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj",
    "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
    "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
    "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj",
    "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
    "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"  # what Llama 3.1's rule divides each frequency by
_ELSEWHERE = ("general.", "tokenizer.", "quantize.", "split.")
"""Metadata of no architecture: names, licences, the tokenizer's, how the file was made, parts (see `_check_whole`)."""
_NO_YARN = "of YaRN, a scaling that is refused"
_FREE = {
    "llama.vocab_size": "the embedding's rows say it",
    "llama.attention.layer_norm_epsilon": "of LayerNorm, which a Llama does not have",
    "llama.rope.scaling.finetuned": "of training",
    "llama.rope.scaling.original_context_length": "of Llama 3.1's rule, where there is one",
    **{f"llama.rope.scaling.yarn_{key}": _NO_YARN for key in ("log_multiplier", "ext_factor", "attn_factor")},
    **{f"llama.rope.scaling.yarn_{key}": _NO_YARN for key in ("beta_fast", "beta_slow")},
}
"""Metadata that change no number, each with the reason."""
_FIXED: dict[str, tuple[Any, ...]] = {
    "llama.expert_used_count": (0,),
    "llama.tensor_data_layout": ("Meta AI original pth",),
    "llama.use_parallel_residual": (False,),
    **{f"llama.attention.{key}": (0.0,) for key in ("clamp_kqv", "max_alibi_bias", "scale", "sliding_window")},
    "llama.attention.causal": (True,),
    "llama.pooling_type": (0,),
    **{f"llama.{key}_scale": (1.0, 0.0) for key in ("logit", "residual", "embedding")},
    "llama.rope.scaling.attn_factor": (1.0, 0.0),
}
"""Metadata that are refused unless they have one of these values."""


@dataclasses.dataclass(frozen=True)
class GGUFWeights:
    """A `TensorSource` over a GGUF file."""

    file: GGUFFile
    """The open file."""
    config: Mapping[str, Any]
    """The entries that config.json would have."""
    stored: Mapping[str, str]
    """Hugging Face's name -> the file's; a name that is not known stands for itself."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self.file.shape(self.stored[name])

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised and in Hugging Face's order, as a new float32 array."""
        array = self.file.read(self.stored[name])
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        part = name.removesuffix(".weight").rpartition(".")[2]
        return halves_from_pairs(array, heads[part]) if part in heads else array


def halves_from_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [H * K, D] in which RoPE turns (2i, 2i + 1) of a head, in the order in which it turns (i, i + K / 2).

    Example:
        >>> halves_from_pairs(np.arange(8)[:, None], 2)[:, 0].tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def open_gguf_weights(path: str | Path) -> GGUFWeights:
    """The tensors of a GGUF file.

    Raises:
        ValueError: a damaged file, an architecture that is not known, or metadata that are missing or not supported.
    """
    file = open_gguf(path)
    _check_whole(file)
    kind = file.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {kind!r}; known are {', '.join(sorted(_ARCHITECTURES))}; a Hugging Face "
            "folder of the same model may be of a family that is"
        )
    own = {key: value for key, value in file.metadata.items() if not key.startswith(_ELSEWHERE)}
    settings = Settings(own, str(path), free=_FREE, fixed=_FIXED)
    config = _ARCHITECTURES[kind](_Metadata(file, kind, settings))
    settings.check()
    stored = {_hugging_face_name(name): name for name in file.names() if name != _ROPE_FREQS}
    if twice := set(file.names()) - {_ROPE_FREQS, *stored.values()}:
        raise ValueError(f"{path}: damaged: {', '.join(sorted(twice))}: a tensor that the file has under another name")
    return GGUFWeights(file, {**config, **_token_ids(file.metadata, config["vocab_size"])}, stored)


def _check_whole(file: GGUFFile) -> None:
    """Refuse one of several parts, which may look whole, and what is no model.

    Raises:
        ValueError: says which part it is.
    """
    number, count = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        part = number + 1 if isinstance(number, int) else "?"
        raise ValueError(
            f"{file.path}: part {part} of {count} of a model; only whole files are read: join the parts with "
            "`llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{file.path}: general.type is {shown(kind)}; only a model is read")


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """Values of one architecture, each with its type checked."""

    file: GGUFFile
    kind: str
    settings: Settings

    def get[T](self, key: str, type_: type[T], default: T | None = None) -> T:
        full = f"{self.kind}.{key}"
        value = self.settings.take(full, default)
        if value is None:
            raise ValueError(f"{self.file.path}: the metadata lack {full}, without which the model is not known")
        if type(value) is not type_:
            # Lists give a number to each layer; only models whose layers are equal are read.
            raise ValueError(f"{self.file.path}: {full} is {shown(value)}; expected one {type_.__name__}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that gives it: 1e-05 instead of 9.999999747378752e-06."""
        value = self.get(key, float, default)
        return float(str(np.float32(value)))

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise ValueError(f"{self.file.path}: {self.kind}.{key} is {value}; expected a size above 0")
        return value


def _llama_config(metadata: _Metadata) -> dict[str, Any]:
    file, size = metadata.file, metadata.size
    if metadata.get("expert_count", int, 0):
        raise ValueError(f"{file.path}: a mixture of experts (llama.expert_count); only dense models are read")
    heads, width = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", width // heads or 1)
    turned = size("rope.dimension_count", head_dim)
    if turned != head_dim or size("attention.value_length", head_dim) != head_dim:
        raise ValueError(
            f"{file.path}: heads of {head_dim} whose values have "
            f"{size('attention.value_length', head_dim)} and of which RoPE turns {turned}; all three must be equal"
        )
    if "token_embd.weight" not in file.tensors or len(file.shape("token_embd.weight")) != 2:
        raise ValueError(f"{file.path}: there is no tensor token_embd.weight of two dimensions")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": file.shape("token_embd.weight")[0],
        "num_hidden_layers": size("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": size("feed_forward_length"),
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": metadata.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata, head_dim),
    }


def _rope_scaling(metadata: _Metadata, head_dim: int) -> dict[str, Any] | None:
    """The entry that config.json would have; None for no scaling."""
    file = metadata.file
    # Older files have one key instead of the two.
    factor = metadata.real("rope.scaling.factor", metadata.real("rope.scale_linear", 1.0))
    if _ROPE_FREQS in file.tensors:
        return _llama3_scaling(metadata, head_dim)
    kind = metadata.get("rope.scaling.type", str, "linear" if "llama.rope.scale_linear" in file.metadata else "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{file.path}: the RoPE scaling {kind!r} is not known; known are none, linear and llama3's")
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _llama3_scaling(metadata: _Metadata, head_dim: int) -> dict[str, Any]:
    """The settings of Llama 3.1's rule whose divisors are those in the file, which keeps only these."""
    file, base = metadata.file, metadata.real("rope.freq_base", 10000.0)
    divisors = file.read(_ROPE_FREQS)
    low, high, original = 1.0, 4.0, metadata.size("rope.scaling.original_context_length", 8192)
    factor = float(divisors.max(initial=1.0))
    if divisors.shape == (head_dim // 2,) and head_dim % 2 == 0 and factor < float("inf"):
        plain = rope_frequencies(head_dim, base)
        scaled = rope_frequencies(head_dim, base, factor=factor, original_positions=original, low=low, high=high)
        if np.allclose(plain / divisors, scaled, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "original_max_position_embeddings": original,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
    raise ValueError(
        f"{file.path}: {_ROPE_FREQS} are not the divisors of Llama 3.1's rule with low_freq_factor 1, high_freq_factor "
        f"4 and an original context of {original}; other rules are not known"
    )


def _token_ids(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, int | list[int]]:
    """bos_token_id, pad_token_id and eos_token_id (several where turns or messages end otherwise than texts)."""

    def found(*keys: str) -> list[int]:
        numbers = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys)
        return [number for number in numbers if type(number) is int and 0 <= number < vocab_size]

    ids = {"bos_token_id": found("bos"), "eos_token_id": found("eos", "eot", "eom"), "pad_token_id": found("padding")}
    unique = {name: list(dict.fromkeys(numbers)) for name, numbers in ids.items()}
    return {name: numbers if len(numbers) > 1 else numbers[0] for name, numbers in unique.items() if numbers}


def _hugging_face_name(name: str) -> str:
    if name in _LLAMA_NAMES:
        return _LLAMA_NAMES[name]
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if parts is None or (known := _LLAMA_NAMES.get(f"blk.{{i}}.{parts[2]}")) is None:
        return name
    return known.replace("{i}", parts[1]) + f".{parts[3]}"


_ARCHITECTURES: dict[str, Callable[[_Metadata], dict[str, Any]]] = {"llama": _llama_config}
"""general.architecture -> what config.json would say."""
