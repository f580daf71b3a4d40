"""`onefold bench`, `limits`, `profile` and `phone`: parse their arguments and print measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from onefold.cli import display
from onefold.cli.options import BatchSizeOption, JsonOption, ModelOption, ThreadsOption
from onefold.cli.progress import show_progress
from onefold.errors import BadArgument

_Results = Annotated[Path, Option(help="the folder of results")]


def bench(
    sources: Annotated[list[str], Argument(help="artifacts, runs, weights or timm:NAME; the first is the baseline")],
    results: _Results = Path("results"),
    samples: Annotated[int, Option(min=1, help="timed calls of each")] = 300,
    warmup: Annotated[float, Option(min=0.0, help="seconds of warm-up of each")] = 1.0,
    batch_size: BatchSizeOption = 1,
    threads: ThreadsOption = 1,
    seed: Annotated[int, Option(min=0, help="of the order of calls")] = 0,
    pin: Annotated[str | None, Option(help="the processors to use, by number and comma: 0,1")] = None,
    no_cold: Annotated[bool, Option("--no-cold", help="no cold start of each artifact in a fresh process")] = False,
    aa: Annotated[
        bool, Option("--aa", help="A/A test: one source against itself, which gives the noise floor")
    ] = False,
    inject_slowdown: Annotated[
        str | None,
        Option(
            "--inject-slowdown",
            "--plant",
            help="control: measure one source against itself slowed down by so much, such as 2%",
        ),
    ] = None,
    model: ModelOption = None,
    allow_unfused: Annotated[bool, Option("--allow-unfused", help="unfused networks too, labelled as such")] = False,
    as_json: JsonOption = False,
) -> None:
    """Benchmark artifacts side by side: interleaved, warmed up, with percentiles and a check of the machine's noise.

    Each row gives the share of the machine's roofline that it reaches (see `onefold limits`), and whether arithmetic or
    memory bounds it. Artifacts are also started cold in a fresh process: time to open, first call, peak memory.
    """
    with show_progress(f"measuring {len(sources)}"):
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
    display.print_latencies(found.outcome, found.path, as_json=as_json)


def limits(
    results: _Results = Path("results"),
    threads: Annotated[str | None, Option(help="numbers of threads by comma; 1 to all cores without it")] = None,
    again: Annotated[bool, Option("--again", help="measure also what was measured before; the quicker stays")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine's peak rates for the roofline: multiply-adds in fp32, bf16 and int8, and memory reads."""
    with show_progress("measuring this machine"):
        from onefold.bench import Machine
        from onefold.commands.bench import load_or_measure_roofline

        numbers = range(1, Machine.detect(packages=()).usable_cores + 1) if threads is None else _threads(threads)
        found = load_or_measure_roofline(results, numbers, again=again)
    display.print_roofline(found, numbers, as_json=as_json)


def profile(
    artifact: Annotated[Path, Argument(help="an exported artifact; of onnx or openvino")],
    threads: ThreadsOption = 1,
    batch_size: BatchSizeOption = 1,
    calls: Annotated[int, Option(min=1, max=100000, help="calls to take the median of")] = 30,
    top: Annotated[int, Option(min=1, help="layers to show, the slowest")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Profile an artifact layer by layer as its runtime runs them: name, type, milliseconds, share."""
    with show_progress("profiling"):
        from onefold.runtimes.layer_times import profile as layers_of

        found = layers_of(artifact, threads=threads, batch=batch_size, calls=calls)
    display.print_layer_times(found, top=top, as_json=as_json)


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
        list[Path] | None, Option(help="the vendor's benchmark program for the phone, or a library of it; repeatable")
    ] = None,
    serial: Annotated[str | None, Option(help="which phone, where several are connected: see `adb devices`")] = None,
    results: Annotated[Path, Option(help="the folder of results")] = Path("results"),
    rounds: Annotated[int, Option(min=1, help="processes of each artifact, interleaved")] = 20,
    runs: Annotated[int, Option(min=2, help="timed calls in each process")] = 20,
    warmup: Annotated[int, Option(min=1, help="calls before them in each process")] = 5,
    rest: Annotated[float, Option(min=0.0, help="seconds of rest before each process")] = 2.0,
    threads: Annotated[int, Option(min=1, max=64, help="compute threads")] = 1,
    cores: Annotated[str, Option(help="big, little, all, or numbers such as 4-7")] = "big",
    seed: Annotated[int, Option(min=0, help="of the order of processes")] = 0,
    anyway: Annotated[bool, Option("--anyway", help="measure a hot or low phone too, labelled so")] = False,
    allow_unfused: Annotated[bool, Option("--allow-unfused", help="unfused networks too, labelled as such")] = False,
    as_json: Annotated[bool, Option("--json", help="one JSON object a line, for programs")] = False,
) -> None:
    """Benchmark artifacts on an Android phone over adb by the vendors' programs: interleaved, cooled, on big cores.

    Temperature, charging, battery and clocks are recorded; a hot phone may cool first, or is refused. docs/phones.md
    says where the programs come from, and how to measure on an iPhone.
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
    display.print_latencies(outcome, path, as_json=as_json)
