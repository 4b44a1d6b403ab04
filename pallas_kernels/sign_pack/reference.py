"""The three phases in plain JAX: what XLA fuses well, on CPU and GPU. Arguments as in api.py, already checked.

XLA:CPU makes one loop of the sum, the signs and the product, and packs and unpacks bits at the speed of memory: tables,
32-bit words and a trailing dimension of 8 were all slower (bench.py measures).
"""

import jax
import jax.numpy as jnp


def sign(x: jax.Array) -> jax.Array:
    """+1 where x >= 0 (so of both zeros), -1 elsewhere (so of NaN), float32."""
    return jnp.where(x >= 0, jnp.float32(1), jnp.float32(-1))


def kept(shape: tuple[int, int], mask: jax.Array | None, length: int | jax.Array | None) -> jax.Array | None:
    """The mask [S, N] with the padding tail taken out, bool; None when everything counts."""
    keep = None if mask is None else mask.astype(bool)
    if length is None:
        return keep
    real = jax.lax.broadcasted_iota(jnp.int32, shape, 1) < length
    return real if keep is None else keep & real


def feed_back(
    x: jax.Array,
    carry: jax.Array,
    scale: jax.Array,
    *,
    mask: jax.Array | None,
    length: int | jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x + the last call's error, its packed signs and the sums of its squares."""
    new = x.astype(jnp.float32) + (carry - scale[:, None] * sign(carry))
    keep = kept((carry.shape[0], carry.shape[1]), mask, length)
    if keep is not None:
        new = jnp.where(keep, new, 0)
    # Three readers: XLA:CPU would compute the sum again for each, and then has to copy a donated carry before.
    new = jax.lax.platform_dependent(new, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    return new, jnp.packbits(new >= 0, axis=1), jnp.sum(new * new, axis=1)


def average(bits: jax.Array, scales: jax.Array) -> jax.Array:
    """Mean over workers, summed in their order: sum_w scales[w] / W * sign, [S, K] float32."""
    num_workers = bits.shape[0]
    total = jnp.zeros((bits.shape[1], bits.shape[2] * 8), jnp.float32)
    for worker in range(num_workers):
        share = scales[worker, :, None] / num_workers
        total = total + jnp.where(jnp.unpackbits(bits[worker], axis=1) > 0, share, -share)
    return total


def unpack(bits: jax.Array, scales: jax.Array) -> jax.Array:
    """Chunk w of every tensor from worker w: [W, S, K // 8] to [S, W * K]."""
    num_workers, num_tensors, num_bytes = bits.shape
    bits_SWb, scales_SW1 = bits.swapaxes(0, 1), scales.T[:, :, None]
    signed = jnp.where(jnp.unpackbits(bits_SWb, axis=2) > 0, scales_SW1, -scales_SW1)
    return signed.reshape(num_tensors, num_workers * num_bytes * 8)
