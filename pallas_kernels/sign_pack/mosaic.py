"""sign_pack and unpack_average as Mosaic GPU kernels: one pass over memory, registers only (Hopper, sm_90).

A tensor of N values is looked at as rows of 8, one row to a byte. A thread block is one warpgroup (128 threads), which
takes tiles of `rows` rows, one after the other; a thread holds 4 neighbouring values in a 16-byte vector, so that a
warp reads 512 consecutive bytes, and two threads share a row: packing is three additions and one shuffle. Nothing is
shared between blocks: each writes its own values and bytes, and the sum of its squares to a place of its own; XLA adds
these few numbers, and so every run gives the same result.

No shared memory and no asynchronous copies: a value moves 12 bytes and takes some 20 instructions, and the other warps
of a multiprocessor work while one waits. The carry is a Ref, updated in place.
Legend: S tensors, R = N / 8 rows of a tensor, T rows of a tile, W workers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sign_pack import shapes

# A tile of 64 rows of 8: each warp takes 16 rows, each pair of lanes one of them, each lane 4 values of it.
VALUES = plgpu.Layout.TILED(plgpu.Tiling(((64, 8), (16, 8), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
# What is left of it when the 8 values of a row have become one byte or one number: both lanes hold it.
ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((64,), (16,), (1,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(2)), vector_dim=-1
)

# (the input's Refs, tensor, rows of the tile) -> x of that tile, [T, 8] float32 in the layout VALUES
type ReadTile = Callable[[tuple, jax.Array, pl.Slice], jax.Array]


def sign_pack(
    x: jax.Array,
    carry: jax.Array,
    scale: jax.Array,
    *,
    mask: jax.Array | None,
    length: int | jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As reference.feed_back. Arguments as in api.py, already checked."""

    def read(refs: tuple, tensor: jax.Array, rows: pl.Slice) -> jax.Array:
        return _load(refs[0].at[tensor, rows]).astype(jnp.float32)

    return _run("sign_pack", read, (_rows(x),), carry, scale, mask=mask, length=length)


def unpack_average(
    bits: jax.Array,
    scales: jax.Array,
    carry: jax.Array,
    scale: jax.Array,
    *,
    mask: jax.Array | None,
    length: int | jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As reference.feed_back of reference.average. Arguments as in api.py, already checked."""
    num_workers, num_rows = bits.shape[0], shapes.tiling(carry.shape).rows

    def read(refs: tuple, tensor: jax.Array, rows: pl.Slice) -> jax.Array:
        bits_ref, shares_ref = refs
        bit = 7 - _column(num_rows)

        def add(worker: int | jax.Array, total_T8: jax.Array) -> jax.Array:
            byte_T = plgpu.load(bits_ref.at[worker, tensor, rows], layout=ROWS, optimized=False).astype(jnp.int32)
            byte_T8 = plgpu.layout_cast(jax.lax.broadcast_in_dim(byte_T, (num_rows, 8), (0,)), VALUES)
            share = shares_ref[worker, tensor]
            return total_T8 + jnp.where((byte_T8 >> bit) & 1 == 1, share, -share)

        # Few workers: unrolled, so that all their bytes are on the way at once.
        return jax.lax.fori_loop(0, num_workers, add, _zeros(num_rows), unroll=num_workers <= 8)

    return _run("unpack_average", read, (bits, scales / num_workers), carry, scale, mask=mask, length=length)


def _rows(array: jax.Array) -> jax.Array:
    """[S, N] as [S, R, 8]."""
    return array.reshape(array.shape[0], array.shape[1] // 8, 8)


def _load(ref: Any) -> jax.Array:
    # optimized: a promise about banks of shared memory, which this is not.
    return plgpu.load(ref, layout=VALUES, optimized=False)


def _store(ref: Any, value: jax.Array) -> None:
    if jax.__version_info__ < (0, 12):
        ref[...] = value
    else:  # where it has to be said that a thread may write a single byte
        plgpu.store(ref, value, optimized=False)


def _zeros(num_rows: int) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((num_rows, 8), jnp.float32), VALUES)


def _iota(num_rows: int, dim: int) -> jax.Array:
    return plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (num_rows, 8), dim), VALUES)


def _column(num_rows: int) -> jax.Array:
    """0 to 7 along each row."""
    return _iota(num_rows, 1)


def _pack(values_T8: jax.Array) -> jax.Array:
    """[values >= 0], most significant bit first, [T] uint8."""
    bits = jnp.where(values_T8 >= 0, 128 >> _column(values_T8.shape[0]), 0)
    return plgpu.layout_cast(jnp.sum(bits, axis=1), ROWS).astype(jnp.uint8)


def _run(
    name: str,
    read: ReadTile,
    inputs: tuple[jax.Array, ...],
    carry: jax.Array,
    scale: jax.Array,
    *,
    mask: jax.Array | None,
    length: int | jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel around the x that `read` gives: the new carry, its packed signs, the sums of its squares."""
    if jax.typeof(carry).manual_axis_type.varying:
        raise ValueError(f"the Mosaic kernel of {name} updates its carry in place: use jax.shard_map(check_vma=False)")
    num_tensors, size = carry.shape
    tile = shapes.tiling((num_tensors, size))
    num_tiles, num_blocks = size // (8 * tile.rows), tile.blocks(size)
    masks = () if mask is None else (_rows(mask.astype(jnp.int8)),)
    lengths = () if length is None else (jnp.full((1,), length, jnp.int32),)

    def body(carry_ref, scale_ref, mask_refs, length_refs, input_refs, bits_ref, squares_ref):
        tensor, block = jax.lax.axis_index("tensor"), jax.lax.axis_index("block")
        old_scale = scale_ref[tensor]

        def step(index: jax.Array, squares_T8: jax.Array) -> jax.Array:
            rows = pl.ds(index * tile.rows, tile.rows)
            old_T8 = _load(carry_ref.at[tensor, rows])
            new_T8 = read(input_refs, tensor, rows) + (old_T8 - jnp.where(old_T8 >= 0, old_scale, -old_scale))
            for ref in mask_refs:
                new_T8 = jnp.where(_load(ref.at[tensor, rows]).astype(jnp.int32) == 0, 0.0, new_T8)
            for ref in length_refs:
                place_T8 = (_iota(tile.rows, 0) + index * tile.rows) * 8 + _column(tile.rows)
                new_T8 = jnp.where(place_T8 < ref[0], new_T8, 0.0)
            _store(carry_ref.at[tensor, rows], new_T8)
            _store(bits_ref.at[tensor, rows], _pack(new_T8))
            return squares_T8 + new_T8 * new_T8

        first = block * tile.per_block
        last = jnp.minimum(first + tile.per_block, num_tiles)
        squares_T8 = jax.lax.fori_loop(first, last, step, _zeros(tile.rows))
        squares_ref[tensor, block] = jnp.sum(plgpu.layout_cast(jnp.sum(squares_T8, axis=1), ROWS))

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_tensors, size // 8), jnp.uint8),
            jax.ShapeDtypeStruct((num_tensors, num_blocks), jnp.float32),
        ),
        grid=(num_tensors, num_blocks),
        grid_names=("tensor", "block"),
        kernel_name=name,
    )
    carry_ref = jax.new_ref(_rows(carry))
    bits, squares = kernel(carry_ref, scale, masks, lengths, inputs)
    return jax.freeze(carry_ref).reshape(carry.shape), bits, jnp.sum(squares, axis=1)
