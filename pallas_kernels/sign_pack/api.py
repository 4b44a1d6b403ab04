"""One-bit compression with error feedback, the local phases of a compressed all-reduce (1-bit Adam, arXiv 2102.02888).

With b the *carry* (what is compressed), s its scale and sgn(0) = +1, a phase sends sgn(b) and s, and the error
e = b - s sgn(b) is added to what comes next. The error is never stored: b and s are, and e is computed when it is
needed, which saves a pass over memory:

    b' = x + (b - s sgn(b)),    bits = [b' >= 0],    squares = sum b'^2    (s' = sqrt(squares / count) is the caller's)

`sign_pack` is this for a worker's x; `unpack_average` for a server, whose x is the mean of the W workers' signs;
`unpack` turns what the servers send back into numbers. Legend: S tensors (layers), N values in each, W workers or
servers, K values of a tensor in one server's chunk. Bits are packed most significant first, as numpy packs them.

Masked elements have b' = 0, do not count in squares, and have no error, in this call and the next; so does the padding
tail, the elements at `length` and beyond. Their bits are 1. Padding therefore never reaches a norm or an error. The
next call must have the same mask and length: start anew from zeros when they change.
The functions can be traced, and used in shard_map. Donate `carry` (and what the outputs can reuse) to the enclosing
jit: a fresh array of this size costs more than the arithmetic.
"""

from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, UInt8

from pallas_kernels.platform import choose
from pallas_kernels.sign_pack import reference, shapes

type Mask = Bool[Array, "S N"] | Int8[Array, "S N"] | None
type Length = int | Int32[Array, ""] | None
type Packed = tuple[Float32[Array, "S N"], UInt8[Array, "S N/8"], Float32[Array, "S"]]


def sign_pack(
    x: Float[Array, "S N"],
    carry: Float32[Array, "S N"],
    scale: Float32[Array, "S"],
    *,
    mask: Mask = None,
    length: Length = None,
    implementation: str = "auto",
) -> Packed:
    """A worker's phase: add the last error to x, and pack the signs of the sum.

    Args:
        x: what to send, float32 or bfloat16, N a multiple of 8.
        carry: of the last call, zeros at first.
        scale: of the last call's carry, zeros at first.
        mask: bool, or int8 of 0 and 1: false for elements that are not sent; None: all are.
        length: number of elements of each tensor that are not padding, an int or an int32 scalar; None: N.
        implementation: 'auto', 'xla' or 'mosaic' (N a multiple of 512; give it an int8 mask: bool is converted).

    Returns:
        The new carry [S, N] float32, its signs [S, N // 8] uint8, and the sums of its squares [S] float32.

    Raises:
        ValueError: for a shape or dtype that does not fit, or another implementation.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[3.0, -1.0, 0.0, -2.0, 1.0, 1.0, 1.0, -1.0]])
        >>> carry, bits, squares = sign_pack(x, jnp.zeros((1, 8)), jnp.zeros(1))
        >>> bin(int(bits[0, 0])), float(squares[0])
        ('0b10101110', 18.0)
        >>> scale = jnp.sqrt(squares / 8)  # 1.5, and so the first error is 3 - 1.5
        >>> float(sign_pack(0 * x, carry, scale)[0][0, 0])
        1.5
    """
    shape = shapes.check_values("x", x)
    shapes.check_same("x", x, shape, ("float32", "bfloat16"))
    shapes.check_state(carry, scale, shape)
    shapes.check_mask(mask, length, shape)
    length = None if isinstance(length, int) and length == shape[1] else length
    if choose("sign_pack", implementation) == "mosaic":
        from pallas_kernels.sign_pack import mosaic  # only here: it loads Pallas

        return mosaic.sign_pack(x, carry, scale, mask=mask, length=length)
    return reference.feed_back(x, carry, scale, mask=mask, length=length)


def unpack_average(
    bits: UInt8[Array, "W S _"],
    scales: Float32[Array, "W S"],
    carry: Float32[Array, "S K"],
    scale: Float32[Array, "S"],
    *,
    mask: Mask = None,
    length: Length = None,
    implementation: str = "auto",
) -> Packed:
    """A server's phase: sign_pack of x = sum_w scales[w] / W * (2 bit - 1), summed in worker order, x never in memory.

    Args:
        bits: the packed signs of this server's chunk from each of W workers.
        scales: the workers' scales.
        carry: the server's, of the last call, zeros at first.
        scale: of the last call's carry, zeros at first.
        mask: as in sign_pack, for this chunk [S, K].
        length: as in sign_pack, of this chunk; an int32 scalar where the servers share a program.
        implementation: 'auto', 'xla' or 'mosaic' (N a multiple of 512; give it an int8 mask: bool is converted).

    Returns:
        The new carry [S, K] float32, its signs [S, K // 8] uint8, and the sums of its squares [S] float32.

    Raises:
        ValueError: for a shape or dtype that does not fit, or another implementation.

    Example:
        >>> import jax.numpy as jnp
        >>> bits = jnp.array([[[0b11110000]], [[0b11001100]]], jnp.uint8)
        >>> scales = jnp.array([[1.0], [3.0]])
        >>> carry, packed, squares = unpack_average(bits, scales, jnp.zeros((1, 8)), jnp.zeros(1))
        >>> carry.tolist(), bin(int(packed[0, 0])), squares.tolist()
        ([[2.0, 2.0, -1.0, -1.0, 1.0, 1.0, -2.0, -2.0]], '0b11001100', [20.0])
    """
    _, num_tensors, size = shapes.check_bits(bits, scales)
    shapes.check_state(carry, scale, (num_tensors, size))
    shapes.check_mask(mask, length, (num_tensors, size))
    length = None if isinstance(length, int) and length == size else length
    if choose("unpack_average", implementation) == "mosaic":
        from pallas_kernels.sign_pack import mosaic  # only here: it loads Pallas

        return mosaic.unpack_average(bits, scales, carry, scale, mask=mask, length=length)
    return reference.feed_back(reference.average(bits, scales), carry, scale, mask=mask, length=length)


def unpack(
    bits: UInt8[Array, "W S _"], scales: Float32[Array, "W S"], *, implementation: str = "auto"
) -> Float32[Array, "S _"]:
    """Unpack the servers' answers: chunk w of tensor s is scales[w, s] * (2 bit - 1).

    Args:
        bits: the packed signs of chunk w from server w.
        scales: the servers' scales.
        implementation: 'auto' or 'xla': XLA fuses it into what uses the result, which no kernel could.

    Returns:
        The tensors [S, W * K], float32. Masked elements and padding come back as + the scale: the caller masks them.

    Raises:
        ValueError: for a shape or dtype that does not fit, or another implementation.

    Example:
        >>> import jax.numpy as jnp
        >>> bits = jnp.array([[[0b11110000]], [[0b10000000]]], jnp.uint8)
        >>> unpack(bits, jnp.array([[1.0], [2.0]])).tolist()
        [[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0]]
    """
    shapes.check_bits(bits, scales)
    choose("unpack", implementation, kernels=())
    return reference.unpack(bits, scales)
