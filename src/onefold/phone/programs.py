"""The vendors' benchmark programs for Android: how each is called, and how its times are read out of what it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onefold.errors import BadArgument, DeviceFailed

_SANE_NS = (100, 100 * 10**9)  # what one call can last: from 0.1 microseconds to 100 seconds


@dataclass(frozen=True, kw_only=True)
class ProgramCall:
    """One start of a program: where everything lies on the phone, and how often the network is run.

    `image` and `answer` are files of the first reference image and of what the program answers to it.
    """

    program: str
    model: str
    image: str
    answer: str
    times: str
    shape: tuple[int, int, int]
    threads: int
    warmup: int
    runs: int


@dataclass(frozen=True, kw_only=True)
class ProgramTimes:
    """What one process measured: samples of `calls_per_sample` calls each, and the first calls of the process."""

    samples_ns: tuple[int, ...]
    warmup_ns: tuple[int, ...] = ()
    calls_per_sample: int = 1


@dataclass(frozen=True, kw_only=True)
class AndroidLog:
    """Where a program speaks if `sign` is not in its output: in the phone's log, under `tag`."""

    tag: str
    sign: str


@dataclass(frozen=True, kw_only=True)
class BenchmarkProgram:
    """A vendor's program: `runtime` and `file` are those of our artifacts, `tells` whether its times are in a file.

    `order` is how the image lies in its file; `proves` says for which precisions its answer can be read back as floats.
    """

    name: str
    runtime: str
    file: str
    order: str
    command: Callable[[ProgramCall], Sequence[str]]
    parse: Callable[[str, ProgramCall], ProgramTimes]
    proof: Callable[[ProgramCall], Sequence[str]]
    proves: tuple[str, ...]
    tells: bool = False
    log: AndroidLog | None = None


def find_program(runtime: str) -> BenchmarkProgram:
    """The program that runs a runtime's artifacts on a phone. Raises BadArgument."""
    if runtime not in PROGRAMS:
        known = ", ".join(PROGRAMS)
        raise BadArgument(f"artifacts of {runtime} cannot be measured on a phone; those of {known} can: docs/phones.md")
    return PROGRAMS[runtime]


# -------------------------------------------------------------------------------------------- LiteRT


def _litert(call: ProgramCall) -> Sequence[str]:
    return (
        call.program,
        f"--graph={call.model}",
        f"--num_threads={call.threads}",
        f"--warmup_runs={call.warmup}",
        "--warmup_min_secs=0",
        f"--num_runs={call.runs}",
        "--min_secs=0",
        "--max_secs=600",
    )


def _litert_proof(call: ProgramCall) -> Sequence[str]:
    channels, height, width = call.shape
    return (
        *_litert(call)[:3],
        "--warmup_runs=0",
        "--warmup_min_secs=0",
        "--num_runs=1",
        "--min_secs=0",
        "--input_layer=images",
        f"--input_layer_shape=1,{height},{width},{channels}",
        f"--input_layer_value_files=images:{call.image}",
        f"--output_filepath={call.answer}",
    )


_COUNT = re.compile(r"count=(\d+)\b(?:.*?\bavg=([\d.]+(?:e\+?\d+)?)|\s+curr=(\d+))")
_FIRST = re.compile(r"First inference: ([\d.]+(?:e\+?\d+)?)")


def _litert_times(text: str, call: ProgramCall) -> ProgramTimes:
    """The last line of statistics is that of the timed runs, in microseconds; the first of two is the warm-up's."""
    counts = _COUNT.findall(text)
    if not counts or "Inference (avg)" not in text:
        raise _unreadable("benchmark_model", "a line with count= and avg=, and one with Inference (avg)", text)
    count, mean, all_same = counts[-1]
    if int(count) != call.runs:
        raise DeviceFailed(f"benchmark_model ran the network {count} times, and was told to run it {call.runs} times")
    first = _FIRST.search(text)
    return _sane(
        ProgramTimes(
            samples_ns=(round(float(mean or all_same) * 1000 * call.runs),),
            warmup_ns=(round(float(first.group(1)) * 1000),) if first else (),
            calls_per_sample=call.runs,
        ),
        "benchmark_model",
    )


# ---------------------------------------------------------------------------------------- ExecuTorch


