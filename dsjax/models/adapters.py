"""The weights of a model by name: stored otherwise, with low-rank adapters (LoRA, arXiv 2106.09685), or merged.

LoRA is h = W x + (alpha / r) B A x with W frozen. Ours is x W + (alpha / r) (x A) B (`LowRank` of layers/weight.py):
A [D, r] is drawn, B [r, ...] begins at 0, so that the first step starts from the base model.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.layers.embedding import Embedding
from dsjax.layers.linear import Linear
from dsjax.layers.parameter import derive
from dsjax.layers.weight import A, B, LowRank, Weight, with_product
from dsjax.mesh.tree import Tree
from dsjax.models.config import LoRAConfig
from dsjax.models.naming import leaf_names
from dsjax.models.stack import Segments
from dsjax.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Low-rank matrices that were trained.

    Attributes:
        config: rank and alpha.
        tensors: by our names: "layers.3.attention.q.lora_a" [D, r] and lora_b [r, ...], float32, and whole tensors that
            were trained beside them ("classifier.kernel").
        scales: what the part of a module ("layers.3.attention.q") is multiplied by, where it is not alpha / rank.
    """

    config: LoRAConfig
    tensors: Mapping[str, np.ndarray]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)


def with_weights(model: Transformer, chosen: Callable[[str], bool], make: Callable[[Weight], Weight]) -> Transformer:
    """The model itself, with some of its weights stored otherwise.

    Args:
        model: abstract or real.
        chosen: sees names such as "attention.q.kernel" (that of all layers) and "embed.table".
        make: a weight -> the one that takes its place.

    Example:
        >>> from dsjax.models.families.gpt2.config import GPT2Config
        >>> from dsjax.models.families.build import abstract
        >>> model = abstract(GPT2Config(vocab_size=11, num_layers=2, model_dim=8, num_heads=2))
        >>> adapted = with_weights(model, lambda name: name == "embed.table", partial(LowRank.on, rank=2, scale=1.0))
        >>> adapted.embed.table.lora_a.shape
        (11, 2)
    """
    for name, owner in list(_owners(model)):
        if chosen(name):
            if isinstance(owner, Linear):
                owner.kernel = make(owner.kernel)
            else:
                owner.table = make(owner.table)
    return model


def _owners(model: nnx.Module) -> Iterator[tuple[str, Linear | Embedding]]:
    """Names of weights, without the numbers of layers, and the modules that hold them."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear | Embedding):
            last = "kernel" if isinstance(module, Linear) else "table"
            yield ".".join([part for part in path if isinstance(part, str) and part != "segments"] + [last]), module


def with_adapters(model: Transformer, lora: LoRAConfig) -> Transformer:
    """The model itself, in which every kernel that matches `lora.targets` now has an A and a B.

    Args:
        model: abstract (from `dsjax.models.families.build.abstract`); the new parameters are abstract, too.
        lora: the adapters.

    Raises:
        ValueError: nothing matches; lists what there is.

    Example:
        >>> from dsjax.models.families.gpt2.config import GPT2Config
        >>> from dsjax.models.families.build import abstract
        >>> model = abstract(GPT2Config(vocab_size=11, num_layers=2, model_dim=8, num_heads=2))
        >>> with_adapters(model, LoRAConfig(rank=4)).segments[0][0].attention.qkv.kernel.lora_b.shape
        (1, 4, 3, 8)
    """
    # The classifier's is trained itself.
    kernels = {name for name, owner in _owners(model) if isinstance(owner, Linear)} - {"classifier.kernel"}
    chosen = {name for name in kernels if re.fullmatch(lora.targets, name)}
    if not chosen:
        raise ValueError(
            f"lora.targets = {lora.targets!r} matches no kernel (the whole name must match); there are: "
            f"{', '.join(sorted(kernels))}"
        )
    return with_weights(model, chosen.__contains__, partial(LowRank.on, rank=lora.rank, scale=lora.scale))


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of an A or a B."""
    return name.endswith((f".{A}", f".{B}"))


def initial_adapters(shapes: Tree, segments: Segments, key: jax.Array) -> Tree:
    """A drawn from U(-1/sqrt(D), 1/sqrt(D)) as PEFT does, B of zeros; to be traced under `jax.jit`.

    Args:
        shapes: tree of ShapeDtypeStructs of adapters only.
        segments: the stack of the layers; how it is cut does not change what is drawn.
        key: of the draws.
    """
    named = list(zip(leaf_names(shapes, segments), jax.tree.leaves(shapes), strict=True))
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
    """Keys [n] of a stack's layers, from their numbers and the tensor's name; n = 1 outside the layers."""
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


def merged(params: Tree, adapter: Adapter, segments: Segments) -> Tree:
    """Parameters W + (alpha / r) A B in new buffers, and whole tensors in their place; `params` stay as they are.

    The way back is to keep `params`: subtracting A B again would not give the same bits.

    Raises:
        ValueError: the adapter is for other tensors, or for tensors of another shape.
    """
    used, leaves = set(), []
    for (names, is_stack), leaf in zip(leaf_names(params, segments), jax.tree.leaves(params), strict=True):
        parts = [_changed(name, leaf[i] if is_stack else leaf, adapter, used) for i, name in enumerate(names)]
        if any(change is not None for change in parts):
            parts = [leaf[i] if change is None else change for i, change in enumerate(parts)]
            leaf = jax.device_put((jnp.stack(parts) if is_stack else parts[0]).astype(leaf.dtype), leaf.sharding)
        leaves.append(leaf)
    if other := sorted(adapter.tensors.keys() - used):
        raise ValueError(f"the adapter is not for this model, which lacks: {', '.join(other)}")
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _changed(name: str, tensor: jax.Array, adapter: Adapter, used: set[str]) -> jax.Array | None:
    """One tensor as the adapter makes it, None if it leaves it as it is; notes in `used` what it took."""
    stem = name.removesuffix("kernel")
    if name in adapter.tensors:
        used.add(name)
        whole = jnp.asarray(adapter.tensors[name])
        _check_shape(name, whole.shape, tensor.shape)
        return whole
    if not (name.endswith(".kernel") and stem + A in adapter.tensors and stem + B in adapter.tensors):
        return None
    used |= {stem + A, stem + B}
    a, b = (jnp.asarray(adapter.tensors[stem + factor]) for factor in (A, B))
    _check_shape(name, (a.shape[0], *b.shape[1:]), tensor.shape)
    return with_product(tensor, a, b, adapter.scales.get(stem.removesuffix("."), adapter.config.scale))


def _check_shape(name: str, shape: tuple[int, ...], want: tuple[int, ...]) -> None:
    if shape != want:
        raise ValueError(f"the adapter's part for {name} has the shape {list(shape)}, not {list(want)}")
