"""Models from and to files: Hugging Face folders (config.json, safetensors) and, read only, GGUF files.

Tensors are read one at a time, each straight onto its devices: the host never holds more than one beside its share of
the model.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dsjax.checkpoint.finite import finite
from dsjax.checkpoint.gguf_file import is_gguf
from dsjax.checkpoint.safetensors_folder import open_folder, write_folder
from dsjax.checkpoint.tensor_map import LazyTree, TensorSource, read_tree, write_tree
from dsjax.mesh.tree import Tree
from dsjax.models.config import AnyModelConfig, ModelConfig, PretrainedConfig
from dsjax.models.families.build import abstract, initial_params, segments_of
from dsjax.models.families.family import folders_of
from dsjax.models.formats.config_json import config_from_hf, config_to_hf
from dsjax.models.formats.gguf import open_gguf_weights
from dsjax.models.naming import from_named, leaf_names, to_named
from dsjax.models.transformer import Transformer


def open_weights(path: str | Path) -> TensorSource:
    """The tensors of a Hugging Face folder or of a GGUF file, which is known by its first bytes.

    Raises:
        ValueError: neither, a damaged one, or a GGUF file of an architecture that is not known.
    """
    return open_gguf_weights(path) if is_gguf(path) else open_folder(path)


def load_pretrained(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    *,
    segments: tuple[int, ...] | None = None,
) -> Transformer:
    """A model from a Hugging Face folder or a GGUF file, on the first device.

    Args:
        path: the folder; tensor names may carry or lack the prefix of their family (`transformer.`, `model.`, `bert.`).
        dtype: of the parameters and of the computation; logits are float32 in any case.
        segments: lengths of segments of layers, whose parameters are those of a stack. None keeps every layer apart:
            compiling takes longer, but no step of generating has to slice a layer out of its stack.

    Returns:
        A model: `model(input_ids, attention_mask=None)` gives logits [B, T, V] float32 (classes or vectors, if it was
        made for these), `model.generate(input_ids, attention_mask=None, max_new_tokens=...)` gives [B, T + N],
        greedily.

    Raises:
        ValueError: an unknown family, tensors that are missing, extra or misshapen (all are listed), settings or
            tensors that would change what is computed and are not implemented, or a weight that is no finite number.
    """
    weights = open_weights(path)
    config = config_from_hf(weights.config)
    segments = (1,) * config.num_layers if segments is None else segments
    config = dataclasses.replace(config, compute_dtype=dtype, segments=segments)
    graph = nnx.graphdef(abstract(config))
    return nnx.merge(graph, load_params(weights, config, dtype=dtype))


def load_params(
    weights: TensorSource,
    config: ModelConfig,
    *,
    shardings: Tree | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int | None = None,
) -> Tree:
    """Parameters as nested dicts, each tensor read onto its own devices.

    Args:
        weights: from `open_weights`.
        config: the model they are for; its task may be another than that of the weights.
        shardings: tree of NamedShardings; None puts all on the first device.
        dtype: of the parameters.
        seed: draw what the weights lack of the config's task (a new classifier); None makes that an error.

    Raises:
        ValueError: tensors that are missing, extra or misshapen (all are listed); one that is passed over and says
            something else than what is used; one that is not finite.
    """
    shapes = nnx.to_pure_dict(nnx.split(abstract(config), nnx.Param)[1])
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    stored = _match(weights, config, shapes)
    stored.check_unread()
    absent = _absent(stored, config, shapes)
    if absent and seed is None:
        raise ValueError(
            f"{weights.path} was not made for the task {config.task}: it lacks {', '.join(sorted(absent))}; "
            "fine-tune it first, or load it for its own task"
        )
    fresh = _drawn(config, absent, shardings, seed) if absent and seed is not None else {}
    place = {
        name: _one_layer(sharding, is_stack)
        for (layers, is_stack), sharding in zip(
            leaf_names(shapes, segments_of(config)), jax.tree.leaves(shardings), strict=True
        )
        for name in layers
    }

    def take(name: str) -> jax.Array:
        if name in fresh:
            return fresh.pop(name).astype(dtype)
        path = tuple(name.split("."))
        array = finite(np.asarray(stored[path], jnp.dtype(dtype)), stored.found[path][0], where=weights.path)
        return jax.make_array_from_callback(array.shape, place[name], lambda index: array[index])

    targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=s), shapes, shardings)
    return from_named(take, targets, segments_of(config))


def lacking(config: ModelConfig) -> set[str]:
    """Names of the tensors that the model needs and the weights at `config.init_from` lack: a new head's."""
    shapes = nnx.to_pure_dict(nnx.split(abstract(config), nnx.Param)[1])
    return _absent(_match(open_weights(config.init_from), config, shapes), config, shapes)


def _absent(stored: LazyTree, config: ModelConfig, shapes: Tree) -> set[str]:
    names = [name for layers, _ in leaf_names(shapes, segments_of(config)) for name in layers]
    return {name for name in names if tuple(name.split(".")) not in stored}


