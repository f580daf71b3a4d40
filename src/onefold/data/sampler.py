"""Order and chance as functions of (seed, epoch, position): nothing to store, nothing to replay.

`shuffled` is a keyed permutation of 0..n-1 that is computed place by place: a Feistel network on the next even number
of bits, walked until it falls below n (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Memory does not
grow with n, any place of any epoch costs the same, and no library's version can change it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 12
_WORD = (1 << 64) - 1


def shuffled(positions: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples (0..n-1) at these positions (0..n-1) of an epoch's order; all positions give every sample once."""
    return permuted(positions, n, f"order {seed} {epoch}")


def permuted(positions: NDArray[np.int64], n: int, key: str) -> NDArray[np.int64]:
    """The images of these positions (0..n-1) under the permutation of 0..n-1 that the key names."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    keys = _keys(key)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: a Philox stream of its own, apart from every other."""
    counter = np.array([0, 0, epoch, sample], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed & _WORD, 0], np.uint64)))


def batch_generator(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """The random numbers of one rank's batch at one step: a stream apart from every other, and from the samples'."""
    counter = np.array([0, rank, epoch, step], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed & _WORD, 1], np.uint64)))


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << bits) | right


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(key: str) -> NDArray[np.uint64]:
    digest = hashlib.shake_256(key.encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
