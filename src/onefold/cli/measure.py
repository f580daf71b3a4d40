"""The verbs of the command line that measure: bench, limits, profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from onefold.cli import display, display_measuring
from onefold.cli.options import AsJson, Batch, Name, Threads
from onefold.errors import BadArgument

Results = Annotated[Path, Option(help="the folder of results")]


def bench(
    sources: Annotated[list[str], Argument(help="artifacts, runs, weights or timm:NAME; the first is the baseline")],
    results: Results = Path("results"),
    samples: Annotated[int, Option(min=1, help="timed calls of each")] = 300,
    warmup: Annotated[float, Option(min=0.0, help="seconds of warm-up of each")] = 1.0,
    batch_size: Batch = 1,
    threads: Threads = 1,
    seed: Annotated[int, Option(min=0, help="of the order of calls")] = 0,
    pin: Annotated[str | None, Option(help="the processors to use, by number and comma: 0,1")] = None,
    no_cold: Annotated[bool, Option("--no-cold", help="do not start each artifact in a fresh process too")] = False,
    aa: Annotated[
        bool, Option("--aa", help="self-test: one source against itself, which gives the noise floor")
    ] = False,
    plant: Annotated[str | None, Option(help="control: one source against itself made slower by so much: 2%")] = None,
    model: Name = None,
    allow_unfused: Annotated[bool, Option("--allow-unfused", help="measure training networks, labelled so")] = False,
    as_json: AsJson = False,
) -> None:
    """Time artifacts side by side: interleaved, warmed up, with percentiles, a noise verdict, the machine's record.

    Each row says what share of the machine's own measured limit it reaches (`onefold limits`), and which side binds.
    Artifacts are also started in a fresh process: time to open, the first call, the peak of memory.
    """
    from onefold.bench import Procedure
    from onefold.commands.bench import Bench
    from onefold.commands.bench import bench as run

    order = Bench(
        sources=sources,
        procedure=Procedure(warmup_seconds=warmup, samples=samples, threads=threads, seed=seed),
        batch=batch_size,
        allow_unfused=allow_unfused,
        name=model,
        cold=not no_cold,
        pin=None if pin is None else _processors(pin),
        aa=aa,
        plant=None if plant is None else _share(plant),
    )
    with display.waiting(f"measuring {len(sources)}"):
        outcome, path = run(order, results)
    display_measuring.measured(outcome, path, as_json=as_json)


def limits(
    results: Results = Path("results"),
    threads: Annotated[str | None, Option(help="numbers of threads by comma; 1 to all cores without it")] = None,
    again: Annotated[bool, Option("--again", help="measure also what was measured before; the quicker stays")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what this machine can do at the most: multiply-adds in fp32, bf16 and int8, and reading memory."""
    from onefold.bench import Machine
    from onefold.commands.limits import measured_limits

    numbers = range(1, Machine.this(packages=()).usable_cores + 1) if threads is None else _threads(threads)
    with display.waiting("measuring this machine"):
        found = measured_limits(results, numbers, again=again)
    display_measuring.limits([limit for limit in found.limits if limit.threads in numbers], as_json=as_json)


def profile(
    artifact: Annotated[Path, Argument(help="an exported artifact; of onnx or openvino")],
    threads: Threads = 1,
    batch_size: Batch = 1,
    calls: Annotated[int, Option(min=1, max=100000, help="calls to take the median of")] = 30,
    top: Annotated[int, Option(min=1, help="layers to show, the slowest")] = 20,
    as_json: AsJson = False,
) -> None:
    """Say where an artifact's time goes, layer by layer as its runtime runs them: name, type, milliseconds, share."""
    from onefold.runtimes.profile import profile as layers_of

    with display.waiting("profiling"):
        found = layers_of(artifact, threads=threads, batch=batch_size, calls=calls)
    display_measuring.profiled(found, top=top, as_json=as_json)


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
        raise BadArgument(f"--plant takes a slowdown in percent, such as 2%; not {words!r}") from error
