"""An ONNX file in int8, by ONNX Runtime's own tool: for files whose torch network is not there to quantize."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from onefold.advisor.onnx_graph import OnnxGraph
from onefold.errors import BadArgument
from onefold.runtimes.base import first_error_line, import_vendor_package, suppress_output
from onefold.runtimes.onnx import load
from onefold.runtimes.reference_logits import Floats

_FEWEST_OPSET = 13  # from which on weights have a scale a channel


def quantize_onnx(content: bytes, images: Floats) -> bytes:
    """Quantize a float ONNX file statically, in QDQ form, one scale a channel, calibrated on images (N, C, H, W).

    Raises BadArgument where the tool does not take the file.
    """
    graph = OnnxGraph(content)
    if graph.opset < _FEWEST_OPSET:
        raise BadArgument(f"int8 needs opset {_FEWEST_OPSET} or later, this file has {graph.opset}")
    load({"model.onnx": content}, precision="fp32", threads=1).close()  # which imports the package as it should be
    tool = import_vendor_package("onnxruntime.quantization", extra="onnx")
    batch, name = graph.input_shape()[0] or 1, graph.inputs[0].name
    parts = np.split(images[: len(images) // batch * batch], max(1, len(images) // batch))
    try:
        with TemporaryDirectory() as temporary, suppress_output():
            before, after = Path(temporary) / "before.onnx", Path(temporary) / "after.onnx"
            before.write_bytes(content)
            tool.quantize_static(
                before,
                after,
                _reader(tool, name, parts),
                quant_format=tool.QuantFormat.QDQ,
                per_channel=True,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
            )
            return after.read_bytes()
    except Exception as error:
        raise BadArgument(f"ONNX Runtime cannot quantize this file: {first_error_line(error)}") from error


def _reader(tool: Any, name: str, parts: list[Floats]) -> Any:
    """The images as the tool asks for them: one batch a call, then None."""
    batches: Iterator[Floats] = iter(parts)

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc]  # a class of the vendor's
        def get_next(self) -> dict[str, Floats] | None:
            part = next(batches, None)
            return None if part is None else {name: np.ascontiguousarray(part)}

    return Reader()
