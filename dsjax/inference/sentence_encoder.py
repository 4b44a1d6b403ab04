"""The files of sentence-transformers beside a model: how the features of a text's tokens become its vector.

    modules.json                          the modules in order: the model, pooling, perhaps a dense layer, normalisation
    1_Pooling/config.json                 which features are pooled
    2_Dense/config.json, model.safetensors
    sentence_bert_config.json             tokens of a text that count, lower case
    config_sentence_transformers.json     a prompt that is put before each text

A folder without them is pooled by the mean, as sentence-transformers does it, too.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dsjax.checkpoint.finite import finite
from dsjax.checkpoint.manifest import read_json
from dsjax.checkpoint.safetensors_file import read_header, read_tensor
from dsjax.checkpoint.settings import Settings, shown
from dsjax.layers.pooling import Pooling
from dsjax.observe.untrusted import parse_json

Vectors = Float32[np.ndarray, "N D"]

_POOLINGS: dict[str, Pooling] = {  # in the order in which several are put side by side
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
}


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """Steps before and after the model.

    Attributes:
        poolings: of the features, whose results are put side by side.
        steps: what is done with the vectors then, in order.
        prompt: put before each text.
        pools_prompt: whether the prompt's tokens are pooled, too.
        lower: whether texts are turned to lower case.
        max_length: tokens of a text that count; 0 where the files do not say.
    """

    poolings: tuple[Pooling, ...] = ("mean",)
    steps: tuple[Callable[[Vectors], Vectors], ...] = ()
    prompt: str = ""
    pools_prompt: bool = True
    lower: bool = False
    max_length: int = 0


def read_sentence_encoder(folder: Path) -> SentenceEncoder:
    """The files in a model's folder.

    Raises:
        ValueError: a module or a setting that would change the vectors and is not implemented, or a damaged file.
    """
    encoder = SentenceEncoder()
    if not folder.is_dir():
        return encoder
    for kind, place in _modules(folder):
        if kind == "Pooling":
            encoder = dataclasses.replace(encoder, **_pooling(place / "config.json"))
        elif kind == "Dense":
            encoder = dataclasses.replace(encoder, steps=(*encoder.steps, _dense(place)))
        elif kind == "Normalize":
            encoder = dataclasses.replace(encoder, steps=(*encoder.steps, normalised))
        elif kind not in ("Transformer", "Dropout") or (kind == "Transformer" and place != folder):
            raise ValueError(
                f"{folder / 'modules.json'}: a module {kind} in {place} is not implemented; known are Transformer (in "
                "the folder itself), Pooling, Dense and Normalize"
            )
    return dataclasses.replace(encoder, **_reading(folder), **_prompt(folder))


def normalised(vectors: Vectors) -> Vectors:
    """Vectors of length 1.

    Example:
        >>> normalised(np.array([[3.0, 4.0]], np.float32)).round(2).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """The last name of each module's class, and its folder; of a folder without modules.json what it would say."""
    file = folder / "modules.json"
    if not file.is_file():
        return [("Pooling", folder / "1_Pooling")] if (folder / "1_Pooling" / "config.json").is_file() else []
    try:
        modules = parse_json(file.read_bytes(), str(file))
        return [(str(m["type"]).rpartition(".")[2], folder / str(m["path"])) for m in modules]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a list of modules, each with type and path: {type(error).__name__} {error}"
        ) from error


def _pooling(file: Path) -> dict[str, Any]:
    settings = Settings(read_json(file), str(file), free=dict.fromkeys(_SIZES, "a size, which the tensors say"))
    chosen = [ours for theirs, ours in _POOLINGS.items() if settings.take(f"pooling_mode_{theirs}", ours == "mean")]
    named = settings.take("pooling_mode", None)
    if named is not None:
        chosen = [str(named).lower()]
    includes = settings.take("include_prompt", True)
    settings.check()
    if not chosen or not set(chosen) <= set(_POOLINGS.values()):
        raise ValueError(f"{file}: no pooling that is known: {shown(named)}; known are {', '.join(_POOLINGS.values())}")
    return {"poolings": tuple(chosen), "pools_prompt": includes is not False}


