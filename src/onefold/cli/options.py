"""Arguments and options that several verbs of the command line take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Source = Annotated[str, Argument(help="a run folder, a file of weights, a hub id, timm:NAME, or an exported artifact")]
Name = Annotated[str | None, Option("--model", help="the network's name, where the weights do not tell it")]
Threads = Annotated[int, Option(min=1, max=1024, help="threads that compute")]
AsJson = Annotated[bool, Option("--json", help="one JSON object a line, for programs")]
Batch = Annotated[int, Option("--batch-size", "-b", min=1, max=65536, help="images a step or call")]
Classes = Annotated[Path | None, Option(help="a file with the names of the classes, one a line")]
Size = Annotated[int | None, Option("--img-size", min=1, max=8192, help="side of the images in pixels")]
