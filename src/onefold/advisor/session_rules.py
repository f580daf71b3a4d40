"""Rules about how a network is run: threads, runtime, precision, free dimensions, batch, resolution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from onefold.advisor.rule import Case, Remedy, Rule
from onefold.advisor.variant import Variant, graph_precision

_BATCH = 8
_BIG_OPS = ("Conv", "Gemm", "MatMul")
_THREADS_OPTION = {
    "onnx": "SessionOptions.intra_op_num_threads = {0} (of an artifact: onefold.load(ARTIFACT, threads={0}))",
    "openvino": "INFERENCE_NUM_THREADS = {0} (of an artifact: onefold.load(ARTIFACT, threads={0}))",
}


def _detect_threads(case: Case) -> Iterable[Remedy]:
    now, cores = case.variant.threads, case.usable_cores
    for threads in sorted({1, max(1, cores // 2), cores} - {now}):
        finding = f"{now} of {cores} cores are used" if threads > now else f"{now} threads share the work"

        def apply(variant: Variant, threads: int = threads) -> Variant:
            return replace(variant, threads=threads)

        yield Remedy(
            rule=THREADS,
            finding=finding,
            evidence=case.overall_evidence(),
            change=f"run it with {threads} thread{'s' * (threads > 1)}",
            predicted=now / threads if threads > now else None,
            apply=apply,
            command=_THREADS_OPTION[case.variant.runtime].format(threads),
        )


def _detect_runtime(case: Case) -> Iterable[Remedy]:
    for name in case.other_runtimes:

        def apply(variant: Variant, name: str = name) -> Variant:
            precision = graph_precision(variant.graph()) if variant.precision not in ("fp32", "int8") else None
            return replace(variant, runtime=name, precision=precision or variant.precision)

        yield Remedy(
            rule=RUNTIME,
            finding=f"{name} is installed too",
            evidence=f"{case.variant.runtime}: {case.overall_evidence()}",
            change=f"run it in {name}",
            apply=apply,
            command=case.export_command(name) if case.is_exportable else f"onefold advise {case.source} --to {name}",
        )


def _detect_low_precision(case: Case) -> Iterable[Remedy]:
    if case.variant.runtime != "openvino" or case.variant.precision != "fp32":
        return
    heavy = [node for node in case.graph.nodes if node.op_type in _BIG_OPS]
    for precision, needed in (("bf16", {"bf16"}), ("fp16", {"fp16"})):
        if not needed & set(case.features):
            continue

        def apply(variant: Variant, precision: str = precision) -> Variant | None:
            is_float = graph_precision(variant.graph()) == "fp32" and variant.runtime == "openvino"
            return replace(variant, precision=precision) if is_float else None

        yield Remedy(
            rule=LOW_PRECISION,
            finding=f"convolutions and products are computed in fp32, and this processor has {precision}",
            evidence=case.evidence(heavy),
            change=f"let the runtime compute in {precision}",
            predicted=1 - case.share_of(heavy) / 2,
            apply=apply,
            command=f'compile_model(model, "CPU", {{"INFERENCE_PRECISION_HINT": "{precision.replace("fp", "f")}"}})',
        )


def _detect_static(case: Case) -> Iterable[Remedy]:
    free = [place for place, size in enumerate(case.graph.input_shape()) if size is None]
    if not free:
        return
    computed = [node for node in case.graph.nodes if node.op_type in ("Shape", "Gather", "Slice", "Unsqueeze")]

    def apply(variant: Variant) -> Variant:
        graph = variant.graph()
        graph.fix_shape((variant.batch, *variant.input_shape))
        return replace(variant, content=graph.serialize())

    shape = (case.variant.batch, *case.variant.input_shape)
    yield Remedy(
        rule=STATIC,
        finding=f"{len(free)} dimension{'s' * (len(free) > 1)} of the input {'are' if len(free) > 1 else 'is'} free",
        evidence=f"operations on shapes take {case.evidence(computed)}",
        change=f"fix the input's shape to {' x '.join(map(str, shape))}",
        apply=apply,
        command=case.apply_command("static-shape"),
    )


def _detect_batch(case: Case) -> Iterable[Remedy]:
    if case.graph.input_shape()[0] is not None or case.variant.batch >= _BATCH:
        return

    def apply(variant: Variant) -> Variant | None:
        return replace(variant, batch=_BATCH) if variant.graph().input_shape()[0] is None else None

    yield Remedy(
        rule=BATCH,
        finding="each call has one image" if case.variant.batch == 1 else f"each call has {case.variant.batch} images",
        evidence=case.overall_evidence(),
        change=f"where images come together, call it with {_BATCH} of them: times are for one image",
        apply=apply,
        command=f"call it with images of shape {(_BATCH, *case.variant.input_shape)}",
    )


def _detect_resolution(case: Case) -> Iterable[Remedy]:
    forms = case.forms
    if forms is None or not forms.is_resizable:
        return
    start = case.start_of_remade()
    for size in sorted({max(32, forms.size * part // 8 // 32 * 32) for part in (6, 7)} - {forms.size}):

        def apply(variant: Variant, size: int = size) -> Variant | None:
            if variant.sha256 != start.sha256:
                return None  # another change has remade the graph: this one would undo it
            return replace(variant, content=forms.resized(size), input_shape=(variant.input_shape[0], size, size))

        yield Remedy(
            rule=RESOLUTION,
            finding=f"images of {forms.size} pixels",
            evidence=case.overall_evidence(),
            change=f"images of {size} pixels",
            predicted=(size / forms.size) ** 2,
            apply=apply,
            command=case.export_command(case.variant.runtime, f"--img-size {size}"),
            against=start,
        )


THREADS = Rule(
    name="threads",
    looks_for="cores that idle, or more threads than the work feeds",
    remedy="another number of threads: one, half the cores, all",
    source="onnxruntime.ai, Thread management; docs.openvino.ai, INFERENCE_NUM_THREADS",
    detect=_detect_threads,
    order=9,
)
RUNTIME = Rule(
    name="runtime",
    looks_for="another runtime that is installed and runs the same graph",
    remedy="run it there",
    source="measured here: no source tells it for a machine that its author has not seen",
    detect=_detect_runtime,
    order=7,
)
LOW_PRECISION = Rule(
    name="bf16",
    looks_for="fp32 arithmetic on a processor that has bf16 or fp16, in a runtime that can use it (openvino)",
    remedy="the runtime's precision hint",
    source="docs.openvino.ai, Precision control",
    detect=_detect_low_precision,
    order=8,
    changes_answers=True,
)
STATIC = Rule(
    name="static-shape",
    looks_for="free dimensions in the input: a runtime then plans and computes shapes at each call",
    remedy="the shape that is used, fixed in the graph",
    source="onnxruntime.ai, Make dynamic input shape fixed; docs.openvino.ai, Dynamic shapes",
    detect=_detect_static,
    order=6,
)
BATCH = Rule(
    name="batch",
    looks_for="calls with one image",
    remedy="eight images a call, where they come together",
    source="MobileOne (arXiv 2206.04040), section 4, times one image a call: throughput is another question",
    detect=_detect_batch,
    order=9,
)
RESOLUTION = Rule(
    name="resolution",
    looks_for="images larger than the accuracy needs",
    remedy="three quarters or seven eighths of the side",
    source="MobileNets, table 7 (arXiv 1704.04861): cost falls with the square of the side",
    detect=_detect_resolution,
    order=1,
    changes_answers=True,
)