_SIZES = ("word_embedding_dimension", "embedding_dimension")


def _dense(folder: Path) -> Callable[[Vectors], Vectors]:
    """A layer act(x W^T + b)."""
    file = folder / "config.json"
    settings = Settings(read_json(file), str(file), free=dict.fromkeys(("in_features", "out_features"), "a size"))
    name = settings.take("activation_function", "torch.nn.modules.activation.Tanh")
    has_bias = settings.take("bias", True)
    settings.check()
    activation = _ACTIVATIONS.get(str(name).rpartition(".")[2])
    if activation is None or not str(name).startswith("torch.nn."):
        raise ValueError(f"{file}: activation_function {shown(name)} is not known; known are {', '.join(_ACTIVATIONS)}")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder}: no model.safetensors (a pickle is not read); save the model with a newer version")
    tensors = {
        key: finite(read_tensor(info).astype(np.float32), key, where=weights)
        for key, info in read_header(weights).items()
    }
    wanted = {"linear.weight", "linear.bias"} if has_bias else {"linear.weight"}
    if tensors.keys() != wanted or tensors["linear.weight"].ndim != 2:
        raise ValueError(f"{weights}: expected {', '.join(sorted(wanted))}; there are {', '.join(sorted(tensors))}")
    weight, bias = tensors["linear.weight"], tensors.get("linear.bias", np.float32(0))

    def apply(vectors: Vectors) -> Float32[np.ndarray, "N _"]:
        if vectors.shape[1] != weight.shape[1]:
            raise ValueError(f"{weights}: takes vectors of {weight.shape[1]}, but they have {vectors.shape[1]}")
        return activation(vectors @ weight.T + bias)

    return apply


def _reading(folder: Path) -> dict[str, Any]:
    """Settings of reading texts, from sentence_bert_config.json."""
    file = folder / "sentence_bert_config.json"
    if not file.is_file():
        return {"max_length": _length_of_tokenizer(folder)}
    settings = Settings(read_json(file), str(file), free={"model_args": "of loading", "tokenizer_args": "of loading"})
    length, lower = settings.take("max_seq_length", None), settings.take("do_lower_case", False)
    settings.check()
    if length is not None and (not isinstance(length, int) or length < 1):
        raise ValueError(f"{file}: max_seq_length must be an integer above 0; got {length!r}")
    return {"max_length": length or _length_of_tokenizer(folder), "lower": bool(lower)}


def _length_of_tokenizer(folder: Path) -> int:
    """The length that sentence-transformers takes when its own files give none; 0 where there is none or no limit."""
    file = folder / "tokenizer_config.json"
    if not (folder / "modules.json").is_file() or not file.is_file():
        return 0
    length = read_json(file).get("model_max_length")
    return length if isinstance(length, int) and 0 < length < 1e9 else 0


def _prompt(folder: Path) -> dict[str, Any]:
    """Prompts put before texts, from config_sentence_transformers.json."""
    file = folder / "config_sentence_transformers.json"
    if not file.is_file():
        return {}
    free = {"__version__": "a version", "similarity_fn_name": "what is printed is the cosine"}
    fixed: dict[str, tuple[Any, ...]] = {"model_type": ("SentenceTransformer", None), "truncate_dim": (None,)}
    settings = Settings(read_json(file), str(file), free=free, fixed=fixed)
    prompts, name = settings.take("prompts", None) or {}, settings.take("default_prompt_name", None)
    settings.check()
    if name is None:
        return {}
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise ValueError(f"{file}: default_prompt_name is {shown(name)}, but prompts has no text of that name")
    return {"prompt": prompts[name]}