def _executorch(call: ProgramCall) -> Sequence[str]:
    return (
        call.program,
        f"--model_path={call.model}",
        f"--inputs={call.image}",
        f"--num_executions={call.warmup + call.runs}",
        f"--cpu_threads={call.threads}",
    )


def _executorch_proof(call: ProgramCall) -> Sequence[str]:
    base = call.answer.removesuffix("-0.bin")
    return (*_executorch(call)[:3], "--num_executions=1", f"--cpu_threads={call.threads}", f"--output_file={base}")


_ITERATION = re.compile(r"Iteration (\d+) of (\d+): ([\d.]+) ms")


def _executorch_times(text: str, call: ProgramCall) -> ProgramTimes:
    wanted = call.warmup + call.runs
    found = [(int(number), float(ms)) for number, total, ms in _ITERATION.findall(text) if int(total) == wanted]
    found = found[-wanted:]  # a log may still hold what an earlier process wrote within the same second
    if [number for number, _ in found] != list(range(1, wanted + 1)):
        hint = f"{wanted} lines such as `Iteration 1 of {wanted}: 5.1 ms` (of a recent ExecuTorch)"
        raise _unreadable("executor_runner", hint, text)
    times = [round(ms * 1e6) for _, ms in found]
    kept = ProgramTimes(samples_ns=tuple(times[call.warmup :]), warmup_ns=tuple(times[: call.warmup]))
    return _sane(kept, "executor_runner")


# -------------------------------------------------------------------------------------- ONNX Runtime


def _onnx(call: ProgramCall) -> Sequence[str]:
    return (
        call.program,
        *("-I", "-m", "times", "-r", str(call.warmup + call.runs), "-x", str(call.threads), "-y", "1"),
        *(call.model, call.times),
    )


_ROW = re.compile(r"^[^,\n]*,([\d.]+(?:e[-+]?\d+)?),\d+,-?\d+,(\d+)\s*$", re.MULTILINE)


def _onnx_times(text: str, call: ProgramCall) -> ProgramTimes:
    wanted = call.warmup + call.runs
    rows = [(int(number), float(seconds)) for seconds, number in _ROW.findall(text)]
    if [number for number, _ in rows] != list(range(wanted)):
        raise _unreadable("onnxruntime_perf_test", f"{wanted} lines `name,seconds,memory,cpu,number`", text)
    times = [round(seconds * 1e9) for _, seconds in rows]
    kept = ProgramTimes(samples_ns=tuple(times[call.warmup :]), warmup_ns=tuple(times[: call.warmup]))
    return _sane(kept, "onnxruntime_perf_test")


# ------------------------------------------------------------------------------------------ together

PROGRAMS: Mapping[str, BenchmarkProgram] = {
    each.runtime: each
    for each in (
        BenchmarkProgram(
            name="benchmark_model",
            runtime="litert",
            file="model.tflite",
            order="HWC",
            command=_litert,
            parse=_litert_times,
            proof=_litert_proof,
            proves=("fp32",),
        ),
        BenchmarkProgram(
            name="executor_runner",
            runtime="executorch",
            file="model.pte",
            order="CHW",
            command=_executorch,
            parse=_executorch_times,
            proof=_executorch_proof,
            proves=("fp32", "int8"),
            log=AndroidLog(tag="ExecuTorch", sign="Iteration"),
        ),
        BenchmarkProgram(
            name="onnxruntime_perf_test",
            runtime="onnx",
            file="model.onnx",
            order="CHW",
            command=_onnx,
            parse=_onnx_times,
            proof=_onnx,
            proves=(),
            tells=True,
        ),
    )
}


def _sane(times: ProgramTimes, name: str) -> ProgramTimes:
    low, high = _SANE_NS
    if not all(low <= each / times.calls_per_sample <= high for each in times.samples_ns):
        worst = min(times.samples_ns, key=lambda each: low <= each / times.calls_per_sample <= high)
        raise DeviceFailed(f"{name} tells a time that cannot be, {worst / times.calls_per_sample:.0f} ns for one image")
    return times


def _unreadable(name: str, expected: str, text: str) -> DeviceFailed:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    came = repr(lines[-1][:120]) if lines else "nothing"
    return DeviceFailed(f"{name} says what cannot be understood: expected {expected}, its last line is {came}")
