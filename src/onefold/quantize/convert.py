"""Int8 models: made by calibration on images (`quantize`), or from parameters kept with the weights (`convert`).

Both insert quantize and dequantize operations into the traced graph, of the kind in which PyTorch passes quantized
networks to other runtimes (`quantized_decomposed`): the values between them are float and exactly representable, so
PyTorch simulates what a device computes in integers, and each converter finds the parameters in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the operations
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from onefold.errors import BadArgument
from onefold.quantize.calibrate import CalibrationResult, QuantizedLayer, calibrate, quantize_layer
from onefold.quantize.cross_layer_equalization import equalize_, set_clamp_bounds_
from onefold.quantize.graph import (
    CLAMP_OPS,
    Layer,
    aten,
    clamp_bounds,
    find_layers,
    get_parameter,
    quantized_activations,
    set_parameter,
    trace,
    zero_padding_input,
)
from onefold.quantize.integer_model import IntegerModel
from onefold.quantize.qparams import QMAX, QMIN, LayerError, ModelQParams, QParams, QuantizationMethod

BATCH_SIZE = 4
_DEFAULT_METHOD = QuantizationMethod()
_ops = torch.ops.quantized_decomposed
_WEIGHT_QMAX = 127


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedModel:
    """An int8 model - images (B, C, H, W) to logits (B, N) as a device computes them - and how it was made.

    `images` is the number that it was calibrated on, 0 where it was trained as an int8 model.
    """

    model: IntegerModel
    method: QuantizationMethod
    layers: tuple[LayerError, ...]
    images: int

    @property
    def graph(self) -> GraphModule:
        """The same with quantize and dequantize operations, which runtimes' converters read."""
        return self.model.network


def quantize(
    model: nn.Module,
    images: Tensor,
    method: QuantizationMethod = _DEFAULT_METHOD,
    traced: GraphModule | None = None,
) -> QuantizedModel:
    """Quantize a fused network (in eval mode; it is not changed), calibrated on `images` (B, C, H, W), B >= 2.

    The images are as the network gets them; one or two hundred of the kind that it will see are enough. `traced` is
    the network traced already, where it was, and is changed in place. Raises BadArgument.
    """
    if any(module.training for module in model.modules()):
        raise BadArgument("the model is in train mode, where its logits depend on the batch; call model.eval() first")
    if images.dim() != 4 or len(images) < 2:
        raise BadArgument(f"expected two images or more (B, C, H, W) to calibrate with, got {tuple(images.shape)}")
    graph, batches = traced or trace(model, images[:2]), images.split(BATCH_SIZE)
    equalize_(graph, batches, method.equalize)
    return quantize_equalized_(graph, batches, method)


def quantize_equalized_(graph: GraphModule, batches: Sequence[Tensor], method: QuantizationMethod) -> QuantizedModel:
    """Quantize a network that is traced, and equalized by `method.equalize`, in place: see `quantize`."""
    calibration = calibrate(graph, batches, method)
    insert_qdq_(graph, calibration)
    images = sum(len(batch) for batch in batches)
    return QuantizedModel(model=IntegerModel(graph), method=method, layers=calibration.reports, images=images)


@torch.no_grad()
def convert(fused: nn.Module, params: ModelQParams, shape: tuple[int, int, int]) -> IntegerModel:
    """Convert a fused network in eval mode to an int8 model; `shape` (C, H, W) is that of its images.

    The weights are rounded to nearest, so the same weights and parameters give the same bits on any machine. Raises
    BadArgument where the parameters are those of another network.
    """
    graph = trace(fused, torch.zeros(2, *shape))
    to_quantize = [layer for layer in find_layers(graph) if layer.name not in params.skip_layers]
    names = activation_names(to_quantize)
    if set(names.values()) != set(params.activations):
        unknown = sorted(set(names.values()) ^ set(params.activations))[0]
        raise BadArgument(
            f"the quantization parameters are those of another network: {unknown} is not in both; calibrate this one"
        )
    activations = {node: params.activations[name] for node, name in names.items()}
    quantized = {}
    for layer in to_quantize:
        weight = get_parameter(graph, layer.weight)
        bias = weight.new_zeros(len(weight)) if layer.bias is None else get_parameter(graph, layer.bias)
        quantized[layer] = quantize_layer(params, weight, bias, activations[layer.source].scale)
    insert_qdq_(graph, CalibrationResult(activations, quantized, ()))
    return IntegerModel(graph)


def extract_qparams(calibration: CalibrationResult, method: QuantizationMethod) -> ModelQParams:
    """Extract the parameters of a calibrated network, its activations by name."""
    names = activation_names([*calibration.layers])
    return ModelQParams(
        activations={names[node]: qparams for node, qparams in calibration.activations.items()},
        weights=method.weights,
        weight_qmax=method.weight_qmax,
        skip_layers=method.skip_layers,
    )


def activation_names(of_layers: list[Layer]) -> dict[Node, str]:
    """Name each quantized activation after the first of these layers that reads or computes it."""
    names: dict[Node, str] = {}
    for layer in of_layers:
        if (unpadded := zero_padding_input(layer.source)) is not None:
            names.setdefault(unpadded, f"{layer.name}:before")
        names.setdefault(layer.source, f"{layer.name}:in")
        names.setdefault(layer.output, f"{layer.name}:out")
    return {node: names[node] for node in quantized_activations(of_layers)}


# ------------------------------------------------------------------------- calibrations that are kept


