"""The order of a stream that is too large to shuffle: blocks by a keyed permutation, samples within windows of blocks.

N samples stand in blocks of `block` each, the last one shorter. The stream is endless: pass e (from 0) goes through all
blocks once, in an order of its own. Of this sequence of blocks logical worker v of V has every V-th, from the v-th on;
it mixes the samples of `window` of its blocks at a time. So at any time V x window x block samples are mixed, each is
met once a pass, and what a worker has at slot t is arithmetic: the state is t alone, and memory does not grow with N.

A slot of the short last block that has no sample is a hole: it makes a batch of its pass smaller, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onefold.data.sampler import permuted
from onefold.errors import BadArgument

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BlockOrder:
    """Which samples logical worker v has at its slots; a function of these numbers alone."""

    num_samples: int
    block: int
    workers: int  # V, fixed for the life of a run
    window: int  # blocks
    seed: int

    def __post_init__(self) -> None:
        if min(self.num_samples, self.block, self.workers, self.window) < 1:
            raise BadArgument(f"{self}: expected numbers of 1 or more")

    @property
    def num_blocks(self) -> int:
        """Blocks of a pass."""
        return -(-self.num_samples // self.block)

    def at(self, v: int, first: int, count: int) -> tuple[Ints, Ints]:
        """(pass, sample) of the slots first, first + 1, ... of logical worker v; holes left out."""
        slots = np.arange(first, first + count, dtype=np.int64)
        size = self.window * self.block
        inside = np.empty_like(slots)
        for window in np.unique(slots // size).tolist():
            here = slots // size == window
            inside[here] = permuted(slots[here] % size, size, f"window {self.seed} {v} {window}")
        places = v + self.workers * (slots // size * self.window + inside // self.block)
        passes, blocks = self._blocks(places)
        samples = blocks * self.block + inside % self.block
        there = samples < self.num_samples
        return passes[there], samples[there]

    def window_of(self, v: int, slot: int) -> tuple[int, Ints]:
        """The window that a slot of logical worker v lies in, and the blocks (from 0) that it is made of."""
        window = slot // (self.window * self.block)
        places = v + self.workers * (window * self.window + np.arange(self.window, dtype=np.int64))
        return window, self._blocks(places)[1]

    def _blocks(self, places: Ints) -> tuple[Ints, Ints]:
        """(pass, block) at places of the endless sequence."""
        passes, within = np.divmod(places, self.num_blocks)
        blocks = np.empty_like(within)
        for n in np.unique(passes).tolist():
            blocks[passes == n] = permuted(within[passes == n], self.num_blocks, f"blocks {self.seed} {n}")
        return passes, blocks
