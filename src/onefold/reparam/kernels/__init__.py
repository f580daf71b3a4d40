"""The four passes over the batch that the `moments` route needs, and which back end does them.

`backend` says what a back end is, `reference` is the one in plain torch with which the others agree.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from onefold.reparam.kernels import cpu, cpu_bfloat16
from onefold.reparam.kernels.base import Backend, Geometry
from onefold.reparam.kernels.reference import ReferenceBackend as ReferenceBackend


def select_backend(x: Tensor, geometry: Geometry, outputs: int) -> Backend:
    """The fastest back end for a batch x and a unit of `outputs` channels; plain torch where no other takes them."""
    if x.is_cuda and _has_triton():
        from onefold.reparam.kernels import triton_base, triton_depthwise, triton_pointwise

        if triton_base.supports(x, geometry):
            return (
                triton_pointwise.TritonPointwise()
                if geometry == triton_base.POINTWISE
                else triton_depthwise.TritonDepthwise()
            )
    if not (geometry.groups in (1, outputs) and cpu.supports(x, geometry)):
        return ReferenceBackend()
    return cpu_bfloat16.PointwiseBfloat16Backend() if cpu_bfloat16.supports(x, geometry) else cpu.CppBackend()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
