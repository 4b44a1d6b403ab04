"""Random layerwise token dropping (random-LTD, arXiv 2211.11586): in training, a layer sees some of a row's tokens.

With J a set of k of a row's s positions, drawn uniformly without replacement, anew for every layer and row, and sorted,

    y[J] = layer(x[J])        y[not J] = x[not J]

so that a dropped token passes the layer unchanged, and its gradient, too. No token is protected. k grows to s during
training; evaluation and generation never drop, and the parameters are the same with and without it.

k and s are numbers of the step, but shapes are static: of K slots (`num_kept`) the first k hold J, and slot i of the
others points behind the row, to T + i: zeros are read there, and what is written there is dropped. Such a slot must not
be seen by the others: it comes last, so that causal attention needs nothing more; other attention masks it. The result
is that of k slots, dropout of hidden states included; the mask of dropped attention weights depends on K.

J is drawn from key(seed, step, global sample id, layer), so that mesh, accumulation and resume cannot change it.

Shapes: B rows, T positions, D model, K slots, H heads.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from dsjax.layers.attention import Visibility, document_mask
from dsjax.layers.dropout import fold
from dsjax.mesh.layout import ONE_DEVICE, Layout

SITE = 3
"""Number that a layer's keys are folded with; its dropout has 0 (attention weights), 1 and 2 (the two outputs)."""
IN_ORDER = {"unique_indices": True, "indices_are_sorted": True}
Count = int | Int[Array, ""]


def random_ltd(
    x_BTD: Float[Array, "B T D"],
    layer: Callable[[Float[Array, "B K D"], Int[Array, "B K"]], Float[Array, "B K D"]],
    *,
    keys: Key[Array, "B"],
    num_kept: int,
    length: Count | None = None,
    kept: Count | None = None,
) -> Float[Array, "B T D"]:
    """Any layer with random-LTD around it.

    Args:
        x_BTD: its input.
        layer: (kept tokens, their positions in the row, ascending) -> output. What depends on positions (RoPE, ALiBi,
            masks of documents) must come from the given ones. Positions of T and more mark empty slots.
        keys: one a row, others for every step and layer (see layers/dropout.py).
        num_kept: K, static, at most T.
        length: how many of the T positions are real, int32; None means T. The others are never kept.
        kept: k, int32; None means K. More than K or than `length` means that.

    Raises:
        ValueError: K is not in 1..T.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> x = jnp.zeros((2, 8, 4))
        >>> y = random_ltd(x, lambda tokens, positions: tokens + 1 + positions[..., None], keys=keys, num_kept=3)
        >>> y[:, :, 0].astype(int).tolist()
        [[0, 2, 0, 4, 0, 0, 0, 8], [1, 2, 0, 0, 0, 6, 0, 0]]
    """
    indices = draw_kept(keys, num_kept, num_positions=x_BTD.shape[1], length=length, kept=kept)
    return around(lambda tokens: (layer(tokens, indices), None), x_BTD, indices)[0]


def draw_kept(
    keys: Key[Array, "B"],
    num_kept: int,
    *,
    num_positions: int,
    length: Count | None = None,
    kept: Count | None = None,
) -> Int[Array, "B K"]:
    """Which tokens of each row are kept: J, ascending, then T + i in each empty slot i; int32.

    One sort of random bits whose low bits are the position (so that the values carry it along), one of those kept. J
    depends neither on K nor on what T is beyond `length`, but for equal bits, of which the first position's come first:
    so rarely (in one row of 1,000 at T = 2,048) that it does not matter.

    Args:
        keys: one a row.
        num_kept: K, static.
        num_positions: T.
        length: how many of the T positions are real; None means T.
        kept: k; None means K. More than K or than `length` means that.

    Raises:
        ValueError: K is not in 1..T.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> draw_kept(keys, 4, num_positions=8, kept=3).tolist()
        [[1, 3, 7, 11], [0, 1, 5, 11]]
    """
    if not 1 <= num_kept <= num_positions:
        raise ValueError(f"num_kept must be in 1..{num_positions}, the row's positions; got {num_kept}")
    length = num_positions if length is None else length
    kept = jnp.minimum(num_kept if kept is None else kept, length)
    low = jnp.uint32((1 << (num_positions - 1).bit_length()) - 1)
    places = jnp.arange(num_positions, dtype=jnp.uint32)
    draws = jax.vmap(lambda key: jax.random.bits(key, (num_positions,), jnp.uint32))(keys)
    real = jnp.arange(num_positions, dtype=jnp.int32) < length
    draws = jnp.where(real, draws & ~low, ~low) | places  # what is not real comes last
    drawn = (jnp.sort(draws, axis=1)[:, :num_kept] & low).astype(jnp.int32)
    slots = jnp.arange(num_kept, dtype=jnp.int32)
    return jnp.sort(jnp.where(slots < kept, drawn, num_positions + slots), axis=1)


