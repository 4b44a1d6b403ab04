"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model: h = W x + (alpha / r) B A x with W frozen.

Ours is x W + (alpha / r) (x A) B: A [D, r] is drawn, B [r, ...] begins at 0, so that the first step starts from the
base model. Each takes the names of W's dimensions, so that tensor parallelism and ZeRO treat it as they treat W.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive
from dsjax.models.config import LoRAConfig
from dsjax.models.naming import leaf_names
from dsjax.models.transformer import Transformer

Tree = Any

A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What LoRA has learned.

    Attributes:
        config: rank and alpha.
        tensors: by our names: "layers.3.attention.q.lora_a" [D, r] and lora_b [r, ...], float32, and whole tensors that
            were trained beside them ("classifier.kernel").
        scales: what the part of a module ("layers.3.attention.q") is multiplied by, where it is not alpha / rank.
    """

    config: LoRAConfig
    tensors: Mapping[str, np.ndarray]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)


def with_adapters(model: Transformer, lora: LoRAConfig) -> Transformer:
    """The model itself, in which every Linear whose kernel matches `lora.targets` now has an A and a B.

    Args:
        model: abstract (from `dsjax.models.families.registry.abstract`); the new parameters are abstract, too.
        lora: the adapters.

    Raises:
        ValueError: nothing matches; lists what there is.

    Example:
        >>> from dsjax.models.config import GPT2Config
        >>> from dsjax.models.families.registry import abstract
        >>> model = abstract(GPT2Config(vocab_size=11, num_layers=2, model_dim=8, num_heads=2))
        >>> with_adapters(model, LoRAConfig(rank=4)).segments[0].attention.qkv.lora_b.shape
        (1, 4, 3, 8)
    """
    linears: dict[str, list[Linear]] = {}
    for path, module in nnx.iter_modules(model):
        name = _kernel_name(path)
        if isinstance(module, Linear) and name != "classifier.kernel":  # that one is trained itself
            linears.setdefault(name, []).append(module)
    chosen = [name for name in linears if re.fullmatch(lora.targets, name)]
    if not chosen:
        raise ValueError(
            f"lora.targets = {lora.targets!r} matches no kernel (the whole name must match); there are: "
            f"{', '.join(sorted(linears))}"
        )
    for module in (module for name in chosen for module in linears[name]):
        axes = module.kernel.get_metadata("axes")
        layers = module.kernel.shape[: module.kernel.ndim - len(axes)]  # of a stack
        dim, *out = module.kernel.shape[len(layers) :]
        make = lambda shape, names: nnx.data(nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=names))
        module.lora_a = make((*layers, dim, lora.rank), (axes[0], "rank"))
        module.lora_b = make((*layers, lora.rank, *out), ("rank", *axes[1:]))
        module.lora_scale = lora.scale
    return model


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of an A or a B."""
    return name.endswith((f".{A}", f".{B}"))


def initial_adapters(shapes: Tree, runs: tuple[int, ...], key: jax.Array) -> Tree:
    """A drawn from U(-1/sqrt(D), 1/sqrt(D)) as PEFT does, B of zeros; to be traced under `jax.jit`.

    Args:
        shapes: tree of ShapeDtypeStructs of adapters only.
        runs: lengths of the stacks; how the layers are stacked does not change what is drawn.
        key: of the draws.
    """
    named = list(zip(leaf_names(shapes, runs), jax.tree.leaves(shapes), strict=True))
    keys: dict[tuple[int, ...], list[jax.Array]] = {}
    for (names, is_stack), leaf in named:
        if names[0].endswith(A):
            keys.setdefault(leaf.shape[is_stack:], []).append(_keys(names, is_stack, key))
    # One draw for all factors of a shape: drawn one by one, each would take XLA a second to compile.
    drawn = {shape: iter(_split(_uniform(jnp.concatenate(parts), shape), parts)) for shape, parts in keys.items()}
    leaves = []
    for (names, is_stack), leaf in named:
        if names[0].endswith(B):
            leaves.append(jnp.zeros(leaf.shape, leaf.dtype))
        else:
            leaves.append(next(drawn[leaf.shape[is_stack:]]).reshape(leaf.shape))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _keys(names: list[str], is_stack: bool, key: jax.Array) -> jax.Array:
    """Keys [n] of a stack's layers, from their numbers and from what is stacked; n = 1 outside the layers."""
    parts = [name.split(".", 2) for name in names]
    numbers = [int(part[1]) if is_stack else 0 for part in parts]
    of_kernel = derive(key, parts[0][2] if is_stack else names[0])
    return jax.vmap(lambda number: derive(of_kernel, number))(jnp.array(numbers))


def _uniform(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound))(keys)


def _split(drawn: jax.Array, parts: list[jax.Array]) -> list[jax.Array]:
    ends = np.cumsum([len(part) for part in parts])
    return [drawn[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]


def merged(params: Tree, adapter: Adapter, runs: tuple[int, ...]) -> Tree:
    """Parameters W + (alpha / r) A B in new buffers, and whole tensors in their place; `params` stay as they are.

    The way back is to keep `params`: subtracting A B again would not give the same bits.

    Raises:
        ValueError: the adapter is for other tensors, or for tensors of another shape.
    """
    used, leaves = set(), []
    for (names, is_stack), leaf in zip(leaf_names(params, runs), jax.tree.leaves(params), strict=True):
        shape = leaf.shape[is_stack:]
        changes = [_change(name, shape, adapter, used) for name in names]
        if any(change is not None for change in changes):
            parts = [leaf[i] if is_stack else leaf for i in range(len(names))]
            parts = [
                part if change is None else (part + change.delta if change.add else jnp.asarray(change.delta))
                for part, change in zip(parts, changes, strict=True)
            ]
            leaf = jax.device_put((jnp.stack(parts) if is_stack else parts[0]).astype(leaf.dtype), leaf.sharding)
        leaves.append(leaf)
    if other := sorted(adapter.tensors.keys() - used):
        raise ValueError(f"the adapter is not for this model, which lacks: {', '.join(other)}")
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


@dataclasses.dataclass(frozen=True)
class _Change:
    delta: np.ndarray
    add: bool


def _change(name: str, shape: tuple[int, ...], adapter: Adapter, used: set[str]) -> _Change | None:
    """What the adapter does to one tensor."""
    stem = name.removesuffix("kernel")
    if name in adapter.tensors:
        used.add(name)
        change = _Change(adapter.tensors[name], add=False)
    elif name.endswith(".kernel") and stem + A in adapter.tensors and stem + B in adapter.tensors:
        used |= {stem + A, stem + B}
        product = np.tensordot(adapter.tensors[stem + A], adapter.tensors[stem + B], axes=1)
        scale = adapter.scales.get(stem.removesuffix("."), adapter.config.scale)
        change = _Change(np.float32(scale) * product, add=True)
    else:
        return None
    if change.delta.shape != shape:
        raise ValueError(f"the adapter's part for {name} has the shape {list(change.delta.shape)}, not {list(shape)}")
    return change


def _kernel_name(path: tuple[Any, ...]) -> str:
    """'attention.q.kernel' of ('segments', 0, 'attention', 'q')."""
    parts = path[2:] if path[:1] == ("segments",) else path
    return ".".join(map(str, (*parts, "kernel")))
