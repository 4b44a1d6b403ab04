"""Random order without state: hashes and keyed permutations that are the same on every machine and for ever.

numpy promises no stable stream between its versions, and a resumed run must go on with the very same rows.
"""

import functools

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 8


def mix(values: np.ndarray, key: int | UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """A 64-bit hash of each value under `key`, or under its own one (the finaliser of splitmix64, twice).

    Example:
        >>> mix(np.arange(2), 0).tolist() == mix(np.arange(2), 0).tolist()
        True
    """
    hashed = values.astype(np.uint64) + (np.uint64(key & 0xFFFFFFFFFFFFFFFF) if isinstance(key, int) else key)
    for _ in range(2):
        hashed = hashed + np.uint64(0x9E3779B97F4A7C15)
        hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hashed = hashed ^ (hashed >> np.uint64(31))
    return hashed


def fold(*numbers: int) -> int:
    """One 64-bit key from several numbers, such as a seed, a source and an epoch."""
    key = 0
    for number in numbers:
        key = int(mix(np.array([number & 0xFFFFFFFFFFFFFFFF], np.uint64), key)[0])
    return key


def fold_each(key: int, *columns: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """One key for each row of some columns of numbers: fold(..., a, b) is fold_each(fold(...), [a], [b])[0].

    Example:
        >>> fold_each(fold(7), np.array([3]), np.array([4])).tolist() == [fold(7, 3, 4)]
        True
    """
    keys: int | np.ndarray = key
    for column in columns:
        keys = mix(column, keys)
    assert not isinstance(keys, int), "no column"
    return keys


@functools.lru_cache(maxsize=256)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(fold(key, number) for number in range(2 * _ROUNDS))


def permute(indices: Int64[np.ndarray, " n"], size: int, *, key: int) -> Int64[np.ndarray, " n"]:
    """Permute each of `indices` by the permutation of 0..size-1 that `key` names; no table is made.

    A Feistel network on pairs (left, right) with left < a, right < b and a * b just above `size`, repeated for the few
    results that are not below `size`.

    Example:
        >>> sorted(permute(np.arange(10), 10, key=3).tolist()) == list(range(10))
        True
    """
    assert size > 0 and (len(indices) == 0 or (indices.min() >= 0 and indices.max() < size)), "index out of range"
    b = int(np.ceil(np.sqrt(size)))
    a = -(-size // b)
    keys = _round_keys(key)
    result = indices.astype(np.int64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = np.divmod(result[todo].astype(np.uint64), np.uint64(b))
        for number in range(_ROUNDS):
            left = (left + mix(right, keys[2 * number]) % np.uint64(a)) % np.uint64(a)
            right = (right + mix(left, keys[2 * number + 1]) % np.uint64(b)) % np.uint64(b)
        result[todo] = (left * np.uint64(b) + right).astype(np.int64)
        todo = todo[result[todo] >= size]
    return result


def permute_each(
    indices: Int64[np.ndarray, " n"], sizes: Int64[np.ndarray, " n"], *, keys: UInt64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """`permute` with a size and a key for each index, all at once.

    Example:
        >>> at, sizes, keys = np.array([4, 0]), np.array([10, 3]), np.array([3, 5], np.uint64)
        >>> permute_each(at, sizes, keys=keys).tolist() == [*permute(at[:1], 10, key=3), *permute(at[1:], 3, key=5)]
        True
    """
    assert len(indices) == 0 or (indices.min() >= 0 and (indices < sizes).all()), "index out of range"
    b = np.ceil(np.sqrt(sizes)).astype(np.int64)
    left_sizes, right_sizes = (-(-sizes // np.maximum(b, 1))).astype(np.uint64), b.astype(np.uint64)
    first = mix(keys, 0)
    result = indices.astype(np.int64)
    todo = np.arange(len(result))
    while len(todo):
        a, b, start = left_sizes[todo], right_sizes[todo], first[todo]
        left, right = np.divmod(result[todo].astype(np.uint64), b)
        for number in range(_ROUNDS):
            left = (left + mix(right, mix(np.array([2 * number]), start)) % a) % a
            right = (right + mix(left, mix(np.array([2 * number + 1]), start)) % b) % b
        result[todo] = (left * b + right).astype(np.int64)
        todo = todo[result[todo] >= sizes[todo]]
    return result
