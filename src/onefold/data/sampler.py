"""The order of samples and their random generators as functions of (seed, epoch, position): there is no state to save.

`shuffled_indices` is a keyed permutation of 0..n-1 that is computed position by position: a Feistel network on the next
even number of bits, applied again until the value falls below n (Black and Rogaway, Ciphers with Arbitrary Finite
Domains, 2002). Memory does not grow with n, any position of any epoch costs the same, and no library's version can
change it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 12
_WORD = (1 << 64) - 1


def shuffled_indices(positions: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Give the samples (0..n-1) at positions (0..n-1) of an epoch's order; all positions give every sample once."""
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    digest = hashlib.shake_256(f"order {seed} {epoch}".encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    # The network permutes 0..4^half-1. Following its cycle from a value below n back to one below n permutes 0..n-1;
    # 4^half is at most 4 n, so a few rounds of this loop are enough.
    while len(outside):
        values[outside] = _feistel(values[outside], half, keys)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64)


def sample_generator(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Give the random generator of one sample in one epoch: a Philox stream of its own."""
    counter = np.array([0, 0, epoch, sample], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed & _WORD, 0], np.uint64)))


def batch_generator(seed: int, epoch: int, step: int, rank: int) -> np.random.Generator:
    """Give the random generator of one rank's batch at one step, apart from those of the samples by its key."""
    counter = np.array([0, rank, epoch, step], np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed & _WORD, 1], np.uint64)))


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_hash(right ^ key) & mask)
    return (left << bits) | right


def _hash(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit words by splitmix64's finalizer (Steele, Lea and Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
