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


def layer_norm(i: Mapping[str, Any]) -> torch.Tensor:
    assert i["axes"].tolist() == [-1]
    return F.layer_norm(i["x"], i["x"].shape[-1:], i["gamma"], i["beta"], float(i["epsilon"]))


def matmul(i: Mapping[str, Any]) -> torch.Tensor:
    sides = (i[side].mT if bool(i[f"transpose_{side}"]) else i[side] for side in "xy")
    return torch.matmul(*sides)


def sliced(i: Mapping[str, Any]) -> torch.Tensor:
    x, rank = i["x"], i["x"].dim()
    ends, begins = (i.get(name, torch.zeros(rank, dtype=torch.bool)).tolist() for name in ("end_mask", "begin_mask"))
    strides = i["stride"].tolist() if "stride" in i else [1] * rank
    parts = [
        slice(None if begins[at] else int(i["begin"][at]), None if ends[at] else int(i["end"][at]), strides[at])
        for at in range(rank)
    ]
    drop = i["squeeze_mask"].tolist() if "squeeze_mask" in i else [False] * rank
    return x[tuple(int(i["begin"][at]) if drop[at] else parts[at] for at in range(rank))]


def expand(i: Mapping[str, Any]) -> torch.Tensor:
    x = i["x"]
    for axis in sorted(int(axis) for axis in i["axes"]):
        x = x.unsqueeze(axis)
    return x


OPERATIONS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "add": lambda i: i["x"] + i["y"],
    "cast": lambda i: i["x"].to(TYPES[i["dtype"]]),
    "clip": lambda i: i["x"].clamp(float(i["alpha"]), float(i["beta"])),
    "constexpr_affine_dequantize": stored,
    "concat": lambda i: torch.cat(list(i["values"]), int(i["axis"])),
    "conv": conv,
    "dequantize": dequantize,
    "expand_dims": expand,
    "gelu": lambda i: F.gelu(i["x"]),
    "layer_norm": layer_norm,
    "linear": lambda i: F.linear(i["x"], i["weight"], i.get("bias")),
    "matmul": matmul,
    "maximum": lambda i: torch.maximum(i["x"], i["y"]),
    "mul": lambda i: i["x"] * i["y"],
    "pad": lambda i: F.pad(i["x"], [int(n) for pair in i["pad"].reshape(-1, 2).flip(0) for n in pair]),
    "quantize": quantize,
    "real_div": lambda i: i["x"] / i["y"],
    "reduce_max": lambda i: i["x"].amax([int(axis) for axis in i["axes"]], bool(i["keep_dims"])),
    "reduce_mean": mean,
    "relu": lambda i: F.relu(i["x"]),
    "relu6": lambda i: F.relu6(i["x"]),
    "reshape": lambda i: i["x"].reshape(i["shape"].tolist()),
    "sigmoid": lambda i: torch.sigmoid(i["x"]),
    "sigmoid_hard": lambda i: (float(i["alpha"]) * i["x"] + float(i["beta"])).clamp(0, 1),
    "slice_by_index": sliced,
    "softmax": lambda i: torch.softmax(i["x"], int(i["axis"])),
    "split": lambda i: i["x"].split(i["split_sizes"].tolist(), int(i["axis"])),
    "squeeze": lambda i: i["x"].squeeze([int(axis) for axis in i["axes"]]),
    "sub": lambda i: i["x"] - i["y"],
    "thresholded_relu": lambda i: torch.where(i["x"] >= float(i["alpha"]), i["x"], 0.0),
    "transpose": lambda i: i["x"].permute(i["perm"].tolist()),
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
            inputs = {name: read(var, values) for name, var in operation.inputs.items()}
            answer = OPERATIONS[operation.op_type](inputs)
            answers = answer if isinstance(answer, tuple) else (answer,)
            values |= {var.name: value for var, value in zip(operation.outputs, answers, strict=True)}
        return {var.name: values[var.name].numpy() for var in self.function.outputs}


def read(var: Any, values: Mapping[str, Any]) -> Any:
    return tuple(values[one.name] for one in var) if isinstance(var, (tuple, list)) else values[var.name]


def constant(value: Any) -> Any:
    return value if isinstance(value, str) else torch.from_numpy(np.array(value))
