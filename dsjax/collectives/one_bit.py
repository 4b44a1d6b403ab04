"""The mean over workers at one bit a value: an all-reduce in two phases with error feedback (arXiv 2102.02888, 4.2).

Worker i of W holds x_i, a tensor of n values, and the error e_i that is left from the last call:

    b_i = x_i + e_i      s_i = |b_i| / sqrt(n)      sends s_i and sgn(b_i), a bit a value      e_i <- b_i - s_i sgn(b_i)

Server j is worker j again; it has chunk j of every tensor, with the error d_j:

    a_j = 1/W sum_i s_i sgn(b_i)_j + d_j      sends |a_j|^2 and sgn(a_j) to all
    S = |a| / sqrt(n)                         d_j <- a_j - S sgn(a_j)                            result: S sgn(a)

Errors are added one call later: result_j + d_j' + mean_i e_i' = mean_i (x_i + e_i) + d_j (primes: after the call).

Three things differ from the usual presentation, none of them in the numbers above. An error is never written: what
is kept is b and its scale s (the *carry*), and e = b - s sgn(b) is computed when it is next needed, so that a phase is
one pass over memory. Scales are sent within the bytes of the payload: however many tensors there are, a call is one
all-to-all and one all-gather of uint8 (between two workers sums, of the same bytes). And S is that of the whole
tensor, which the gathered |a_j|^2 give: results do not depend on how a tensor is cut over devices or is part of a stack
(`server_scale="chunk"` is the published form, S_j = |a_j| / sqrt(n / W)).

n counts the values that are not masked. Tensors are padded to N, a multiple of 8 W, with values that stay zero and are
counted nowhere. Everything here runs inside a manual shard_map on this device's parts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from dsjax.collectives.messages import exchanged, gathered, opened, payload
from dsjax.collectives.shards import Rows, Shards
from pallas_kernels.sign_pack.api import sign_pack, unpack, unpack_average


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Which one-bit mean.

    Attributes:
        scale: "l2": s = |b| / sqrt(n). "l1": s = mean of |b|, which never enlarges the error.
        server_scale: "tensor": one S for a tensor. "chunk": one for each server's chunk.
        deepspeed_padding: pad as DeepSpeed 0.19.6 does, to a multiple of W lcm(W, 8), and count the padding as values.
        kernel: implementation of the passes over memory: "auto", "xla" or "mosaic" (pallas_kernels.sign_pack; its tiles
            of 512 values make the padding coarser).
    """

    scale: Literal["l2", "l1"] = "l2"
    server_scale: Literal["tensor", "chunk"] = "tensor"
    deepspeed_padding: bool = False
    kernel: Literal["auto", "xla", "mosaic"] = "auto"

    def padded(self, size: int, num_workers: int) -> int:
        """The padded size N of a tensor of `size` values.

        Example:
            >>> Scheme().padded(35, 3), Scheme(deepspeed_padding=True).padded(35, 3)
            (48, 72)
        """
        unit = num_workers * (math.lcm(num_workers, 8) if self.deepspeed_padding else 8)
        unit = math.lcm(unit, 512 * num_workers) if self.kernel == "mosaic" else unit
        return -(-size // unit) * unit


@dataclasses.dataclass(frozen=True)
class Feedback:
    """State of the error feedback on one device, for each tensor.

    Attributes:
        worker: what this worker compressed last, b: [S, N] float32.
        worker_scale: with which scale, s: [S] float32.
        server: what this device compressed as server, a: [S, N / W] float32.
        server_scale: with which scale, S: [S] float32.
    """

    worker: Rows
    worker_scale: Rows
    server: Rows
    server_scale: Rows

    @classmethod
    def zeros(cls, sizes: Sequence[tuple[int, int]], num_workers: int, scheme: Scheme) -> "Feedback":
        """That of the first call, without errors, for tensors of the shapes [S, n]."""
        padded = [(layers, scheme.padded(size, num_workers)) for layers, size in sizes]
        scales = [jnp.zeros(layers) for layers, _ in sizes]
        server = [jnp.zeros((layers, size // num_workers)) for layers, size in padded]
        return cls([jnp.zeros(shape) for shape in padded], scales, server, list(scales))


jax.tree_util.register_dataclass(Feedback)


def one_bit_mean(
    tensors: Rows,
    feedback: Feedback,
    *,
    axis: str,
    num_workers: int,
    masks: Sequence[jax.Array | None] | None = None,
    shards: Shards | None = None,
    scheme: Scheme = Scheme(),
) -> tuple[Rows, Feedback]:
    """The mean of tensors over the workers along a mesh axis, one bit a value.

    Args:
        tensors: this worker's, [S, n] float32: each of the S rows (layers) is a tensor with a scale of its own.
        feedback: from the last call.
        axis: the workers' mesh axis.
        num_workers: its size, W. With one worker the result is its own tensor, and nothing is owed.
        masks: for each tensor None or [S, n] bool, the same on all workers: where it is False the result is zero, and
            the value takes no part in scales and errors.
        shards: how tensors are split over other axes; whole by default.
        scheme: which scales and padding.

    Returns:
        the means [S, n], equal on all workers, and the feedback for the next call.
    """
    masks = [None] * len(tensors) if masks is None else list(masks)
    if num_workers == 1 or not tensors:
        # Of one worker, but its type may say that it differs between workers: then a sum of one says that it does not.
        shared = [jax.lax.psum(x, axis) if axis in jax.typeof(x).manual_axis_type.varying else x for x in tensors]
        return [_masked(x, mask) for x, mask in zip(shared, masks, strict=True)], feedback
    shards = shards or Shards.whole(len(tensors))
    sizes = [scheme.padded(x.shape[1], num_workers) for x in tensors]
    # The values that take part end here; behind them is padding.
    ends = sizes if scheme.deepspeed_padding else [x.shape[1] for x in tensors]
    masks = [None if mask is None else _pad(mask, size) for mask, size in zip(masks, sizes, strict=True)]
    # Keeps reshapes of the carries (such as dropping a dimension of workers) out of the loops that update them: XLA
    # updates a donated buffer in place only if the loop's operand and result have one shape, else it copies at the end.
    feedback = jax.lax.optimization_barrier(feedback)

    counts = [_count(mask, x, end) for mask, x, end in zip(masks, tensors, ends, strict=True)]

    # Phase 1: every worker packs all of its tensors, and sends chunk j of each to server j.
    padded = [_pad(x, size) for x, size in zip(tensors, sizes, strict=True)]
    carries, bits, squares = _packed(padded, feedback, masks, ends, scheme)
    scales, counts = _scales(carries, squares, counts, shards, scheme)
    by_server = [b.reshape(b.shape[0], num_workers, -1).swapaxes(0, 1) for b in bits]
    bits, received = opened(exchanged(payload(by_server, scales), axis), by_server)

    # Phase 2: every server averages its chunk of each tensor, packs it again, and sends it to all.
    here = jax.lax.axis_index(axis)
    chunks = [_chunk(mask, end, size // num_workers, here) for mask, end, size in zip(masks, ends, sizes, strict=True)]
    packed = [
        unpack_average(*each, mask=mask, length=end, implementation=scheme.kernel)
        for *each, (mask, end) in zip(bits, received, feedback.server, feedback.server_scale, chunks, strict=True)
    ]
    servers, bits, squares = map(list, zip(*packed, strict=True))
    to_all = lambda told: opened(
        gathered(payload([b[None] for b in bits], told), axis, num_workers), [b[None] for b in bits]
    )
    if scheme.server_scale == "chunk":
        counts = [_count(mask, a, end) for (mask, end), a in zip(chunks, servers, strict=True)]
        own, _ = _scales(servers, squares, counts, shards, scheme)
        bits, told = to_all(own)
    else:
        bits, parts = to_all(shards.sums(_moments(servers, squares, scheme)))
        own = [_scale(part.sum(0), count, scheme) for part, count in zip(parts, counts, strict=True)]
        told = [jnp.broadcast_to(scale, part.shape) for scale, part in zip(own, parts, strict=True)]

    means = [
        _masked(unpack(b, scale), mask)[:, : x.shape[1]]
        for b, scale, mask, x in zip(bits, told, masks, tensors, strict=True)
    ]
    return means, Feedback(carries, scales, servers, own)


def reset_errors(feedback: Feedback, where: Rows, *, axis: str, num_workers: int) -> Feedback:
    """Feedback without errors for some values: those that had been masked and are no longer.

    Args:
        feedback: of the last call.
        where: for each tensor [S, n] bool, the same on all workers.
        axis: the workers' mesh axis.
        num_workers: its size.
    """
    here = jax.lax.axis_index(axis)
    # b = s stands for no error.
    clear = lambda chosen, carry, scale: jnp.where(chosen, scale[:, None], carry)
    worker, server = [], []
    for i, chosen in enumerate(where):
        size = feedback.worker[i].shape[1]
        padded = _pad(chosen, size)
        chunk, _ = _chunk(padded, size, size // num_workers, here)
        worker.append(clear(padded, feedback.worker[i], feedback.worker_scale[i]))
        server.append(clear(chunk, feedback.server[i], feedback.server_scale[i]))
    return dataclasses.replace(feedback, worker=worker, server=server)


def _pad(x: jax.Array, size: int) -> jax.Array:
    """Rows [S, n] with zeros (or False) behind them, [S, size]."""
    return x if x.shape[1] == size else jnp.pad(x, ((0, 0), (0, size - x.shape[1])))


def _packed(
    tensors: Rows, feedback: Feedback, masks: Sequence[jax.Array | None], ends: Sequence[int], scheme: Scheme
) -> tuple[Rows, Rows, Rows]:
    """A worker's padded tensors with what they are owed: carries, bits and squares."""
    packed = [
        sign_pack(x, carry, scale, mask=mask, length=end, implementation=scheme.kernel)
        for x, carry, scale, mask, end in zip(tensors, feedback.worker, feedback.worker_scale, masks, ends, strict=True)
    ]
    carries, bits, squares = map(list, zip(*packed, strict=True))
    return carries, bits, squares


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, 0)


def _chunk(mask: jax.Array | None, end: int, size: int, here: jax.Array) -> tuple[jax.Array | None, jax.Array | int]:
    """The mask [S, size] of chunk number `here`, and where the padding in it begins."""
    if mask is not None:
        return jax.lax.dynamic_slice_in_dim(mask, here * size, size, axis=1), size
    return None, size if end % size == 0 else jnp.clip(end - here * size, 0, size)


def _count(mask: jax.Array | None, rows: jax.Array, end: jax.Array | int) -> jax.Array:
    """Count the values of each row of [S, ...] that take part: [S] float32."""
    if mask is None:
        return jnp.broadcast_to(jnp.asarray(end, jnp.float32), rows.shape[:1])
    return jnp.sum(mask, axis=1, dtype=jnp.float32)


def _moments(carries: Rows, squares: Rows, scheme: Scheme) -> Rows:
    """Sums over this device's part from which a scale is made: [S] for each tensor."""
    return squares if scheme.scale == "l2" else [jnp.sum(jnp.abs(carry), axis=1) for carry in carries]


def _scales(carries: Rows, squares: Rows, counts: Rows, shards: Shards, scheme: Scheme) -> tuple[Rows, Rows]:
    """The scales of whole tensors and their numbers of values, [S] each, in one collective."""
    totals = shards.sums([*_moments(carries, squares, scheme), *counts])
    sums, counts = totals[: len(carries)], totals[len(carries) :]
    return [_scale(total, count, scheme) for total, count in zip(sums, counts, strict=True)], counts


def _scale(total: jax.Array, count: jax.Array, scheme: Scheme) -> jax.Array:
    """The scale of a tensor from its sum and its number of values, [S]; 0 where there are none."""
    mean = total / jnp.maximum(count, 1)
    return jnp.sqrt(mean) if scheme.scale == "l2" else mean
