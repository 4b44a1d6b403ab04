"""The compressed all-reduce with error feedback.

Worker i holds x_i and its error e_i; server j (the same machines) holds the error d_j of chunk j.
  b_i = x_i + e_i          s_i = |b_i| / sqrt(n)                    e_i = b_i - s_i sgn(b_i)
  a_j = sum_i s_i / W sgn(b_i)[chunk j] + d_j    S = |a| / sqrt(n)     d_j = a_j - S sgn(a_j)
  result[chunk j] = S sgn(a_j)                   with sgn(0) = +1; only bits and scales travel.
Elements that are masked, and the padding, are zero in b, e, a, d and the result and outside |.| and n. The peer knows
no mask here, its padding is like any element, and S is of chunk j alone.
"""

import math

import numpy as np

from one_bit_oracle.rules import Rules


def pack(b: np.ndarray) -> np.ndarray:
    """Signs of values, eight to a byte, the first in the highest bit; 1 means not negative. [..., 8 k] -> [..., k]."""
    return np.packbits(~(b < 0), axis=-1)


def unpack(bits: np.ndarray, dtype) -> np.ndarray:
    """+1 and -1 from bytes, [..., k] -> [..., 8 k]."""
    return 2 * np.unpackbits(bits, axis=-1).astype(dtype) - 1


def padded_size(n: int, num_workers: int, *, deepspeed_parity: bool) -> int:
    """N, the length of a buffer of n values."""
    block = num_workers * math.lcm(num_workers, 8) if deepspeed_parity else 8 * num_workers
    return -(-n // block) * block


def magnitude(b: np.ndarray, count: np.ndarray | int, kind: str) -> np.ndarray:
    """The scale of rows b [..., N] with `count` elements that are not masked, [..., 1]; 0 where there are none."""
    count = np.maximum(count, 1)
    if kind == "l1":
        return (np.abs(b).sum(axis=-1, keepdims=True) / count).astype(b.dtype)
    return (np.linalg.norm(b, axis=-1, keepdims=True) / np.sqrt(count)).astype(b.dtype)


class AllReduce:
    """The all-reduce of one flat buffer, with its errors worker_error [W, N] and server_error [W, N / W].

    `worker_scale` and `server_scale` are the largest s_i and S of the last call: how large what was compressed is.
    """

    def __init__(self, n: int, num_workers: int, rules: Rules):
        self.n, self.num_workers, self.rules = n, num_workers, rules
        size = padded_size(n, num_workers, deepspeed_parity=rules.deepspeed_parity)
        self.worker_error = np.zeros((num_workers, size), rules.dtype)
        self.server_error = np.zeros((num_workers, size // num_workers), rules.dtype)
        self.worker_scale = self.server_scale = 0.0

    def __call__(self, x_Wn: np.ndarray, live_n: np.ndarray | None = None) -> np.ndarray:
        """The average [n] of x_Wn, the same on every worker. live_n: bool, False where masked."""
        workers, size = self.worker_error.shape
        live_N = np.full(size, self.rules.deepspeed_parity)
        live_N[: self.n] = True if live_n is None else live_n
        tail = [(0, 0), (0, size - self.n)]

        b = np.where(live_N, np.pad(x_Wn, tail) + self.worker_error, 0)
        scale = magnitude(b, live_N.sum(), self.rules.scale)
        self.worker_scale = float(scale.max())
        bits = pack(b)
        self.worker_error = np.where(live_N, b - scale * unpack(bits, b.dtype), 0)

        # Row i of the first index is the sender, of the second the server: what an all-to-all exchanges.
        bits = bits.reshape(workers, workers, -1)
        live = live_N.reshape(workers, -1)
        a = np.zeros_like(self.server_error)
        for i in range(workers):
            a = a + (scale[i] / workers).astype(b.dtype) * unpack(bits[i], b.dtype)
        a = np.where(live, a + self.server_error, 0)
        if self.rules.server_scale == "chunk":
            scale = magnitude(a, live.sum(axis=1, keepdims=True), self.rules.scale)
        else:
            scale = magnitude(a.reshape(1, -1), live_N.sum(), self.rules.scale)
        self.server_scale = float(scale.max())
        signs = unpack(pack(a), a.dtype)
        self.server_error = np.where(live, a - scale * signs, 0)
        return np.where(live, scale * signs, 0).reshape(-1)[: self.n]

    def reset(self) -> None:
        """Forget the errors."""
        self.worker_error = np.zeros_like(self.worker_error)
        self.server_error = np.zeros_like(self.server_error)


class ListAllReduce:
    """The all-reduce of a list of tensors, each on its own or all raveled into one.

    One worker is not compressed: its tensors come back, masked unless the dialect is the peer's.
    """

    def __init__(self, shapes: list[tuple[int, ...]], num_workers: int, rules: Rules):
        self.shapes, self.num_workers, self.rules = shapes, num_workers, rules
        sizes = [math.prod(shape) for shape in shapes]
        if rules.granularity == "group":
            sizes = [sum(sizes)]
        self.buffers = [AllReduce(n, num_workers, rules) for n in sizes]

    def __call__(self, tensors: list[np.ndarray], live: list[np.ndarray] | None = None) -> list[np.ndarray]:
        """Averages [...] of tensors [W, ...]. live: bool [...], False where masked."""
        if self.num_workers == 1:
            return (
                [x[0] for x in tensors]
                if live is None
                else [x[0] * keep for x, keep in zip(tensors, live, strict=True)]
            )
        rows = [x.reshape(self.num_workers, -1) for x in tensors]
        keep = [np.ones(x.shape[1], bool) for x in rows] if live is None else [x.reshape(-1) for x in live]
        if self.rules.granularity == "group":
            flat = self.buffers[0](np.concatenate(rows, axis=1), np.concatenate(keep))
            ends = np.cumsum([x.shape[1] for x in rows])[:-1]
            results = np.split(flat, ends)
        else:
            results = [average(x, k) for average, x, k in zip(self.buffers, rows, keep, strict=True)]
        return [x.reshape(shape) for x, shape in zip(results, self.shapes, strict=True)]

    def reset(self) -> None:
        """Forget the errors."""
        for buffer in self.buffers:
            buffer.reset()
