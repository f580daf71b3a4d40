"""`onefold bench`, `limits`, `profile` and `phone`: their arguments, and the tables that they print."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from onefold.cli.display import print_json, print_line, print_note, print_table
from onefold.cli.shared_options import BatchSizeOption, JsonOption, ModelOption, ThreadsOption, check_inputs
from onefold.cli.terminal_progress import show_progress
from onefold.errors import BadArgument

if TYPE_CHECKING:
    from onefold.bench import Comparison, Measurement, Roofline
    from onefold.runtimes import Profile

_Results = Annotated[Path, Option(help="folder of results")]
_WHAT = {"fp32": "multiply-adds in fp32", "bf16": "multiply-adds in bf16", "int8": "multiply-adds in int8"}


def bench(
    sources: Annotated[list[str], Argument(help="artifacts, runs, weights or timm:NAME; the first is the baseline")],
    results: _Results = Path("results"),
    samples: Annotated[int, Option(min=1, help="timed calls of each source")] = 300,
    warmup: Annotated[float, Option(min=0.0, help="warm-up of each source in seconds")] = 1.0,
    batch_size: BatchSizeOption = 1,
    threads: ThreadsOption = 1,
    seed: Annotated[int, Option(min=0, help="random seed of the order of calls")] = 0,
    pin: Annotated[str | None, Option(help="CPUs to run on, by number, separated by commas: 0,1")] = None,
    no_cold: Annotated[
        bool, Option("--no-cold", help="skip the cold start of each artifact in a fresh process")
    ] = False,
    aa: Annotated[bool, Option("--aa", help="A/A test: one source against itself, for the noise floor")] = False,
    inject_slowdown: Annotated[
        str | None,
        Option(
            "--inject-slowdown",
            "--plant",
            help="positive control: one source against itself, slowed down by so much, such as 2%",
        ),
    ] = None,
    model: ModelOption = None,
    allow_unfused: Annotated[
        bool, Option("--allow-unfused", help="accept networks that are not fused; their rows say so")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Benchmark the latency of artifacts and networks side by side.

    Calls are interleaved and warmed up; rows have percentiles, and a verdict on the machine's noise. Each row gives the
    fraction of the machine's roofline that it reaches (see `onefold limits`), and whether it is compute-bound or
    memory-bound. Artifacts are also started cold in a fresh process: time to load, first call, peak memory.
    """
    with show_progress(f"measuring {len(sources)}"):
        check_inputs(*sources, model=model)
        from onefold.commands.bench import bench as measure

        found = measure(
            *sources,
            results=results,
            samples=samples,
            warmup=warmup,
            batch_size=batch_size,
            threads=threads,
            seed=seed,
            pin=None if pin is None else _processors(pin),
            no_cold=no_cold,
            aa=aa,
            inject_slowdown=None if inject_slowdown is None else _share(inject_slowdown),
            model=model,
            allow_unfused=allow_unfused,
        )
    _print_latencies(found.outcome, found.path, as_json=as_json)


