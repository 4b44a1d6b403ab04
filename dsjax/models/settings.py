"""How another program's settings are read: each is used, or known to change no number, or refused by name.

A key that is passed over may be the one that decides what a model computes, and nobody would see it: the numbers are
wrong, but they are numbers. So a file of settings (config.json, adapter_config.json, the metadata of a GGUF file) is
read through `Settings`, which knows what was asked for; the rest must stand in one of two lists, or is named in a
warning.
"""

import warnings
from collections.abc import Mapping
from typing import Any


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class UnknownSettings(UserWarning):
    """Keys that nobody here knows were passed over."""


class Settings:
    """The settings in one file.

    Example:
        >>> free, fixed = {"use_cache": "speed"}, {"scale": (True, None)}
        >>> settings = Settings({"n_layer": 2, "use_cache": False}, "config.json", free=free, fixed=fixed)
        >>> settings.take("num_layers", alias="n_layer"), settings.take("eps", 1e-5)
        (2, 1e-05)
        >>> settings.check()
        >>> Settings({"scale": False}, "config.json", fixed=fixed).check()
        Traceback (most recent call last):
        ValueError: config.json: scale is False, which is not implemented; it must be True or left out
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str,
        *,
        free: Mapping[str, str] | None = None,
        fixed: Mapping[str, tuple[Any, ...]] | None = None,
    ) -> None:
        """Look at `values`.

        Args:
            values: what the file says.
            source: what it is called in messages.
            free: keys that change no number, each with the reason.
            fixed: keys that do, each with the values that are computed, the first for a message; None among them
                means that null is one. A key that is absent has the first or means null.
        """
        self.values, self.source = values, source
        self._free, self._fixed, self._used = free or {}, fixed or {}, set[str]()

    def take(self, key: str, default: Any = ..., *, alias: str = "") -> Any:
        """A value that is used.

        Args:
            key: its name.
            default: where it is absent.
            alias: another name that it may have.

        Raises:
            KeyError: it is absent and has no default.
            ValueError: it is there under both names, with two values.
        """
        self._used |= {key, alias}
        if alias and alias in self.values:
            if key in self.values and self.values[key] != self.values[alias]:
                raise ValueError(
                    f"{self.source}: {key} is {self.values[key]!r} and {alias} is {self.values[alias]!r}, but the two "
                    "are one setting; remove one of them"
                )
            return self.values[alias]
        return self.values[key] if default is ... else self.values.get(key, default)

    def check(self) -> None:
        """Refuse and name what is left; to be called when all is taken.

        Raises:
            ValueError: keys at values that are not implemented; all are listed.
        """
        wrong = [
            f"{key} is {shown(self.values[key])}, which is not implemented; it must be {shown(allowed[0])} or left out"
            for key, allowed in self._fixed.items()
            if key in self.values and self.values[key] not in allowed
        ]
        if wrong:
            raise ValueError(f"{self.source}: " + "; ".join(wrong))
        unknown = sorted(self.values.keys() - self._used - self._free.keys() - self._fixed.keys())
        if unknown:
            warnings.warn(
                f"{self.source}: unknown settings, which are passed over: {', '.join(unknown)}; if one of them changes "
                "what the model computes, the numbers here are not that model's",
                UnknownSettings,
                stacklevel=2,
            )


_TRAINING = "of training"
_GENERATION = "how transformers writes text unless it is told; `dsjax generate` has options of its own"
_OUTPUT = "which results a call of transformers returns"
_NAMES = "a name or a version"
_TOKENS = "which tokens frame a text: read with the tokenizer"
_MEMORY = "how it is computed, not what"
_TENSORFLOW = "of TensorFlow"

FREE = {
    **dict.fromkeys(("architectures", "model_type"), "used: they choose the class and the family"),
    **dict.fromkeys(("_name_or_path", "name_or_path", "transformers_version", "finetuning_task"), _NAMES),
    **dict.fromkeys(("tokenizer_class", "auto_map", "license", "transformers.js_config", "language"), _NAMES),
    **dict.fromkeys(("_commit_hash", "is_llama_config"), _NAMES),
    **dict.fromkeys(("torch_dtype", "dtype"), "of the stored weights: parameters here have a dtype of their own"),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict", "output_past"), _OUTPUT),
    **dict.fromkeys(("keys_to_ignore_at_inference", "output_scores", "return_dict_in_generate"), _OUTPUT),
    **dict.fromkeys(("use_cache", "chunk_size_feed_forward", "gradient_checkpointing", "torchscript"), _MEMORY),
    **dict.fromkeys(("_attn_implementation", "attn_implementation", "_attn_implementation_autoset"), _MEMORY),
    **dict.fromkeys(("_flash_attn_2_enabled", "_use_flash_attention_2", "_experts_implementation"), _MEMORY),
    **dict.fromkeys(("use_bfloat16", "tf_legacy_loss"), _TENSORFLOW),
    **dict.fromkeys(("id2label", "label2id", "num_labels"), "used: the classes and their names"),
    "problem_type": "used: refused for a classifier whose classes are not one of several",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id"), _TOKENS),
    **dict.fromkeys(("cls_token_id", "mask_token_id", "decoder_start_token_id", "prefix"), _TOKENS),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping"), _GENERATION),
    **dict.fromkeys(("num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k"), _GENERATION),
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty", "length_penalty"), _GENERATION),
    "no_repeat_ngram_size": _GENERATION,
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"), _GENERATION),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"), _GENERATION),
    **dict.fromkeys(("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"), _GENERATION),
    "task_specific_params": _GENERATION,
}  # fmt: skip
"""Keys of any config.json that change no number of a model, each with the reason."""

FIXED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"), (False, None)),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    **dict.fromkeys(("quantization_config", "compression_config"), (None, {})),
    "partial_rotary_factor": (1.0, None),
}
"""Keys of any config.json that are refused unless they have one of these values."""
