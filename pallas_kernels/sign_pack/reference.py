"""The three phases in plain JAX: what XLA fuses well, on CPU and GPU. Arguments as in api.py, already checked.

XLA:CPU packs and unpacks bits at the speed of memory: tables, 32-bit words and a trailing dimension of 8 were all
slower (bench.py measures).
"""

import jax
import jax.numpy as jnp


def sign(x: jax.Array) -> jax.Array:
    """+1 where x >= 0 (so of both zeros), -1 elsewhere (so of NaN), float32."""
    return jnp.where(x >= 0, jnp.float32(1), jnp.float32(-1))


def apart(x: jax.Array) -> jax.Array:
    """x, computed on its own on a CPU: XLA:CPU would repeat a loop for every reader, and then copy a donated carry."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def keep(x: jax.Array, mask: jax.Array | None, length: int | jax.Array | None) -> jax.Array:
    """x [S, N] float32 with zeros where the mask is false and from `length` on.

    XLA:CPU makes no vectors of a loop that selects by a mask or a place. So numbers are cut by their bits, and places
    become a row of bytes first: sign_pack takes 1.1 times as long with a mask or a length as without, instead of 1.8.
    """
    if mask is not None:
        x = _cut(x, mask)
    if isinstance(length, int):
        tail = jnp.zeros((x.shape[0], x.shape[1] - length), x.dtype)
        return jax.lax.dynamic_update_slice(apart(x), tail, (0, length))
    if length is not None:
        row = jnp.arange(x.shape[1], dtype=jnp.int32) < length
        x = _cut(x, apart(row.astype(jnp.int8))[None])
    return x


def _cut(x: jax.Array, flags: jax.Array) -> jax.Array:
    """x where the flags (0 or 1) are 1, else 0, also for what is not finite."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -flags.astype(jnp.int32)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


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
    new = apart(keep(new, mask, length))  # it has three readers
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