def take(
    x_BT: Shaped[Array, "#B T *rest"], indices: Int[Array, "B K"], *, empty: int = 0
) -> Shaped[Array, "B K *rest"]:
    """The kept positions of x, and `empty` in the empty slots; x may have one row for all.

    Example:
        >>> take(jnp.array([[5, 6, 7]]), jnp.array([[0, 2, 3], [1, 3, 4]]), empty=-1).tolist()
        [[5, 7, -1], [6, -1, -1]]
    """
    row = lambda x, at: x.at[at].get(mode="fill", fill_value=empty, **IN_ORDER)
    if x_BT.shape[0] == 1:
        return jax.vmap(partial(row, x_BT[0]))(indices)
    return jax.vmap(row)(x_BT, indices)  # row by row: indices into the flat array would undo the split over devices


def put(
    x_BT: Shaped[Array, "B T *rest"], indices: Int[Array, "B K"], values: Shaped[Array, "B K *rest"]
) -> Shaped[Array, "B T *rest"]:
    """x with other values at the kept positions; those of empty slots are dropped.

    Example:
        >>> put(jnp.zeros((1, 3), int), jnp.array([[0, 2, 3]]), jnp.array([[5, 6, 7]])).tolist()
        [[5, 0, 6]]
    """
    row = lambda x, at, new: x.at[at].set(new, mode="drop", **IN_ORDER)
    return jax.vmap(row)(x_BT, indices, values)


def around[Result](
    layer: Callable[[Float[Array, "B K D"]], tuple[Float[Array, "B K D"], Result]],
    x_BTD: Float[Array, "B T D"],
    indices: Int[Array, "B K"],
    *,
    layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, "B T D"], Result]:
    """y[J] = layer(x[J]), and x elsewhere; with what the layer gives besides, unchanged.

    Args:
        layer: kept tokens -> (its output for them, statistics or whatever else it gives).
        x_BTD: its input.
        indices: from `draw_kept`.
        layout: placement on a mesh.
    """
    place = lambda x: layout.activation(x, None, None)
    y_BKD, rest = layer(place(take(x_BTD, indices)))
    return place(put(x_BTD, indices, y_BKD)), rest


def among_kept(
    whole: Visibility,
    indices: Int[Array, "B K"],
    segments: Int[Array, "B T"] | None,
    *,
    num_positions: int,
    bias_BHKK: Float[Array, "B H K K"] | None = None,
) -> Visibility:
    """Visibility among the kept tokens: each sees those that it would see in whole rows.

    In a row that is one document the order of the slots says what is causal, and no mask is needed.

    Args:
        whole: of whole rows.
        indices: from `draw_kept`.
        segments: number of the document each token belongs to, from 0 on; None: one document.
        num_positions: T.
        bias_BHKK: added to the kept tokens' scores; it must be given where whole rows have a bias.
    """
    assert (bias_BHKK is None) == (whole.bias is None)
    mask = rotation = None
    if segments is not None or not whole.causal:
        documents = jnp.zeros((1, num_positions), jnp.int32) if segments is None else segments
        documents, slots = take(documents, indices, empty=-1), jnp.arange(indices.shape[1])
        mask = document_mask(documents, documents, slots, slots, causal=whole.causal)
    if whole.rotation is not None:
        cos, sin = whole.rotation
        rotation = take(cos, indices), take(sin, indices)
    return Visibility(mask, bias_BHKK, whole.causal, rotation)


@dataclasses.dataclass(frozen=True)
class Dropping:
    """Tokens that a model drops in a step.

    Attributes:
        keys: one a row, of this step and the row's global sample id (`sample_keys` of layers/dropout.py).
        layers: numbers of the layers that drop.
        num_kept: K, static.
        length: how many positions of a row are real, int32.
        kept: k, int32; more than K or than `length` means that.
    """

    keys: Key[Array, "B"]
    layers: range
    num_kept: int
    length: Count
    kept: Count

    def indices(
        self, numbers: Int[Array, " n"], num_positions: int, *, layout: Layout = ONE_DEVICE
    ) -> Int[Array, "n B K"]:
        """Kept tokens of some layers, drawn by `draw_kept` all at once, so that recomputing a layer draws nothing.

        Args:
            numbers: of the layers.
            num_positions: T.
            layout: placement on a mesh. The indices are the same on all of `tensor`.
        """

        def of_layer(number: Int[Array, ""]) -> Int[Array, "B K"]:
            keys = fold(fold(self.keys, number), SITE)
            assert keys is not None
            drawn = draw_kept(keys, self.num_kept, num_positions=num_positions, length=self.length, kept=self.kept)
            return layout.activation(drawn, None)

        return jax.vmap(of_layer)(numbers)
