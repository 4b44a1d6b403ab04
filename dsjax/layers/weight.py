"""Matrices that layers apply, whatever they are stored as.

A layer asks its weight for the product with x, for rows (of a table) or for all of it, and knows nothing else of it.
`FloatWeight` is one float32 parameter. `LowRank` adds a trained matrix of low rank to another weight (LoRA, arXiv
2106.09685): y = x W + s (x A) B, not x (W + s A B), so that W may be frozen and no gradient and no copy of its size is
ever made.

A new storage is a class with the members of `Weight`; `with_weights` of models/adapters.py puts it into a model. Its
arrays are `nnx.Param`s with `axes`, of any dtype: what is not float is frozen in training.

Shapes: D inputs, r rank. A matrix is [D, ...], in a stack of layers [layers, D, ...].
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsjax.layers.context import Context
from dsjax.layers.parameter import use
from dsjax.mesh.layout import Axes

A, B, BASE = "lora_a", "lora_b", "base"


class Weight(Protocol):
    """A matrix [D, ...] with named dimensions, or a stack of such."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, the layers of a stack before it."""
        ...

    @property
    def axes(self) -> Axes:
        """Names of the matrix's dimensions, without those of a stack."""
        ...

    def apply(self, x: Float[Array, "*batch D"], context: Context) -> Float[Array, "..."]:
        """Multiply x by the matrix, in x's dtype."""
        ...

    def rows(self, ids: Int[Array, "*batch"], context: Context, *, dtype: DTypeLike) -> Float[Array, "*batch _"]:
        """Look up rows of the matrix."""
        ...

    def whole(self, context: Context, *, dtype: DTypeLike) -> Float[Array, "D *out"]:
        """Compute all of the matrix, as a layer sees it: gathered from its shards."""
        ...

    def merged(self) -> "FloatWeight":
        """The same matrix (or stack) as one float32 parameter."""
        ...


class FloatWeight(nnx.Param):
    """A matrix that is one float32 parameter.

    Example:
        >>> weight = FloatWeight(jnp.eye(2), axes=("embed", "mlp"))
        >>> weight.apply(jnp.array([3.0, 4.0]), Context()).tolist()
        [3.0, 4.0]
    """

    @classmethod
    def normal(cls, key: jax.Array, shape: tuple[int, ...], axes: Axes, *, std: float) -> "FloatWeight":
        """A matrix drawn from N(0, std^2)."""
        assert len(shape) == len(axes)
        return cls(std * jax.random.normal(key, shape, jnp.float32), axes=axes)

    @property
    def axes(self) -> Axes:
        """Names of the matrix's dimensions."""
        return self.get_metadata("axes")

    def apply(self, x: Float[Array, "*batch D"], context: Context) -> Float[Array, "..."]:
        """X W."""
        return jnp.tensordot(x, self.whole(context, dtype=x.dtype), axes=1)

    def rows(self, ids: Int[Array, "*batch"], context: Context, *, dtype: DTypeLike) -> Float[Array, "*batch _"]:
        """W[ids]."""
        # This holds the table's gradient too, which is then summed and reduced into its shards like any other. Left to
        # choose, XLA may gather the gradients of all devices' activations instead and sum them on each.
        return context.layout.hold_gathered(self.whole(context, dtype=dtype), self.axes)[ids]

    def whole(self, context: Context, *, dtype: DTypeLike) -> Float[Array, "D *out"]:
        """W."""
        return use(self, context, dtype)

    def merged(self) -> "FloatWeight":
        """Itself."""
        return self


class LowRank(nnx.Module):
    """W + s A B, of another weight W and factors A [D, r] and B [r, ...]: a low-rank adapter.

    Example:
        >>> base = FloatWeight(jnp.eye(2), axes=("embed", "mlp"))
        >>> weight = LowRank.on(base, rank=1, scale=0.5)
        >>> weight.lora_a.shape, weight.lora_b.shape
        ((2, 1), (1, 2))
    """

    def __init__(self, base: Weight, lora_a: nnx.Param, lora_b: nnx.Param, *, scale: float) -> None:
        self.base, self.lora_a, self.lora_b, self.scale = base, lora_a, lora_b, scale

    @classmethod
    def on(cls, base: Weight, *, rank: int, scale: float) -> "LowRank":
        """Adapters of a weight, as shapes only; each takes the names of W's dimensions and is split as W is."""
        stack = base.shape[: len(base.shape) - len(base.axes)]
        dim, *out = base.shape[len(stack) :]
        make = lambda shape, axes: nnx.Param(jax.ShapeDtypeStruct((*stack, *shape), jnp.float32), axes=axes)
        a = make((dim, rank), (base.axes[0], "rank"))
        return cls(base, a, make((rank, *out), ("rank", *base.axes[1:])), scale=scale)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        return self.base.shape

    @property
    def axes(self) -> Axes:
        """Names of W's dimensions."""
        return self.base.axes

    def apply(self, x: Float[Array, "*batch D"], context: Context) -> Float[Array, "..."]:
        """X W + s (x A) B."""
        y = self.base.apply(x, context)
        a, b = (use(factor, context, x.dtype) for factor in (self.lora_a, self.lora_b))
        return y + self.scale * jnp.tensordot(jnp.tensordot(x, a, axes=1), b, axes=1)

    def rows(self, ids: Int[Array, "*batch"], context: Context, *, dtype: DTypeLike) -> Float[Array, "*batch _"]:
        """W[ids] + s A[ids] B."""
        a, b = (use(factor, context, dtype) for factor in (self.lora_a, self.lora_b))
        return self.base.rows(ids, context, dtype=dtype) + self.scale * jnp.tensordot(a[ids], b, axes=1)

    def whole(self, context: Context, *, dtype: DTypeLike) -> Float[Array, "D *out"]:
        """W + s A B."""
        a, b = (use(factor, context, dtype) for factor in (self.lora_a, self.lora_b))
        return with_product(self.base.whole(context, dtype=dtype), a, b, self.scale)

    def merged(self) -> FloatWeight:
        """W + s A B as one parameter."""
        value = with_product(self.base.merged()[...], self.lora_a[...], self.lora_b[...], self.scale)
        return FloatWeight(value, axes=self.axes)


def with_product(
    matrix: Float[Array, "*stack_D_out"], a: Float[Array, "*stack D r"], b: Float[Array, "*stack_r_out"], scale: float
) -> Float[Array, "*stack_D_out"]:
    """W + s A B, of every layer of a stack.

    Example:
        >>> with_product(jnp.ones((2, 2)), jnp.array([[1.0], [0.0]]), jnp.array([[4.0, 6.0]]), 0.5).tolist()
        [[3.0, 4.0], [1.0, 1.0]]
    """
    product = partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)  # no TF32: it is done once
    for _ in range(a.ndim - 2):
        product = jax.vmap(product)
    return matrix + scale * product(a, b)


def tensor_path(path: Sequence[str]) -> list[str]:
    """The names that lead to a tensor outside the program, where a weight and its adapters stand beside each other.

    Example:
        >>> tensor_path(["attention", "q", "kernel", "base"]), tensor_path(["attention", "q", "kernel", "lora_a"])
        (['attention', 'q', 'kernel'], ['attention', 'q', 'lora_a'])
    """
    *parts, last = (part for part in path if part != BASE)
    return [*parts[:-1], last] if last in (A, B) else [*parts, last]
