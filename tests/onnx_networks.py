"""Small ONNX networks to advise on, and engines whose time is what a test says it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onefold.advisor import TrialBench, Variant
from onefold.advisor.variant import open_engine
from onefold.bench import Instruments, Machine, Procedure, SystemCounters
from onefold.runtimes.layer_times import LayerTime

Node = tuple[str, Sequence[str], Sequence[str], dict]


class Network:
    """A network that is written node by node: constants are drawn, and named as they are added."""

    def __init__(self, side: int = 12, channels: int = 3, batch: int | str = "batch") -> None:
        self.side, self.channels, self.batch = side, channels, batch
        self._random = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray, name: str = "") -> str:
        name = name or f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def drawn(self, *shape: int) -> str:
        return self.constant((0.3 * self._random.standard_normal(shape)).astype(np.float32))

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: object) -> str:
        name = name or f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], f"{kind}_{name}", **attributes))
        return name

    def conv(self, x: str, wide: int, out: int, side: int = 3, group: int = 1, stride: int = 1) -> str:
        weights = [self.drawn(out, wide // group, side, side), self.drawn(out)]
        return self.op("Conv", x, *weights, pads=[side // 2] * 4, group=group, strides=[stride] * 2)

    def norm(self, x: str, wide: int) -> str:
        var = self.constant((0.5 + self._random.random(wide)).astype(np.float32))
        return self.op("BatchNormalization", x, self.drawn(wide), self.drawn(wide), self.drawn(wide), var)

    def head(self, x: str, wide: int, classes: int = 5) -> None:
        pooled = self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)
        self.op("Gemm", pooled, self.drawn(classes, wide), self.drawn(classes), name="logits", transB=1)

    def content(self) -> bytes:
        shape = [self.batch, self.channels, self.side, self.side]
        graph = helper.make_graph(
            self._nodes,
            "network",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        return model.SerializeToString()

    def variant(self, **changes: object) -> Variant:
        shape = (self.channels, self.side, self.side)
        return Variant(**{"content": self.content(), "runtime": "onnx", "input_shape": shape, **changes})


def fake_bench(cost: Callable[[Variant], int], samples: int = 20) -> TrialBench:
    """Variants answer as they do; each call takes `cost` nanoseconds on a clock that nothing else moves."""
    clock = [0]
    seconds = [0]

    def open_it(variant: Variant):
        engine, ns = open_engine(variant), cost(variant)

        class Timed:
            threads = variant.threads
            close = staticmethod(engine.close)

            def __call__(self, images: np.ndarray) -> np.ndarray:
                answer = engine(images)
                seconds[0] += 1
                clock[0] += ns + seconds[0] % 7  # so that samples differ, as they do
                return answer

        return Timed()

    def read() -> int:
        clock[0] += 1
        return clock[0]

    def profile(variant: Variant) -> list[LayerTime]:
        return [LayerTime(name=node.name, kind=node.op_type, ns=1000.0) for node in variant.graph().nodes]

    machine = Machine(chip="a chip", architecture="x86_64", cores=4, usable_cores=4)
    return TrialBench(
        procedure=Procedure(warmup_calls=2, warmup_seconds=0, samples=samples, lead_calls=0),
        instruments=Instruments(clock=read, vitals=SystemCounters, machine=machine),
        open=open_it,
        profile=profile,
    )
