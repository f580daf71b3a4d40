"""Grids of 8-bit numbers: where a tensor's values may lie, and how its range is chosen.

A value on a grid is scale * (q - zero) with a whole q in lo..hi. Activations have one grid a tensor, with a zero of its
own (asymmetric); weights have one scale a channel or a tensor, and the zero 0 (symmetric). Rounding is to nearest, ties
to even, as in every runtime's QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Ranges = Literal["minmax", "percentile", "mse", "entropy"]
LOWEST, HIGHEST = -128, 127
_BINS = 2048
_TRIES = 60
_PERCENTILE = 0.9999


@dataclass(frozen=True)
class Grid:
    """The grid of an activation: int8, one for the whole tensor."""

    scale: float
    zero: int

    @classmethod
    def over(cls, low: float, high: float) -> Grid:
        """The grid that spans low..high and has 0 on it, so that padding with zeros is exact.

        Once the zero is whole, the step is made as long as both ends need. Were it not, -1..1 would put black and white
        pixels half-way between two steps, and each runtime would round them its own way.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        step = max(high - low, 1e-8) / (HIGHEST - LOWEST)
        zero = min(max(round(LOWEST - low / step), LOWEST), HIGHEST)
        ends = [-low / (zero - LOWEST) if zero > LOWEST else 0.0, high / (HIGHEST - zero) if zero < HIGHEST else 0.0]
        return cls(float(np.float32(max(step, *ends))), zero)

    @property
    def low(self) -> float:
        """The least value."""
        return (LOWEST - self.zero) * self.scale

    @property
    def high(self) -> float:
        """The greatest value."""
        return (HIGHEST - self.zero) * self.scale

    def snap(self, x: Tensor) -> Tensor:
        """The nearest values on the grid, any shape, float in and out."""
        q = torch.round(x * (1.0 / self.scale)) + self.zero
        return (q.clamp_(LOWEST, HIGHEST) - self.zero) * self.scale


def choose(chunks: Sequence[Tensor], ranges: Ranges) -> Grid:
    """The grid for a tensor whose values are the chunks': by extremes, percentile, squared error or entropy.

    Sources: the percentile and the entropy as in Wu et al., arXiv 2004.09602; the entropy's search as in Migacz, "8-bit
    inference with TensorRT" (GTC 2017).
    """
    low = min(float(chunk.min()) for chunk in chunks)
    high = max(float(chunk.max()) for chunk in chunks)
    if ranges == "minmax" or not high > low:
        return Grid.over(low, high)
    counts = sum(torch.histc(chunk, _BINS, low, high).double() for chunk in chunks)
    assert isinstance(counts, Tensor)
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    if ranges == "percentile":
        return _by_percentile(counts, edges)
    loss = _squared_error if ranges == "mse" else _divergence
    return _by_search(counts, edges, loss)


def _by_percentile(counts: Tensor, edges: Tensor) -> Grid:
    """All but one in ten thousand values: of a tensor with two tails, half of those at each."""
    share = torch.cumsum(counts, 0) / counts.sum()
    tail = 1 - _PERCENTILE
    one_sided = float(edges[0]) >= 0
    below = 0.0 if one_sided else tail / 2
    first = int(torch.searchsorted(share, below))
    last = int(torch.searchsorted(share, 1 - (tail - below)))
    return Grid.over(float(edges[first]), float(edges[min(last + 1, len(edges) - 1)]))


def _by_search(counts: Tensor, edges: Tensor, loss: Callable[[Tensor, Tensor, Grid], float]) -> Grid:
    """The best of narrower and narrower ranges, both ends moved in proportion."""
    centres = (edges[1:] + edges[:-1]) / 2
    low, high = float(edges[0]), float(edges[-1])
    tried = [Grid.over(low * share, high * share) for share in np.linspace(1.0, 0.15, _TRIES)]
    return min(tried, key=lambda grid: loss(counts, centres, grid))


def _squared_error(counts: Tensor, centres: Tensor, grid: Grid) -> float:
    # Within a bin, values spread evenly: a term that is the same for all grids is left out.
    return float((counts * (grid.snap(centres) - centres) ** 2).sum())


def _divergence(counts: Tensor, centres: Tensor, grid: Grid) -> float:
    """KL(true, on the grid): each level's mass is spread over the bins that it stands for."""
    inside = (centres >= grid.low - grid.scale / 2) & (centres <= grid.high + grid.scale / 2)
    level = (torch.round(centres / grid.scale) + grid.zero).clamp(LOWEST, HIGHEST).long() - LOWEST
    clipped = torch.where(inside, counts, 0.0)
    true = clipped.clone()
    ends = inside.nonzero().flatten()
    true[ends[0]] += counts[: ends[0]].sum()
    true[ends[-1]] += counts[ends[-1] + 1 :].sum()
    seen = true > 0
    mass = torch.zeros(256, dtype=torch.float64).index_add_(0, level[seen], clipped[seen])
    bins = torch.zeros(256, dtype=torch.float64).index_add_(0, level[seen], torch.ones_like(clipped[seen]))
    spread = (mass / bins.clamp(min=1))[level]
    p, q = true[seen] / true.sum(), spread[seen] / spread[seen].sum()
    return float((p * torch.log(p / q.clamp(min=1e-12))).sum())


def weight_scales(kernel: Tensor, *, limit: int, per_tensor: bool, search: bool) -> Tensor:
    """One scale a row of `kernel` (O, K), positive, float32; with `per_tensor` all the same.

    `limit` is the largest whole number a weight may become. With `search` the one of least squared error.
    """
    rows = kernel.reshape(1, -1) if per_tensor else kernel
    full = (rows.abs().amax(1) / limit).clamp(min=1e-12)
    best, least = full.clone(), torch.full_like(full, torch.inf)
    for share in np.linspace(1.0, 0.6, 41) if search else (1.0,):
        scale = full * float(share)
        error = ((torch.round(rows / scale[:, None]).clamp(-limit, limit) * scale[:, None] - rows) ** 2).sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best.float().expand(len(kernel)).contiguous()
