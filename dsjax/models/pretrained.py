"""Models from and to Hugging Face folders (config.json, safetensors)."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.checkpoint.safetensors_folder import open_folder, read_tree, write_folder, write_tree
from dsjax.models.config import ModelConfig
from dsjax.models.decoder import Decoder
from dsjax.models.families import FAMILIES, abstract, config_from_hf
from dsjax.models.naming import from_flat, leaf_names, to_named

_PREFIXES = ("", "transformer.")


def load_pretrained(path: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Decoder:
    """A model from a Hugging Face folder.

    Args:
        path: the folder; tensor names may carry or lack the prefix `transformer.`.
        dtype: of the parameters and of the computation; logits are float32 in any case.

    Returns:
        A model: `model(input_ids, attention_mask=None)` gives logits [B, T, V] float32,
        `model.generate(input_ids, attention_mask=None, max_new_tokens=...)` gives [B, T + N], greedily.

    Raises:
        ValueError: an unknown family, or tensors that are missing, extra or misshapen (all are listed).
    """
    folder = open_folder(path)
    config = dataclasses.replace(config_from_hf(folder.config), compute_dtype=dtype)
    graph, state = nnx.split(abstract(config), nnx.Param)
    shapes = nnx.to_pure_dict(state)
    family = FAMILIES[config.kind]
    expected = {}
    for (names, is_stack), leaf in zip(leaf_names(shapes, config.layer_runs), jax.tree.leaves(shapes), strict=True):
        expected.update({tuple(name.split(".")): leaf.shape[is_stack:] for name in names})
    arrays = read_tree(
        folder,
        family.entries(config),
        expected,
        num_layers=config.num_layers,
        prefixes=_PREFIXES,
        ignore=family.IGNORED,
    )
    flat = {".".join(name): np.asarray(array, jnp.dtype(dtype)) for name, array in arrays.items()}
    return nnx.merge(graph, jax.tree.map(jnp.asarray, from_flat(flat, shapes, config.layer_runs)))


def save_pretrained(model: Decoder, path: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """Write a model as a Hugging Face folder, which must not exist or be empty. Inverse of `load_pretrained`."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    write_params(params, model.config, path, max_shard_bytes=max_shard_bytes)


def write_params(params, config: ModelConfig, path: str | Path, *, max_shard_bytes: float = 5e9) -> None:
    """The same for parameters as nested dicts."""
    family = FAMILIES[config.kind]
    flat = {tuple(name.split(".")): np.asarray(array) for name, array in to_named(params, config.layer_runs).items()}
    tensors = write_tree(flat, family.entries(config), num_layers=config.num_layers, prefix=family.PREFIX)
    write_folder(path, tensors, config=family.to_hf(config), max_shard_bytes=max_shard_bytes)
