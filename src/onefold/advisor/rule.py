"""Rules: what each knows of a network (Case), and what it gives: remedies to be tried (Remedy)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from onefold.advisor.onnx_graph import OnnxGraph
from onefold.advisor.variant import Variant
from onefold.bench import Roofline, Workload
from onefold.runtimes.layer_times import LayerTime

_SUFFIXES = ("/WithoutBiases", "_nchwc", "_nhwc", "_quant", "_bn", "_kernel_time")


class NetworkForms(Protocol):
    """Other forms of the same network, each an ONNX file. May raise OnefoldError."""

    @property
    def is_fused(self) -> bool:
        """Whether there is nothing left to fold."""

    @property
    def size(self) -> int:
        """The side of its images in pixels."""

    def fused(self) -> bytes:
        """Give it fused, which is proved by its drift."""

    def int8(self, content: bytes) -> bytes:
        """Give it fused and in int8; of an .onnx file it is made of `content`, the file as other rules left it."""

    @property
    def is_resizable(self) -> bool:
        """Whether it can be made for images of another size."""

    def resized(self, size: int) -> bytes:
        """Give it fused, for images of another size."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network in one runtime, and all that the rules look at.

    `source` is what the user typed, `export_source` what `onefold export` takes for it (None where it takes nothing
    of the kind), `layers` the runtime's own times, `forms` other forms of the network. `usable_cores` and `features`
    are the machine's, `other_runtimes` those that are installed.
    """

    source: str
    variant: Variant
    layers: Sequence[LayerTime]
    export_source: str | None = None
    forms: NetworkForms | None = None
    roofline: Roofline | None = None
    usable_cores: int = 1
    features: Sequence[str] = ()
    other_runtimes: Sequence[str] = ()

    @cached_property
    def graph(self) -> OnnxGraph:
        """The graph, to look at: rules that change it take `variant.graph()`."""
        return self.variant.graph()

    @property
    def ns(self) -> float:
        """The time of all layers in nanoseconds."""
        return sum(layer.ns for layer in self.layers)

    @cached_property
    def ns_by_node(self) -> Mapping[str, float]:
        """The time of each node, by its first output; what a runtime fused into another node has none."""
        outputs = {name: node.output[0] for node in self.graph.nodes for name in node.output}
        names = {node.name: node.output[0] for node in self.graph.nodes if node.name}
        found: dict[str, float] = {}
        for layer in self.layers:
            name = layer.name
            place = names.get(name) or outputs.get(name)
            while place is None and (cut := next((s for s in _SUFFIXES if name.endswith(s)), None)):
                name = name.removesuffix(cut)
                place = names.get(name) or outputs.get(name)
            if place is not None:
                found[place] = found.get(place, 0.0) + layer.ns
        return found

    def time_of(self, nodes: Iterable[Any]) -> float:
        """The time of these nodes together in nanoseconds."""
        return sum(self.ns_by_node.get(node.output[0], 0.0) for node in nodes)

    def share_of(self, nodes: Iterable[Any]) -> float:
        """What share (0 to 1) of the layers' time these nodes take."""
        return self.time_of(nodes) / self.ns if self.ns else 0.0

    def without(self, nodes: Iterable[Any]) -> float:
        """The time left without these nodes, as a share (0 to 1): the most that replacing them can gain."""
        return max(1e-3, 1.0 - self.share_of(nodes))

    def evidence(self, nodes: Sequence[Any]) -> str:
        """Milliseconds, share of the layers' time, and of the roofline where multiply-adds are counted, as a text."""
        ns = self.time_of(nodes)
        text = f"{ns / 1e6:.3f} ms, {100 * self.share_of(nodes):.0f} % of the layers' time"
        least = [self.least_ns(node) for node in nodes]
        known = [each for each in least if each is not None]
        # A share above all was measured while the machine was busy, or by a runtime that saves multiplications.
        return f"{text}, {100 * sum(known) / ns:.0f} % of the roofline" if 0 < sum(known) <= ns else text

    def overall_evidence(self) -> str:
        """The same of the whole network."""
        return f"{self.evidence(self.graph.nodes)}, {self.variant.threads} thread{'s' * (self.variant.threads > 1)}"

    def least_ns(self, node: Any) -> float | None:
        """The least time that a layer could take on this machine; None where that is not known."""
        limits = self.bounds(node)
        return None if limits is None else max(limits)

    def bounds(self, node: Any) -> tuple[float, float] | None:
        """The least time by arithmetic and by memory, of a layer with multiply-adds; None where it is not known."""
        macs = self.graph.count_macs(node)
        if self.roofline is None or not macs:
            return None
        size = {"int8": 1, "bf16": 2, "fp16": 2}.get(self.variant.precision, 4)
        work = Workload(
            macs=macs,
            num_bytes=self.graph.count_bytes(node, size),
            precision=self.variant.precision,
            threads=self.variant.threads,
        )
        bound = self.roofline.latency_bound(work)
        return None if bound.compute_ns is None else (bound.compute_ns, bound.memory_ns or 0.0)

    @property
    def is_exportable(self) -> bool:
        """Whether `export` takes it: any torch network, and no .onnx file."""
        return self.export_source is not None or (self.forms is not None and self.forms.is_resizable)

    def start_of_remade(self) -> Variant:
        """What a form that is made of the fused network is compared with: the fused network, also where this is not."""
        forms = self.forms
        if forms is None or forms.is_fused or forms.fused() == self.variant.content:
            return self.variant
        return replace(self.variant, content=forms.fused())

    def export_command(self, runtime: str, *options: str) -> str:
        """The command that exports the network to a runtime; Python's where the command line does not take it."""
        if self.export_source is None:
            pairs = [("to", runtime), *(each.removeprefix("--").split(" ", 1) for each in options)]
            words = ", ".join(f'{name.replace("-", "_")}="{value}"' for name, value in pairs)
            return f"onefold.export({self.source.replace(':', '.')}(), {words})"  # of a function that gives a network
        return " ".join(["onefold export", self.export_source, "--to", runtime, *options])

    def apply_command(self, rule: str) -> str:
        """The command that writes the network as this rule changes it."""
        return f"onefold advise {self.source} --to {self.variant.runtime} --apply {rule} --out advised.onnx"


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Something to try: a finding, its evidence, the change, and at most how much it is predicted to gain.

    `predicted` is the time after over the time before, at best; None where nothing predicts it. `apply` gives the
    changed variant, None where there is nothing to change in it; it may raise anything. `against` is what it is
    compared with where that is not the network as it is.
    """

    rule: Rule
    finding: str
    evidence: str
    change: str
    apply: Callable[[Variant], Variant | None]
    command: str
    predicted: float | None = None
    against: Variant | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of the advisor: it looks at a case and gives remedies.

    `name` is what `--only` and `--apply` take, `source` the paper or documentation that says why. Remedies of a rule
    that `changes_answers` are told apart; those of one that is `adopted` become, once confirmed, what later rules
    start from. In a combination rules are applied by `order`: what remakes the graph comes first.
    """

    name: str
    looks_for: str
    remedy: str
    source: str
    detect: Callable[[Case], Iterable[Remedy]] = field(repr=False)
    order: int = 5
    changes_answers: bool = False
    adopted: bool = False
