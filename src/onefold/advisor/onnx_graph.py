"""An ONNX graph to read and to rewrite: constants, the producer and the readers of each value, shapes, work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onefold.errors import BadData
from onefold.runtimes.base import first_error_line, import_vendor_package

Array = npt.NDArray[Any]
Shape = tuple[int | None, ...]


class OnnxGraph:
    """The graph of one ONNX file. Looking is cheap; what `serialize` gives is checked, sorted, and free of leftovers.

    `batch` is the number of images that shapes and work are counted for. Raises BadData for what is no ONNX network.
    """

    def __init__(self, content: bytes, batch: int = 1) -> None:
        self._onnx = import_vendor_package("onnx", extra="onnx")
        self._numpy_helper = import_vendor_package("onnx.numpy_helper", extra="onnx")
        try:
            self.model = self._onnx.load_model_from_string(content)
        except Exception as error:
            raise BadData(f"this is no ONNX file: {first_error_line(error)}") from error
        self._batch = batch
        self._num_new = 0
        self._shapes: dict[str, Shape] | None = None
        self.constants = self._read_constants()
        self.reindex()

    def _read_constants(self) -> dict[str, Array]:
        graph = self.model.graph
        constants: dict[str, Array] = {t.name: self._array(t) for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None:
                    constants[node.output[0]] = self._array(value)
        return constants

    def _array(self, tensor: Any) -> Array:
        if tensor.data_location or tensor.external_data:
            raise BadData("this ONNX file reads weights from other files: save it as one file (onnx.save)")
        value: Array = self._numpy_helper.to_array(tensor)
        return value

    def reindex(self) -> None:
        """Read producers and readers anew, after nodes were added, removed or connected otherwise."""
        graph = self.model.graph
        self.producers: dict[str, Any] = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)

    @property
    def nodes(self) -> list[Any]:
        """The nodes, as a list that stays as it is while the graph is changed."""
        return list(self.model.graph.node)

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return max((each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")), default=0)

    @property
    def inputs(self) -> list[Any]:
        """What the network is called with: its inputs that are no constants."""
        return [each for each in self.model.graph.input if each.name not in self.constants]

    @property
    def output_names(self) -> set[str]:
        """The values that the network gives."""
        return {each.name for each in self.model.graph.output}

    def input_shape(self) -> Shape:
        """The shape of the network's only input; None where a dimension is free. Raises BadData for several inputs."""
        if len(self.inputs) != 1 or len(self.model.graph.output) != 1:
            raise BadData(
                f"expected a network with one input and one output, got {len(self.inputs)} and "
                f"{len(self.model.graph.output)}: cut the file to one of each (onnx.utils.extract_model)"
            )
        kind = self.inputs[0].type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
        if len(dims) != 4 or kind.elem_type != self._onnx.TensorProto.FLOAT:
            raise BadData(
                f"expected an input of float32 images (B, C, H, W), got {len(dims)} dimensions of another kind"
            )
        return dims

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        """The value of an attribute of a node."""
        found = next((a for a in node.attribute if a.name == name), None)
        return default if found is None else self._onnx.helper.get_attribute_value(found)

    def sole_reader(self, name: str) -> Any | None:
        """The node that alone reads a value; None where there are others, or the network gives it."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.output_names else None

    # ------------------------------------------------------------------------------------ shapes and work

    def shape(self, name: str) -> Shape | None:
        """The shape of a value for `batch` images, as far as it can be inferred."""
        if name in self.constants:
            return tuple(self.constants[name].shape)
        if self._shapes is None:
            self._shapes = self._inferred()
        return self._shapes.get(name)

    def count_macs(self, node: Any) -> int:
        """The multiply-adds of a convolution or a product with constant weights; 0 of any other node."""
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            return 0
        weight, output = self.shape(node.input[1]), self.shape(node.output[0])
        sizes, outputs = _known(weight), _known(output)
        if not sizes or not outputs:
            return 0
        each = math.prod(sizes[1:]) if node.op_type == "Conv" else sizes[max(0, len(sizes) - 2)]
        if node.op_type == "Gemm" and self.attribute(node, "transB", 0):
            each = sizes[1]
        return math.prod(outputs) * each

    def count_bytes(self, node: Any, size: int = 4) -> int:
        """The bytes that a node reads and writes, with `size` bytes an element; unknown shapes count as nothing."""
        shapes = [_known(self.shape(name)) for name in (*node.input, *node.output) if name]
        return size * sum(math.prod(each) for each in shapes if each)

    def total_macs(self) -> int:
        """The multiply-adds of the whole network."""
        return sum(self.count_macs(node) for node in self.nodes)

    def _inferred(self) -> dict[str, Shape]:
        onnx, copy = self._onnx, type(self.model)()
        copy.CopyFrom(self.model)
        for value in copy.graph.input:
            dims = value.type.tensor_type.shape.dim
            if value.name not in self.constants and len(dims) and not dims[0].dim_value:
                dims[0].dim_value = self._batch
        del copy.graph.value_info[:]  # they may name the free dimension otherwise
        for value in copy.graph.output:
            value.type.tensor_type.ClearField("shape")
        try:
            inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
        except Exception:  # without shapes the rules that need them find nothing
            return {}
        found: dict[str, Shape] = {}
        for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        return found

    # ------------------------------------------------------------------------------------ rewriting

    def add_constant(self, value: Array, near: str) -> str:
        """Add a constant under a new name that begins as `near`."""
        name = self._new_name(near)
        self.model.graph.initializer.append(self._numpy_helper.from_array(np.ascontiguousarray(value), name))
        self.constants[name] = value
        return name

    def add_node(self, op_type: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, whose name is given."""
        name = output or self._new_name(op_type.lower())
        made = self._onnx.helper.make_node(op_type, list(inputs), [name], self._new_name(op_type.lower()), **attributes)
        self.model.graph.node.append(made)
        return name

    def set_attribute(self, node: Any, name: str, value: Any) -> None:
        """Set an attribute of a node."""
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, self._onnx.helper.make_attribute(name, value)])

    def remove(self, nodes: Iterable[Any]) -> None:
        """Remove nodes, by what they give; the others stay the same objects."""
        gone = {node.output[0] for node in nodes}
        places = [place for place, node in enumerate(self.model.graph.node) if node.output[0] in gone]
        for place in reversed(places):
            del self.model.graph.node[place]

    def connect_readers(self, old: str, new: str) -> None:
        """Let all that read the value `old` read `new`; `old` may not be what the network gives."""
        for node in self.model.graph.node:
            for position, name in enumerate(node.input):
                if name == old:
                    node.input[position] = new

    def fix_shape(self, shape: Sequence[int]) -> None:
        """Give the input a shape without free dimensions."""
        for dim, size in zip(self.inputs[0].type.tensor_type.shape.dim, shape, strict=True):
            dim.ClearField("dim_param")
            dim.dim_value = int(size)

    def serialize(self) -> bytes:
        """The network as the bytes of a file: its nodes in order, without what leads nowhere. Raises BadData."""
        self._sort_and_prune()
        del self.model.graph.value_info[:]  # the shapes that an exporter noted need not hold any more
        noted = [type(value).FromString(value.SerializeToString()) for value in self.model.graph.output]
        for value in self.model.graph.output:
            value.type.tensor_type.ClearField("shape")
        try:
            inferred = self._onnx.shape_inference.infer_shapes(self.model)
            for value, known, old in zip(self.model.graph.output, inferred.graph.output, noted, strict=True):
                value.CopyFrom(known if known.type.tensor_type.HasField("shape") else old)
            self._onnx.checker.check_model(self.model)
        except Exception as error:
            raise BadData(f"the rewritten network is not valid: {first_error_line(error)}") from error
        content: bytes = self.model.SerializeToString()
        return content

    def _sort_and_prune(self) -> None:
        graph = self.model.graph
        producers = {name: node for node in graph.node for name in node.output}
        order: list[Any] = []
        done: set[str] = set()
        stack = [(name, False) for name in sorted(self.output_names)]
        while stack:
            name, ready = stack.pop()
            node = producers.get(name)
            if node is None or node.output[0] in done:
                continue
            if ready:
                done.add(node.output[0])
                order.append(node)
            else:
                stack.append((name, True))
                stack.extend((each, False) for each in _reads(node))
        copies = [type(node)() for node in order]
        for copied, node in zip(copies, order, strict=True):
            copied.CopyFrom(node)
        used = {name for node in order for name in _reads(node)} | self.output_names
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.node[:]
        graph.node.extend(copies)
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _new_name(self, near: str) -> str:
        self._num_new += 1
        return f"{near}_advised{self._num_new}"


def _known(shape: Shape | None) -> tuple[int, ...]:
    """A shape without free dimensions; empty where it has some, or is not known."""
    sizes = tuple(size for size in shape or () if size is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else ()


def _reads(node: Any) -> list[str]:
    """The values that a node reads, those of its subgraphs among them."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            found += [name for inner in graph.node for name in _reads(inner)]
    return found
