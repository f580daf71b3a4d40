"""Arguments and options that several verbs of the command line take, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from onefold.errors import BadArgument
from onefold.runtimes import RUNTIMES

SourceArgument = Annotated[
    str, Argument(help="a run folder, a file of weights, a hub id, timm:NAME, or an exported artifact")
]
ModelOption = Annotated[str | None, Option("--model", help="the network's name, if the weights do not hold it")]
ThreadsOption = Annotated[int, Option(min=1, max=1024, help="compute threads")]
JsonOption = Annotated[bool, Option("--json", help="one JSON object a line, for programs")]
BatchSizeOption = Annotated[int, Option("--batch-size", "-b", min=1, max=65536, help="images per step or call")]
ClassesOption = Annotated[Path | None, Option(help="a file with the names of the classes, one a line, or JSON")]
UseEmaOption = Annotated[
    bool | None,
    Option("--use-ema/--no-use-ema", help="of a checkpoint that holds both, EMA or plain weights; else EMA"),
]
ImgSizeOption = Annotated[int | None, Option("--img-size", min=1, max=8192, help="side of the images in pixels")]


def parse_runtimes(to: str) -> list[str]:
    """The runtimes of a list by comma. Raises BadArgument where there is none."""
    names = [name.strip() for name in to.split(",") if name.strip()]
    if not names:
        raise BadArgument(f"--to names no runtime: give one or more of {', '.join(RUNTIMES)}")
    return names
