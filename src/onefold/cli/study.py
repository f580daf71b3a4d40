"""`onefold study`: its arguments, and the tables and conclusions that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from onefold.cli.display import print_json, print_line, print_table
from onefold.cli.shared_options import JsonOption, ThreadsOption, check_inputs, parse_runtimes
from onefold.cli.terminal_progress import show_progress
from onefold.errors import BadArgument
from onefold.runtimes import RUNTIMES

if TYPE_CHECKING:
    from onefold.report.study_results import StudyResult


def study(
    name: Annotated[str | None, Argument(help="the study; `onefold study --list` lists them")] = None,
    to: Annotated[str, Option(help=f"runtimes, separated by commas: {', '.join(RUNTIMES)}")] = "onnx",
    precision: Annotated[
        str | None, Option(help="precisions, separated by commas; by default those of the study")
    ] = None,
    results: Annotated[Path, Option(help="folder of results")] = Path("results"),
    samples: Annotated[int, Option(min=16, help="timed calls of each network")] = 100,
    warmup: Annotated[float, Option(min=0.0, help="warm-up of each network in seconds")] = 0.5,
    threads: ThreadsOption = 1,
    seed: Annotated[int, Option(min=0, help="random seed of the order of calls")] = 0,
    minutes: Annotated[
        float | None,
        Option(help="time limit: what has not begun by then is left out; the same command goes on with it"),
    ] = None,
    list_studies: Annotated[bool, Option("--list", help="list the studies and stop")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment of a paper again on this machine.

    The networks of the paper's table, at random weights, are fused, exported, checked and timed side by side; what was
    measured stands beside the paper's numbers, with a line that says whether they agree. Raw samples, a figure and the
    outcome are kept in --results, where `onefold report` finds them; what is there already is not measured again.
    """
    if list_studies:
        with show_progress("reading the studies"):
            from onefold.studies import find_study, study_names

            found = [find_study(each) for each in study_names()]
        print_table(["study", "question", "after"], [[each.name, each.question, each.source] for each in found])
        return
    if name is None:
        raise BadArgument("which study? `onefold study --list` lists them")
    with show_progress(f"studying {name}"):
        from onefold.studies import find_study

        find_study(name)  # a mistyped name is told before torch is imported
        runtimes = parse_runtimes(to)
        check_inputs(runtimes=runtimes)
        from onefold.commands.study import study as run

        done = run(
            name,
            to=runtimes,
            precision=None if precision is None else [each.strip() for each in precision.split(",")],
            results=results,
            samples=samples,
            warmup=warmup,
            threads=threads,
            seed=seed,
            minutes=minutes,
            say=(lambda _: None) if as_json else print_line,
        )
    if as_json:
        print_json([done.result.to_dict()])
        return
    _print_result(done.result)
    written = ", ".join(map(str, (done.outcome, *done.figures)))
    print_line(f"wrote {written}; the samples are in {done.samples}")


def _print_result(result: StudyResult) -> None:
    print_line(f"{result.question} After {result.source}.")
    print_line(f"{result.machine}, {result.date}. {result.conditions}")
    for table in result.tables:
        print_line("")
        print_line(table.caption)
        print_table(table.columns, table.rows)
    print_line("")
    for conclusion in result.conclusions:
        print_line(str(conclusion))
    for note in result.notes:
        print_line(f"  {note}")
