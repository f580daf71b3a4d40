"""What a Mac would compute of a Core ML package, in PyTorch: the program is read from its file and run call by call.

Written after the definitions of the operations in coremltools (`help(mb.quantize)` and so on), not after our converter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

TYPES = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "uint8": torch.uint8}
LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def axes(x: torch.Tensor, value: Any, axis: Any) -> torch.Tensor:
    """A scale or zero so that it meets the axis of x that it belongs to."""
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.dim() == 0:
        return value
    return value.reshape([-1 if at == int(axis) else 1 for at in range(x.dim())])


def quantize(i: Mapping[str, Any]) -> torch.Tensor:
    low, high = LIMITS[i["output_dtype"]]
    whole = torch.round(i["input"].double() / axes(i["input"], i["scale"], i.get("axis")))
    whole = whole + axes(i["input"], i.get("zero_point", 0), i.get("axis"))
    return whole.clamp(low, high).to(TYPES[i["output_dtype"]])


def dequantize(i: Mapping[str, Any]) -> torch.Tensor:
    x, scale = i["input"], i["scale"]
    value = (x.double() - axes(x, i.get("zero_point", 0), i.get("axis"))) * axes(x, scale, i.get("axis"))
    return value.to(torch.as_tensor(scale).dtype)


def stored(i: Mapping[str, Any]) -> torch.Tensor:
    return dequantize({"input": i["quantized_data"], **{name: i[name] for name in ("scale", "zero_point", "axis")}})


def conv(i: Mapping[str, Any]) -> torch.Tensor:
    x = i["x"]
    if i["pad_type"] == "custom":
        top, bottom, left, right = (int(n) for n in i["pad"])
        x = F.pad(x, (left, right, top, bottom))
    bias = i["bias"].to(x.dtype) if i.get("bias") is not None else None
    geometry = {"stride": i["strides"].tolist(), "dilation": i["dilations"].tolist(), "groups": int(i["groups"])}
    return F.conv2d(x, i["weight"].to(x.dtype), bias, **geometry)


def mean(i: Mapping[str, Any]) -> torch.Tensor:
    return i["x"].mean([int(axis) for axis in i["axes"]], bool(i["keep_dims"]))


OPERATIONS: dict[str, Callable[[Mapping[str, Any]], torch.Tensor]] = {
    "add": lambda i: i["x"] + i["y"],
    "cast": lambda i: i["x"].to(TYPES[i["dtype"]]),
    "clip": lambda i: i["x"].clamp(float(i["alpha"]), float(i["beta"])),
    "constexpr_affine_dequantize": stored,
    "conv": conv,
    "dequantize": dequantize,
    "linear": lambda i: F.linear(i["x"], i["weight"], i.get("bias")),
    "mul": lambda i: i["x"] * i["y"],
    "pad": lambda i: F.pad(i["x"], [int(n) for pair in i["pad"].reshape(-1, 2).flip(0) for n in pair]),
    "quantize": quantize,
    "reduce_mean": mean,
    "relu": lambda i: F.relu(i["x"]),
    "relu6": lambda i: F.relu6(i["x"]),
    "reshape": lambda i: i["x"].reshape(i["shape"].tolist()),
    "sigmoid": lambda i: torch.sigmoid(i["x"]),
    "sigmoid_hard": lambda i: (float(i["alpha"]) * i["x"] + float(i["beta"])).clamp(0, 1),
}


class Machine:
    """Stands in for coremltools.models.MLModel: opens a package from its folder, and answers one image at a time."""

    def __init__(self, path: str, compute_units: Any = None) -> None:
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load

        spec = coremltools.utils.load_spec(path)
        weights = str(Path(path) / "Data/com.apple.CoreML/weights")
        program = load(spec, spec.specificationVersion, file_weights_dir=weights)
        self.function = program.functions["main"]
        self.compute_units = compute_units
        self.metadata = dict(spec.description.metadata.userDefined)

    def predict(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Takes and gives what MLModel.predict does."""
        values = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
        assert [tuple(v.shape) for v in self.function.inputs.values()] == [tuple(a.shape) for a in given.values()]
        for operation in self.function.operations:
            if operation.op_type == "const":
                values[operation.outputs[0].name] = constant(operation.outputs[0].val)
                continue
            inputs = {name: values[var.name] for name, var in operation.inputs.items() if not isinstance(var, tuple)}
            values[operation.outputs[0].name] = OPERATIONS[operation.op_type](inputs)
        return {var.name: values[var.name].numpy() for var in self.function.outputs}


def constant(value: Any) -> Any:
    return value if isinstance(value, str) else torch.from_numpy(np.array(value))
