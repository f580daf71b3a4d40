"""The verb: a fused network and photos in, a network of 8 bits out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule

from onefold.errors import BadArgument
from onefold.quantize.calibrate import calibrate
from onefold.quantize.convert import build_
from onefold.quantize.equalize import equalize_
from onefold.quantize.graph import trace
from onefold.quantize.integer import WholeNumbers
from onefold.quantize.method import LayerReport, Method

BATCH = 16
_METHOD = Method()


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """A network of 8 bits: images (B, C, H, W) to logits (B, N) as a device computes them; how it was made; its losses.

    `graph` is the same network with quantize and dequantize operations, which runtimes' converters read.
    """

    model: WholeNumbers
    method: Method
    layers: tuple[LayerReport, ...]
    images: int

    @property
    def graph(self) -> GraphModule:
        """The network as converters read it."""
        return self.model.network


def quantize(model: nn.Module, images: Tensor, method: Method = _METHOD) -> Quantized:
    """Quantize a fused network (in eval mode, left as it is) by what it does on `images` (B, C, H, W), B >= 2.

    The images are as the network sees them; a hundred or two of the kind that it will meet are enough.
    Raises BadArgument.
    """
    if any(module.training for module in model.modules()):
        raise BadArgument("the model is in train mode, where its answer depends on the batch; call model.eval() first")
    if images.dim() != 4 or len(images) < 2:
        raise BadArgument(f"expected two images or more (B, C, H, W) to calibrate with, came {tuple(images.shape)}")
    graph, batches = trace(model, images[:2]), images.split(BATCH)
    equalize_(graph, batches, method.equalize)
    found = calibrate(graph, batches, method)
    return Quantized(model=WholeNumbers(build_(graph, found)), method=method, layers=found.reports, images=len(images))
