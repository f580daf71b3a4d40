"""The order of samples and their random generators: every sample once, the same on every machine."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onefold.data.sampler import sample_generator, shuffled_indices


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-5, 1 << 62), epoch=st.integers(0, 1 << 30))
def test_an_epoch_holds_every_sample_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled_indices(np.arange(n), n, seed=seed, epoch=epoch).tolist()) == list(range(n))


def test_order_is_fixed_for_ever_and_changes_with_epoch_and_seed() -> None:
    assert shuffled_indices(np.arange(10), 10, seed=0, epoch=0).tolist() == GOLDEN_ORDER
    orders = {
        tuple(shuffled_indices(np.arange(1000), 1000, seed=s, epoch=e).tolist()) for s in range(5) for e in range(5)
    }
    assert len(orders) == 25


GOLDEN_ORDER = [5, 6, 3, 9, 8, 4, 2, 0, 7, 1]


def test_order_is_as_even_as_chance() -> None:
    n, epochs = 20, 500
    orders = np.stack([shuffled_indices(np.arange(n), n, seed=5, epoch=e) for e in range(epochs)])
    table = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi2 = ((table - epochs / n) ** 2 / (epochs / n)).sum()
    assert chi2 < 361 + 4 * math.sqrt(2 * 361)  # (n - 1)^2 degrees of freedom
    follows = np.bincount((np.diff(orders, axis=1) % n).ravel())[1:]
    assert follows.max() / follows.min() < 1.4


def test_order_needs_no_memory_for_a_thousand_million() -> None:
    n = 5_000_000_000
    some = shuffled_indices(np.arange(n - 100_000, n), n, seed=0, epoch=0)
    assert len(np.unique(some)) == 100_000
    assert 0 <= some.min() < some.max() < n
    assert abs(some.mean() / n - 0.5) < 0.005


def test_each_sample_of_each_epoch_has_its_own_stream() -> None:
    streams = {
        (s, e, i): sample_generator(s, e, i).random(1000) for s in (0, 1) for e in (0, 1) for i in (0, 1, 1 << 40)
    }
    assert len({value for stream in streams.values() for value in stream}) == 12_000
    np.testing.assert_array_equal(sample_generator(1, 0, 1).random(1000), streams[1, 0, 1])
    assert sample_generator(0, 0, 0).random(2).tolist() == GOLDEN_RANDOM


GOLDEN_RANDOM = [0.011546754286331562, 0.24154919656271812]
