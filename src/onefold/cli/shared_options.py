"""Arguments and options that several verbs of the command line take, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from onefold.errors import BadArgument
from onefold.runtimes import RUNTIMES

SourceArgument = Annotated[
    str, Argument(help="a run folder, a file of weights, a hub id, timm:NAME, or an exported artifact")
]
WeightsArgument = Annotated[str, Argument(help="a run folder, a file of weights, a hub id or timm:NAME")]
ModelOption = Annotated[str | None, Option("--model", help="name of the network, if the weights do not tell it")]
ThreadsOption = Annotated[int, Option(min=1, max=1024, help="CPU threads")]
JsonOption = Annotated[bool, Option("--json", help="print JSON, one object per line")]
BatchSizeOption = Annotated[int, Option("--batch-size", "-b", min=1, max=65536, help="images per forward pass")]
ClassesOption = Annotated[Path | None, Option(help="file with the class names: one per line, or JSON")]
UseEmaOption = Annotated[
    bool | None,
    Option("--use-ema/--no-use-ema", help="EMA or plain weights, of a checkpoint with both; by default EMA"),
]
ImgSizeOption = Annotated[int | None, Option("--img-size", min=1, max=8192, help="image size in pixels")]


def parse_runtimes(to: str) -> list[str]:
    """The runtimes of a list by comma. Raises BadArgument where there is none."""
    names = [name.strip() for name in to.split(",") if name.strip()]
    if not names:
        raise BadArgument(f"--to names no runtime: give one or more of {', '.join(RUNTIMES)}")
    return names


def check_int8_options(precision: str, *, data: str | None, other_method: bool) -> None:
    """Do what the function of that name of `onefold.commands.input_checks` does, which is imported when it is used."""
    from onefold.commands.input_checks import check_int8_options as check

    check(precision, data=data, other_method=other_method)


def check_inputs(*sources: str, **given: Any) -> None:
    """Do what `onefold.commands.input_checks.check_inputs` does, which is imported when a verb runs."""
    from onefold.commands.input_checks import check_inputs as check

    check(*sources, **given)
