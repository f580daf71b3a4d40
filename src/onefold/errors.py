"""The errors a user can meet, each with the exit status that the command line gives it.

    OnefoldError                 the root: catch it to catch them all
    +-- GateFailed          1    a check did not hold: drift, accuracy or parity
    |   +-- GateUndecided  11    more was lost than may be, on too few photos to tell
    +-- BadArgument         2    an argument that cannot be (also a ValueError)
    +-- MissingExtra        2    an optional package that this verb needs is not installed
    +-- BadData             3    images, labels or folders that cannot be used (also a ValueError)
    +-- BadCheckpoint       4    weights that are damaged, hostile or of another model (also a ValueError)
    |   +-- BadArtifact     4    the same for an exported artifact
    +-- NotWritable         5    no space, or a place that cannot be written (also an OSError)
    +-- RunBusy             6    another process is using this run folder
    +-- NonFiniteLoss       7    the loss became NaN or infinite (also an ArithmeticError)
    +-- LostWorker          8    a process that trains or computes along was lost
    +-- DeviceFailed        9    a phone went away, or a program on it failed or cannot be understood
    +-- NetworkFailed      10    the hub, or another host, cannot be reached (also an OSError)
    +-- Stopped            75    stopped by a signal, after saving

A message is one sentence or two: what was expected, what came, and what to type.
The algebra (`onefold.reparam`) is plain mathematics and raises plain ValueError and TypeError.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

_FLAGS = re.compile(
    r"(?:onefold [a-z]+|pip install|hf [a-z]+) [^`);,]*"  # a whole command stays one
    r"|(?<![\w-])--(?P<name>[a-z][a-z0-9_-]*(?P<dotted>(?:\.\w+)*))"
    r"(?: (?P<value>[A-Z]+\b|\d[\w.]*(?<!\.)|(?:probe|fresh|kept|plain|skips|expanded|int8|fp16|bf16|fp32|none)\b))?"
)
_SWITCHES = ("allow-unfused", "half", "int8", "no-check", "no-fuse", "per-tensor", "quiet", "use-ema")


class OnefoldError(Exception):
    """The root of all errors that are meant for a user; its text has options as they are spelled where it is read."""

    exit_status = 1
    on_command_line: ClassVar[bool] = False  # whether a command runs, whose options are flags

    def __str__(self) -> str:
        text = super().__str__()
        return text if OnefoldError.on_command_line else options_as_arguments(text)


def options_as_arguments(text: str) -> str:
    """Spell the options in a text as arguments: `--data FOLDER` as `data=FOLDER`; a whole command stays as it is."""
    return _FLAGS.sub(_as_argument, text)


def _as_argument(flag: re.Match[str]) -> str:
    if not flag["name"]:
        return flag[0]
    name, value = flag["name"].replace("-", "_"), flag["value"] or ""
    if flag["dotted"] or value == "none":  # a field of the recipe, which has no argument of its own
        return f'changes={{"{name}": {"None" if value == "none" else value or "..."}}}'
    if flag["name"] in _SWITCHES:
        return f"{name}=True" + (f" {value}" if value else "")
    return f"{name}=" + (repr(value) if value.islower() else value)


class GateFailed(OnefoldError):
    """A check did not hold: drift, accuracy or parity."""


class GateUndecided(GateFailed):
    """An artifact lost more accuracy than may be lost, on so few photos that it may be chance."""

    exit_status = 11


class BadArgument(OnefoldError, ValueError):
    """An argument that cannot be."""

    exit_status = 2


class MissingExtra(OnefoldError, ImportError):
    """Optional packages are needed and not installed; the message ends with the one command that installs them.

    `needs` says what needs which, and `extras` are those of onefold that have them; without one, `needs` says it all.
    """

    exit_status = 2

    def __init__(self, needs: str, *extras: str) -> None:
        self.needs, self.extras = needs, extras
        super().__init__(needs + (f': pip install "onefold[{",".join(extras)}]"' if extras else ""))

    @classmethod
    def from_errors(cls, errors: Sequence[MissingExtra]) -> MissingExtra:
        """Give one error for several."""
        extras = dict.fromkeys(extra for error in errors for extra in error.extras)
        return cls("; ".join(dict.fromkeys(error.needs for error in errors)), *extras)


class BadData(OnefoldError, ValueError):
    """Images, labels or folders that cannot be used."""

    exit_status = 3


class BadCheckpoint(OnefoldError, ValueError):
    """Weights that are damaged, hostile, or of another model."""

    exit_status = 4


class BadArtifact(BadCheckpoint):
    """An exported artifact that is damaged, or whose answer is not the one it promises."""


class NotWritable(OnefoldError, OSError):
    """There is no space, or the place cannot be written."""

    exit_status = 5


class RunBusy(OnefoldError):
    """Another process is using this run folder."""

    exit_status = 6


class NonFiniteLoss(OnefoldError, ArithmeticError):
    """The loss became NaN or infinite."""

    exit_status = 7


class LostWorker(OnefoldError):
    """A process that trains along, or runs a model, was lost and could not be replaced."""

    exit_status = 8


class DeviceFailed(OnefoldError):
    """A phone went away, or a program on it failed or says what cannot be understood."""

    exit_status = 9


class NetworkFailed(OnefoldError, OSError):
    """A host cannot be reached, or does not answer: what was asked of it may be there all the same."""

    exit_status = 10


class Stopped(OnefoldError):
    """Stopped by a signal, after everything was saved."""

    exit_status = 75


def describe_exit_status(status: int) -> str:
    """Say how a process ended, by its status as `subprocess` gives it: a signal is a negative number."""
    if status >= 0:
        return f"ended with status {status}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