def calibration_state_dict(made: QuantizedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give all that calibration has found: the tensors of the layers, and the rest as plain values for JSON."""
    state = made.graph.state_dict()
    names = {each.name for each in made.layers}
    kept = [key for key in state if key.rpartition(".")[0] in names and not key.endswith(".weight_zero")]
    nodes = made.graph.graph.nodes
    facts = {
        "method": asdict(made.method),
        "images": made.images,
        "layers": [asdict(each) for each in made.layers],
        "activations": {
            str(node.args[0]): list(node.args[1:3]) for node in nodes if node.target is _ops.quantize_per_tensor.default
        },
        "clamps": {
            node.name: list(clamp_bounds(node.target, node.args[1:])) for node in nodes if node.target in CLAMP_OPS
        },
    }
    return {key: state[key].contiguous() for key in kept}, facts


@torch.no_grad()
def from_calibration_state_dict(
    model: nn.Module, shape: tuple[int, int, int], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> QuantizedModel:
    """Make the int8 model of a fused network again from what `calibration_state_dict` gave: the same to the bit.

    Raises BadArgument where it is of another network.
    """
    graph = trace(model, torch.zeros(2, *shape))
    nodes = {node.name: node for node in graph.graph.nodes}
    method = QuantizationMethod(**{**facts["method"], "skip_layers": tuple(facts["method"]["skip_layers"])})
    if not {*facts["activations"], *facts["clamps"]} <= set(nodes):
        raise BadArgument("the calibration is of another network")
    for name, (low, high) in facts["clamps"].items():
        set_clamp_bounds_(nodes[name], low, high)
    quantized = {}
    for layer in find_layers(graph):
        if layer.name in method.skip_layers:
            set_parameter(graph, layer.weight, tensors[f"{layer.name}.weight"])
            if layer.bias is not None:
                set_parameter(graph, layer.bias, tensors[f"{layer.name}.bias"])
            continue
        kept = (tensors[f"{layer.name}.{part}"] for part in ("weight_int8", "weight_scale", "bias"))
        q, scales, bias = (tensor.float() for tensor in kept)
        if q.shape != get_parameter(graph, layer.weight).shape or not scales.shape == bias.shape == q.shape[:1]:
            raise BadArgument("the calibration is of another network")
        quantized[layer] = QuantizedLayer(q, scales, bias)
    activations = {nodes[name]: QParams(*qparams) for name, qparams in facts["activations"].items()}
    reports = tuple(LayerError(**each) for each in facts["layers"])
    insert_qdq_(graph, CalibrationResult(activations, quantized, reports))
    return QuantizedModel(model=IntegerModel(graph), method=method, layers=reports, images=facts["images"])


# -------------------------------------------------------------- quantize and dequantize operations


def insert_qdq_(graph: GraphModule, calibration: CalibrationResult) -> None:
    """Insert quantize and dequantize operations into the graph, in place, at its activations and on its weights."""
    for layer, quantized in calibration.layers.items():
        _store_weight_(graph, layer, quantized)
    for node, qparams in calibration.activations.items():
        if node.target in CLAMP_OPS:
            # Quantization itself clamps at the top of its range; a ReLU is fused into its layer by every runtime.
            low, high = clamp_bounds(node.target, node.args[1:])
            if low == 0.0 and qparams.high <= high * (1 + 1e-5):
                node.target, node.args = aten.relu.default, node.args[:1]
        _quantize_node_(graph, node, qparams)
    graph.graph.lint()
    graph.recompile()


def _store_weight_(graph: GraphModule, layer: Layer, quantized: QuantizedLayer) -> None:
    """Store a weight as int8 with its scales, dequantized where it is read, and the rounded bias."""
    module = graph.get_submodule(layer.name)
    module.register_buffer("weight_int8", quantized.q.to(torch.int8))
    module.register_buffer("weight_scale", quantized.scales.float())
    module.register_buffer("weight_zero", torch.zeros(len(quantized.scales), dtype=torch.int64))
    old = layer.node.args[1]
    assert isinstance(old, Node)
    nodes = graph.graph
    with nodes.inserting_before(layer.node):
        parts = [nodes.get_attr(f"{layer.name}.{name}") for name in ("weight_int8", "weight_scale", "weight_zero")]
        weight = nodes.call_function(
            _ops.dequantize_per_channel.default, (*parts, 0, -_WEIGHT_QMAX, _WEIGHT_QMAX, torch.int8)
        )
        if layer.bias is None:
            module.bias = nn.Parameter(quantized.bias, requires_grad=False)
            bias = nodes.get_attr(f"{layer.name}.bias")
            layer.node.args = (layer.node.args[0], weight, bias, *layer.node.args[3:])
        else:
            set_parameter(graph, layer.bias, quantized.bias)
            layer.node.update_arg(1, weight)
    if not old.users:
        nodes.erase_node(old)
        del module.weight


def _quantize_node_(graph: GraphModule, node: Node, qparams: QParams) -> None:
    """Let all readers of a node read it quantized and dequantized."""
    nodes = graph.graph
    readers = list(node.users)
    arguments = (qparams.scale, qparams.zero_point, QMIN, QMAX, torch.int8)
    with nodes.inserting_after(node):
        quantized = nodes.call_function(_ops.quantize_per_tensor.default, (node, *arguments))
    with nodes.inserting_after(quantized):
        dequantized = nodes.call_function(_ops.dequantize_per_tensor.default, (quantized, *arguments))
    for reader in readers:
        reader.replace_input_with(node, dequantized)
