"""The passes over the batch that the `moments` route needs, and who does them.

Reading order: `passes` (what a back end does), `reference` (plain torch), `cpu` with `build` and `*.cpp`, `algebra`
(what lies between the passes, compiled), `gpu`.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from onefold.reparam.kernels import cpu
from onefold.reparam.kernels.backend import Geometry, Passes
from onefold.reparam.kernels.reference import Reference as Reference


def passes_for(x: Tensor, geometry: Geometry, outputs: int) -> Passes:
    """The fastest back end for such a batch and unit of so many output channels; plain torch where there is none."""
    if x.is_cuda and _has_triton():
        from onefold.reparam.kernels import triton_pointwise

        if triton_pointwise.supports(x, geometry):
            return triton_pointwise.Triton()
    known = geometry.groups in (1, outputs) and cpu.supports(x, geometry)
    return cpu.Compiled() if known else Reference()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