def limits(
    results: _Results = Path("results"),
    threads: Annotated[
        str | None, Option(help="numbers of threads, separated by commas; by default 1 to all cores")
    ] = None,
    again: Annotated[
        bool, Option("--again", help="measure again what was measured before; the higher rate is kept")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine's peak rates: its roofline.

    Multiply-adds a second in fp32, bf16 and int8, and bytes read a second from each cache and from memory.
    """
    with show_progress("measuring this machine"):
        from onefold.bench import Machine
        from onefold.commands.bench import load_or_measure_roofline

        numbers = range(1, Machine.detect(packages=()).usable_cores + 1) if threads is None else _threads(threads)
        found = load_or_measure_roofline(results, numbers, again=again)
    _print_roofline(found, numbers, as_json=as_json)


def profile(
    artifact: Annotated[Path, Argument(help="an exported artifact of onnx or openvino")],
    threads: ThreadsOption = 1,
    batch_size: BatchSizeOption = 1,
    calls: Annotated[int, Option(min=1, max=100000, help="number of calls; times are medians over them")] = 30,
    top: Annotated[int, Option(min=1, help="number of layers to show, slowest first")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Profile an artifact layer by layer, as its runtime executes it."""
    with show_progress("profiling"):
        from onefold.runtimes.layer_times import profile as layers_of

        found = layers_of(artifact, threads=threads, batch=batch_size, calls=calls)
    _print_layer_times(found, top=top, as_json=as_json)


def _processors(words: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError as error:
        raise BadArgument(f"--pin takes numbers of processors by comma, such as 0,1; not {words!r}") from error


def _threads(words: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in words.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not 1 <= min(numbers) <= max(numbers) <= 1024:
        raise BadArgument(f"--threads takes numbers from 1 to 1024 by comma, such as 1,2; not {words!r}")
    return numbers


def _share(words: str) -> float:
    """2% as 0.02."""
    try:
        return float(words.strip().removesuffix("%")) / 100
    except ValueError as error:
        raise BadArgument(f"--inject-slowdown takes a slowdown in percent, such as 2%; not {words!r}") from error


def phone(
    sources: Annotated[list[str], Argument(help="artifacts of litert, executorch or onnx; the first is the baseline")],
    program: Annotated[
        list[Path] | None,
        Option(help="the runtime vendor's benchmark program for Android, or a library of it; repeatable"),
    ] = None,
    serial: Annotated[
        str | None, Option(help="serial number of the phone, where several are connected: see `adb devices`")
    ] = None,
    results: Annotated[Path, Option(help="folder of results")] = Path("results"),
    rounds: Annotated[int, Option(min=1, help="number of processes per artifact, interleaved")] = 20,
    runs: Annotated[int, Option(min=2, help="timed calls in each process")] = 20,
    warmup: Annotated[int, Option(min=1, help="warm-up calls in each process")] = 5,
    rest: Annotated[float, Option(min=0.0, help="seconds to cool down before each process")] = 2.0,
    threads: Annotated[int, Option(min=1, max=64, help="CPU threads")] = 1,
    cores: Annotated[str, Option(help="big, little, all, or numbers such as 4-7")] = "big",
    seed: Annotated[int, Option(min=0, help="random seed of the order of processes")] = 0,
    anyway: Annotated[
        bool, Option("--anyway", help="accept a phone that is hot or low on battery; rows say so")
    ] = False,
    allow_unfused: Annotated[
        bool, Option("--allow-unfused", help="accept networks that are not fused; their rows say so")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="print JSON, one object per line")] = False,
) -> None:
    """Benchmark the latency of artifacts on an Android phone, over adb.

    The vendors' benchmark programs run interleaved, on the big cores, with a pause to cool before each. Temperature,
    charging, battery and clocks are recorded; a hot phone may cool first, or is refused. docs/phones.md says where the
    programs come from, and how to measure on an iPhone.
    """
    from onefold.commands.phone import PhoneBenchOptions, bench_on_phone
    from onefold.phone import PhoneBenchPlan

    plan = PhoneBenchPlan(
        rounds=rounds,
        runs=runs,
        warmup=warmup,
        rest_s=rest,
        threads=threads,
        cores=cores,
        seed=seed,
        anyway=anyway,
    )
    order = PhoneBenchOptions(
        sources=sources, serial=serial, programs=program or (), allow_unfused=allow_unfused, plan=plan
    )
    with show_progress(f"measuring {len(sources)} on the phone"):
        outcome, path = bench_on_phone(order, results)
    _print_latencies(outcome, path, as_json=as_json)


def _print_latencies(outcome: Measurement | Comparison, path: Path, *, as_json: bool) -> None:
    """Latencies of one call, what share of the machine's limit each reaches, and in words what is faster than what."""
    from onefold.bench import Comparison

    together = outcome.measurements if isinstance(outcome, Comparison) else {str(outcome.subject["name"]): outcome}
    if as_json:
        print_json(_plain(m, outcome) for m in together.values())
        return
    head = ["", "median ms", "p90 ms", "min ms", "spread", "of the limit", "machine"]
    print_table(head, [_row(name, m) for name, m in together.items()])
    for name, m in together.items():
        for line in _beside(m):
            print_line(f"  {name}: {line}")
    for reason in dict.fromkeys(reason for m in together.values() for reason in m.reasons):
        print_line(f"  {reason}")
    if isinstance(outcome, Comparison):
        _compared(outcome)
    print_line(f"appended to {path}")


def _print_roofline(found: Roofline, threads: Collection[int], *, as_json: bool) -> None:
    """What the machine can do at the most with these numbers of threads, the best of five runs and their median."""
    limits = [limit for limit in found.limits if limit.threads in threads]
    for each in found.notes:
        print_note(each)
    if as_json:
        print_json(limits)
        return
    rows = []
    for number in sorted(threads):
        of_number = {limit.kind: limit for limit in limits if limit.threads == number and limit.num_bytes is None}
        for kind, what in _WHAT.items():
            if kind in of_number:
                limit = of_number[kind]
                rates = [f"{rate / 1e9:.1f}" for rate in (limit.best, limit.median)]
                rows.append([what, str(number), *rates, "GMAC/s", limit.how])
            else:  # such as bf16 on a processor without it
                rows.append([what, str(number), "not known", "", "", ""])
        for limit in (one for one in limits if one.threads == number and one.num_bytes is not None):
            rates = [f"{rate / 1e9:.1f}" for rate in (limit.best, limit.median)]
            rows.append([f"reading {_size(limit.num_bytes)} over and over", str(number), *rates, "GB/s", limit.how])
    print_table(["", "threads", "best of five", "median", "unit", "by"], rows)
    print_line(
        "The best run is the limit, for what disturbs a run only slows it. A multiply-add is two operations (FLOP)."
    )


def _print_layer_times(found: Profile, *, top: int, as_json: bool) -> None:
    """The slowest layers, and what each type of layer takes together."""
    total = found.ns or 1.0
    if as_json:
        for layer in found.layers:
            print_json([{"name": layer.name, "type": layer.kind, "ms": layer.ns / 1e6, "share": layer.ns / total}])
        return
    slowest = sorted(found.layers, key=lambda layer: -layer.ns)[:top]
    rows = [[layer.name, layer.kind, f"{layer.ns / 1e6:.3f}", f"{100 * layer.ns / total:.1f} %"] for layer in slowest]
    rest = len(found.layers) - len(slowest)
    if rest:
        others = total - sum(layer.ns for layer in slowest)
        rows.append([f"{rest} more", "", f"{others / 1e6:.3f}", f"{100 * others / total:.1f} %"])
    print_table(["layer", "type", "ms", "share"], rows)
    kinds = ", ".join(
        f"{kind} {100 * ns / total:.1f} %" for kind, ns in found.time_by_type().items() if ns >= 0.005 * total
    )
    print_line(
        f"{found.artifact.title}: {total / 1e6:.3f} ms in {len(found.layers)} layers, medians of {found.calls} calls"
    )
    print_line(f"by type: {kinds}")


def _row(name: str, m: Measurement) -> list[str]:
    reached = (
        f"- ({_no_limit(m)})"
        if m.roofline_share is None or m.bound is None
        else f"{100 * m.roofline_share:.0f} % ({m.bound.limited_by})"
    )
    too_few = "needs 64 samples" if m.calls_per_sample == 1 else f"samples of {m.calls_per_sample} calls"
    p90 = f"- ({too_few})" if m.p90_ns is None else f"{m.p90_ns / 1e6:.3f}"
    times = [f"{m.median_ns / 1e6:.3f}", p90, f"{m.min_ns / 1e6:.3f}"]
    return [name, *times, f"{100 * m.spread:.1f} %", reached, m.verdict]


def _no_limit(m: Measurement) -> str:
    """Why no limit is known for a measurement."""
    if m.bound is not None:
        return f"no peak of {m.subject['precision']} was measured"
    return "its multiply-adds are not known" if "macs" not in m.subject else f"none for {m.subject['precision']}"


def _beside(m: Measurement) -> list[str]:
    """What was found beside the times: the least time, the start in a fresh process, memory, size."""
    from onefold.report.format import plain_size

    parts = []
    if m.roofline_share is not None and m.bound is not None:
        parts.append(
            f"{100 * m.roofline_share:.0f} % of the roofline: {m.subject['precision']} with "
            f"{_count_threads(m.procedure.threads)} cannot take less than {(m.bound.ns or 0) / 1e6:.3f} ms here "
            f"({m.bound.how}; bound by {m.bound.limited_by})"
        )
    if m.beats_roofline:
        parts.append(
            "its fastest call took less than this peak allows: the peak was measured while the machine was busy "
            "(`onefold limits --again` measures anew), or the runtime needs fewer multiplications (Winograd)"
        )
    if m.cold is not None:
        peak = (
            "memory not visible" if m.cold.peak_bytes is None else f"{_size(m.cold.peak_bytes)} of memory at the peak"
        )
        times = f"opened in {m.cold.open_ns / 1e6:.0f} ms, first call {m.cold.first_ns / 1e6:.1f} ms"
        file = f", model file of {plain_size(m.subject['num_bytes'])}" if "num_bytes" in m.subject else ""
        parts.append(f"in a fresh process {times}, then {m.cold.warm_ns / 1e6:.1f} ms; {peak}{file}")
    return parts


def _compared(outcome: Comparison) -> None:
    for sentence in outcome.sentences():
        print_line(sentence)
    floor = f"{100 * outcome.floor.floor:.2g} %"
    if len(outcome.measurements) == 1:
        print_line(f"Noise floor: against itself it differs by up to {floor} here; a smaller difference is none.")
    for name, m in outcome.measurements.items():
        if "planted" in m.subject:
            found = outcome.ratio(name).verdict == "slower"
            line = f"The injected slowdown of {100 * m.subject['planted']:g} % was{'' if found else ' NOT'} detected"
            print_line(f"{line}; the noise floor is {floor}.")


def _plain(m: Measurement, outcome: Measurement | Comparison) -> dict[str, Any]:
    from onefold.bench import Comparison

    return {
        "subject": dict(m.subject),
        "median_ms": m.median_ns / 1e6,
        "verdict": m.verdict,
        "roofline": m.roofline_share,
        "bound": None if m.bound is None else {**m.bound.to_dict(), "side": m.bound.limited_by},
        "cold": None if m.cold is None else m.cold.to_dict(),
        "floor": outcome.floor.floor if isinstance(outcome, Comparison) else None,
    }


def _count_threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _size(num_bytes: int | None) -> str:
    count = num_bytes or 0
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"
