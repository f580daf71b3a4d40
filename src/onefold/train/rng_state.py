"""Random states of python, numpy and torch: seeded together, saved in a checkpoint, and forked for a block.

The network's random numbers (dropout) come from the global states. Loading and evaluation run in `forked_rng`, seeded
by where in the run they are, so that they neither move those states nor depend on when the run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The global random states of one process: tensors, and numbers that JSON can hold."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """Give the states as they are now; `device` adds its own if it is a GPU."""
        version, words, gauss = random.getstate()
        legacy: Any = np.random.get_state(legacy=False)
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        }
        if device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(device)
        numbers = {
            "python": [version, gauss],
            "numpy": [int(legacy["state"]["pos"]), int(legacy["has_gauss"]), float(legacy["gauss"])],
        }
        return cls(tensors=tensors, numbers=numbers)

    def restore(self, device: torch.device) -> None:
        """Make the global states what they were."""
        version, gauss = self.numbers["python"]
        random.setstate((version, tuple(self.tensors["python"].tolist()), gauss))
        position, has_gauss, cached = self.numbers["numpy"]
        key = self.tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", key, position, has_gauss, cached))
        torch.set_rng_state(self.tensors["torch"])
        if device.type == "cuda" and "cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["cuda"], device)


def seed_everything(seed: int, *key: int) -> None:
    """Seed python, numpy and torch with `seed`, or with a hash of it and a key (rank, step, ...)."""
    mixed = int(np.random.SeedSequence((seed, *key)).generate_state(1)[0]) if key else seed
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


@contextmanager
def forked_rng(device: torch.device, seed: int, *key: int) -> Iterator[None]:
    """A block with random states of its own, seeded by `seed` and a key; the global states are untouched by it."""
    before = RandomState.capture(device)
    seed_everything(seed, *key)
    try:
        yield
    finally:
        before.restore(device)
