"""The families that there are: a config's kind -> its file."""

import dataclasses
import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
from flax import nnx

from dsjax.models.config import ModelConfig
from dsjax.models.families import bert, bloom, gpt2, llama
from dsjax.models.settings import FIXED, FREE, Settings, shown
from dsjax.models.stack import Segments
from dsjax.models.transformer import Transformer

FAMILIES: dict[str, ModuleType] = {"bert": bert, "bloom": bloom, "gpt2": gpt2, "llama": llama}
"""kind (also Hugging Face's model_type) -> module with architecture, entries, unread, dropouts, from_hf, to_hf, PREFIX,
ARCHITECTURES, and of the keys of config.json FREE and FIXED."""


@functools.lru_cache(maxsize=64)
def segments_of(config: ModelConfig) -> Segments:
    """The stack of a model's layers.

    Example:
        >>> from dsjax.models.config import GPT2Config
        >>> [segment.num_layers for segment in segments_of(GPT2Config(num_layers=12))]
        [1, 10, 1]
    """
    return FAMILIES[config.kind].architecture(config).segments(config.segment_lengths)


def create(config: ModelConfig, *, key: jax.Array) -> Transformer:
    """A model with fresh float32 parameters on the default device."""
    params = jax.jit(lambda key: initial_params(config, key))(key)  # one program instead of hundreds of small ones
    return nnx.merge(nnx.graphdef(abstract(config)), params)


def initial_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters as nested dicts; to be traced under `jax.jit`."""
    return nnx.to_pure_dict(nnx.state(_build(config, key), nnx.Param))


def abstract(config: ModelConfig, *, tensor: int = 1) -> Transformer:
    """The model with ShapeDtypeStructs for parameters; nothing is allocated.

    Args:
        config: the model.
        tensor: more than 1 gives the part of it that one of so many devices of this mesh axis computes.
    """
    return nnx.merge(*_abstract_parts(config, tensor))


@functools.lru_cache(maxsize=16)
def _abstract_parts(config: ModelConfig, tensor: int) -> tuple[Any, Any]:
    """Kept, since tracing a deep model takes seconds and whoever loads one asks more than once."""
    return nnx.split(nnx.eval_shape(lambda: _build(config, jax.random.key(0), tensor=tensor)))


def _build(config: ModelConfig, key: jax.Array, *, tensor: int = 1) -> Transformer:
    architecture = FAMILIES[config.kind].architecture(config)
    return Transformer(config, architecture if tensor == 1 else architecture.on_one_device(tensor), key=key)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The model config in a Hugging Face config.json.

    Raises:
        ValueError: an unknown model_type, a key that is missing, a value of the wrong type, or one that would change
            what the model computes and is not implemented.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"config.json: model_type is {kind!r}; known are {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    try:
        name = (hf.get("architectures") or [next(iter(family.ARCHITECTURES))])[0]
        if name not in family.ARCHITECTURES:
            raise ValueError(f"config.json: architectures is {name!r}; known are {', '.join(family.ARCHITECTURES)}")
        source = f"config.json of a {kind} model"
        settings = Settings(hf, source, free=FREE | family.FREE, fixed=FIXED | family.FIXED)
        config = dataclasses.replace(family.from_hf(settings), task=family.ARCHITECTURES[name], num_labels=_classes(hf))
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
    """How many classes there are, as transformers counts: the names say it, else num_labels, else two."""
    names, number = hf.get("id2label"), hf.get("num_labels")
    if names and not isinstance(names, Mapping):
        raise ValueError(f"config.json: id2label must be an object, number -> name; got {shown(names)}")
    if names and number is not None and len(names) != number:
        raise ValueError(f"config.json: num_labels is {number}, but id2label has {len(names)} names; say one number")
    return len(names) if names else 2 if number is None else number


def label_names(hf: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """The names of a classifier's classes in a Hugging Face config.json, by their numbers; LABEL_0 ... without any.

    Example:
        >>> from dsjax.models.config import BertConfig
        >>> label_names({"id2label": {"0": "no", "1": "yes"}}, BertConfig(num_labels=2))
        ('no', 'yes')
    """
    stored = {str(number): str(name) for number, name in (hf.get("id2label") or {}).items()}
    return tuple(stored.get(str(number), f"LABEL_{number}") for number in range(config.num_labels))


def given_label_names(hf: Mapping[str, Any], config: ModelConfig) -> tuple[str, ...]:
    """The names of a model's classes if somebody named all of them, else ().

    Example:
        >>> from dsjax.models.config import BertConfig
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
    family = FAMILIES[config.kind]
    name = next((name for name, task in family.ARCHITECTURES.items() if task == config.task), None)
    if name is None:
        raise ValueError(f"Hugging Face has no class of {config.kind} models for the task {config.task}")
    hf = {**family.to_hf(config), "architectures": [name]}
    if config.task == "classification":
        labels = [f"LABEL_{i}" for i in range(config.num_labels)]
        hf["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf["label2id"] = {label: i for i, label in enumerate(labels)}
    return hf


def is_causal(config: ModelConfig) -> bool:
    """Whether a position of the model sees only those before it.

    Example:
        >>> from dsjax.models.config import BertConfig, GPT2Config
        >>> is_causal(GPT2Config()), is_causal(BertConfig())
        (True, False)
    """
    return FAMILIES[config.kind].architecture(config).causal


def check_divisible(config: ModelConfig, mesh_shape: Mapping[str, int]) -> None:
    """Refuse a mesh whose tensor axis does not divide the model.

    Args:
        config: the model.
        mesh_shape: sizes of the mesh axes.

    Raises:
        ValueError: names every dimension that does not fit, and the nearest sizes of `tensor` that divide all.

    Example:
        >>> from dsjax.models.config import GPT2Config
        >>> check_divisible(GPT2Config(num_heads=12, vocab_size=50304), {"tensor": 4})
    """
    tensor = mesh_shape["tensor"]
    dims = FAMILIES[config.kind].architecture(config).divided_by_tensor
    bad = {name: size for name, size in dims.items() if size % tensor}
    if not bad:
        return
    fitting = [size for size in range(1, 2 * tensor) if not any(dim % size for dim in dims.values())]
    near = sorted(sorted(fitting, key=lambda size: abs(size - tensor))[:3])
    listed = ", ".join(f"model.{name} = {size}" for name, size in bad.items())
    hint = "; a vocab_size rounded up (rows that no token uses) divides more sizes" if "vocab_size" in bad else ""
    raise ValueError(
        f"mesh.tensor = {tensor} does not divide {listed}; the nearest sizes that divide the model are "
        f"{', '.join(map(str, near))}{hint}"
    )


def check_length(config: ModelConfig, sequence_length: int) -> None:
    """Refuse rows that are longer than the model's positions.

    Raises:
        ValueError: says both lengths and what to change.

    Example:
        >>> from dsjax.models.config import BloomConfig
        >>> check_length(BloomConfig(), 1_000_000)
    """
    limit = FAMILIES[config.kind].architecture(config).max_positions
    if limit and sequence_length > limit:
        raise ValueError(
            f"data.sequence_length = {sequence_length} is more than the model's positions, model.max_positions = "
            f"{limit}; shorten the rows or raise max_positions"
        )
