"""config.json of a Hugging Face folder <-> our config, for all families that have such folders."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsjax.checkpoint.settings import Settings, shown
from dsjax.models.config import ModelConfig
from dsjax.models.families.family import family_of, folders_of
from dsjax.models.families.registry import FAMILIES

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


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model config in a Hugging Face config.json.

    Raises:
        ValueError: an unknown model_type, a key that is missing, a value of the wrong type, or one that would change
            what the model computes and is not implemented.
    """
    kind = hf.get("model_type")
    folders = family_of(kind).hugging_face if isinstance(kind, str) and kind in FAMILIES else None
    if folders is None:
        known = (name for name in sorted(FAMILIES) if family_of(name).hugging_face)
        raise ValueError(f"config.json: model_type is {kind!r}; known are {', '.join(known)}")
    try:
        name = (hf.get("architectures") or [next(iter(folders.classes))])[0]
        if name not in folders.classes:
            raise ValueError(f"config.json: architectures is {name!r}; known are {', '.join(folders.classes)}")
        source = f"config.json of a {kind} model"
        settings = Settings(hf, source, free=FREE | folders.free, fixed=FIXED | folders.fixed)
        config = dataclasses.replace(folders.from_hf(settings), task=folders.classes[name], num_labels=_classes(hf))
        settings.check()
        if config.task == "classification" and hf.get("problem_type") not in (None, "single_label_classification"):
            raise ValueError(
                f"{source}: problem_type is {hf['problem_type']!r}; only classifiers of which one class is right are "
                "read (single_label_classification)"
            )
        return config
    except KeyError as missing:
        raise ValueError(f"config.json of a {kind} model lacks the key {missing}") from missing
    except (TypeError, AttributeError, OverflowError) as error:  # lists for numbers, infinity for a size: anything
        raise ValueError(f"config.json of a {kind} model holds a value of the wrong type: {error}") from error


def _classes(hf: Mapping[str, Any]) -> int:
    """The number of classes as transformers counts: by the names, else num_labels, else two."""
    names, number = hf.get("id2label"), hf.get("num_labels")
    if names and not isinstance(names, Mapping):
        raise ValueError(f"config.json: id2label must be an object, number -> name; got {shown(names)}")
    if names and number is not None and len(names) != number:
        raise ValueError(f"config.json: num_labels is {number}, but id2label has {len(names)} names; say one number")
    return len(names) if names else 2 if number is None else number


def label_names(hf: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """The names of a classifier's classes in a Hugging Face config.json, by their numbers; LABEL_0 ... without any.

    Example:
        >>> from dsjax.models.families.bert.config import BertConfig
        >>> label_names({"id2label": {"0": "no", "1": "yes"}}, BertConfig(num_labels=2))
        ('no', 'yes')
    """
    stored = {str(number): str(name) for number, name in (hf.get("id2label") or {}).items()}
    return tuple(stored.get(str(number), f"LABEL_{number}") for number in range(config.num_labels))


def given_label_names(hf: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """The names of a model's classes if somebody named all of them, else ().

    Example:
        >>> from dsjax.models.families.bert.config import BertConfig
        >>> given_label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, BertConfig())
        ()
    """
    names = label_names(hf, config)
    whole = config.task == "classification" and len(hf.get("id2label") or {}) == len(set(names)) == config.num_labels
    return names if whole and not any(name == f"LABEL_{number}" for number, name in enumerate(names)) else ()


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
        ValueError: a shape that the family does not have in Hugging Face folders.
    """
    folders = folders_of(config)
    name = next((name for name, task in folders.classes.items() if task == config.task), None)
    if name is None:
        raise ValueError(f"Hugging Face has no class of {config.kind} models for the task {config.task}")
    hf = {**folders.to_hf(config), "architectures": [name]}
    if config.task == "classification":
        labels = [f"LABEL_{i}" for i in range(config.num_labels)]
        hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf["label2id"] = {label: i for i, label in enumerate(labels)}
    return hf
