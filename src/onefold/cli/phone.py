"""The verb `phone`: its arguments and what it prints; what it does is a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from onefold.cli import display, display_measuring


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
    threads: Annotated[int, Option(min=1, max=64, help="threads that compute")] = 1,
    cores: Annotated[str, Option(help="big, little, all, or numbers such as 4-7")] = "big",
    seed: Annotated[int, Option(min=0, help="of the order of processes")] = 0,
    anyway: Annotated[bool, Option("--anyway", help="measure a hot or low phone too, labelled so")] = False,
    allow_unfused: Annotated[bool, Option("--allow-unfused", help="measure training networks, labelled so")] = False,
    as_json: Annotated[bool, Option("--json", help="one JSON object a line, for programs")] = False,
) -> None:
    """Time artifacts on an Android phone, over adb, with the vendors' own programs: interleaved, rested, on big cores.

    Heat, charging, battery and clocks are recorded; a hot phone is waited for or refused. docs/phones.md says where the
    programs come from, and how to measure on an iPhone.
    """
    from onefold.commands.phones import PhoneBench, bench_on_phone
    from onefold.phone import Plan

    plan = Plan(
        rounds=rounds,
        runs=runs,
        warmup=warmup,
        rest_s=rest,
        threads=threads,
        cores=cores,
        seed=seed,
        anyway=anyway,
    )
    order = PhoneBench(sources=sources, serial=serial, programs=program or (), allow_unfused=allow_unfused, plan=plan)
    with display.waiting(f"measuring {len(sources)} on the phone"):
        outcome, path = bench_on_phone(order, results)
    display_measuring.measured(outcome, path, as_json=as_json)