def weights_hash(path: str | Path) -> str:
    """SHA-256 of the files that hold a model's weights, in the order of their names: 0.3 s for 500 MB."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _match(weights: TensorSource, config: ModelConfig, shapes: Tree) -> LazyTree:
    """The model's tensors in the file, by our path; optional ones may be absent."""
    folders = folders_of(config)
    expected = {}
    for (names, is_stack), leaf in zip(leaf_names(shapes, segments_of(config)), jax.tree.leaves(shapes), strict=True):
        expected.update({tuple(name.split(".")): leaf.shape[is_stack:] for name in names})
    return read_tree(
        weights,
        folders.entries(config),
        expected,
        num_layers=config.num_layers,
        prefixes=("", folders.prefix),
        unread=folders.unread(config),
    )


def _drawn(config: ModelConfig, names: set[str], shardings: Tree, seed: int) -> dict[str, jax.Array]:
    """Some of a fresh model's tensors, by name."""
    paths = {tuple(name.split(".")) for name in names}
    pick = lambda tree: {".".join(path): _at(tree, path) for path in paths}
    draw = jax.jit(lambda key: pick(initial_params(config, key)), out_shardings=pick(shardings))
    return draw(jax.random.key(seed))


def _at(tree: Tree, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _one_layer(sharding: jax.sharding.Sharding, is_stack: bool) -> jax.sharding.Sharding:
    if not is_stack or not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def resolve(config: AnyModelConfig) -> ModelConfig:
    """The family's own config for `kind: pretrained`; any other as it is.

    Raises:
        ValueError: the weights are not readable, of an unknown family, or were made with rates of dropout that a model
            cannot have here.
    """
    if not isinstance(config, PretrainedConfig):
        return config
    if not config.init_from:
        raise ValueError("model.kind = pretrained needs model.init_from: a Hugging Face folder or a GGUF file")
    weights = open_weights(config.init_from)
    stored = config_from_hf(weights.config)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != "kind"}
    changes = {name: value for name, value in given.items() if value is not None}
    if config.task == "as_stored":
        changes["task"] = stored.task
    if config.task in ("as_stored", stored.task):
        changes["num_labels"] = stored.num_labels
    config = dataclasses.replace(stored, **changes)
    if "dropout" not in changes:
        check_dropout(weights, config)
    return config


def check_dropout(weights: TensorSource, config: ModelConfig) -> None:
    """Refuse to train with the weights' own rates of dropout where they differ and a model has one here.

    Raises:
        ValueError: names the keys of config.json, and says what to set.
    """
    defaults = folders_of(config).dropouts(config.task)
    rates = {key: weights.config.get(key, default) for key, default in defaults.items()}
    rates = {key: rate for key, rate in rates.items() if rate is not None}
    if len(set(rates.values())) > 1:
        raise ValueError(
            f"{weights.path}: config.json has {' and '.join(f'{key} {rate}' for key, rate in rates.items())}, but one "
            "rate holds for all of them here; set model.dropout to it"
        )


def initial_weights(config: ModelConfig, *, shardings: Tree, seed: int) -> Tree:
    """Float32 parameters from `config.init_from`, each tensor read onto its own devices; a head it lacks is drawn.

    Args:
        config: the model; its task and what is only for training may differ from the weights' own.
        shardings: tree of NamedShardings.
        seed: of a new head.

    Raises:
        ValueError: the weights are of another family or were made with other settings, or tensors are missing, extra
            or misshapen; all are listed.
    """
    weights = open_weights(config.init_from)
    stored = config_from_hf(weights.config)
    if stored.kind != config.kind:
        raise ValueError(
            f"{weights.path} holds a {stored.kind} model, but model.kind is {config.kind}; kind: pretrained takes "
            "what the weights say"
        )
    theirs, ours = _architecture(stored), _architecture(config)
    # A tensor's shape does not show these: with another rope_base the same weights are silently another model.
    other = [f"model.{name} is {ours[name]}, theirs {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if other:
        raise ValueError(
            f"{weights.path} was made with other settings:\n  " + "\n  ".join(other) + "\n"
            "give these, or kind: pretrained, which takes what the weights say"
        )
    return load_params(weights, config, shardings=shardings, seed=seed)


_FREE = (
    "task",
    "num_labels",
    "init_from",
    "init_std",
    "scale_residual_init",
    "dropout",
    "attention_dropout",
    "compute_dtype",
    "remat",
    "segments",
)


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """Settings that decide the numbers of a model, with defaults filled in."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: config.filled_in.get(name, value) for name, value in values.items() if name not in _FREE}


def save_pretrained(model: Transformer, path: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """Write a model as a Hugging Face folder, which must not exist or be empty. Inverse of `load_pretrained`."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    write_params(params, model.config, path, max_shard_bytes=max_shard_bytes)


def write_params(
    params: Tree,
    config: ModelConfig,
    path: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """The same for parameters as nested dicts; `extra` goes into config.json."""
    folders = folders_of(config)
    flat = {tuple(name.split(".")): np.asarray(array) for name, array in to_named(params, segments_of(config)).items()}
    prefix = folders.prefix_for(config.task)
    tensors = write_tree(flat, folders.entries(config), num_layers=config.num_layers, prefix=prefix)
    hf = {**config_to_hf(config), **(extra or {})}
    write_folder(path, tensors, config=hf, max_shard_bytes=max_shard_bytes)
