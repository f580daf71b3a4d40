"""How a command ends: its exit status, and where it failed one line on stderr that says why and what to do."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import typer

from onefold.errors import BadArgument, NotWritable, OnefoldError

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's own, or of the click that typer carries


def run_command(command: Callable[[], int]) -> int:
    """Run a command; its exit status (see `errors`), a traceback only where ONEFOLD_DEBUG is set."""
    _open_closed_streams()
    _speak_plainly()
    before, OnefoldError.on_command_line = OnefoldError.on_command_line, True
    try:
        status = command()
        sys.stdout.flush()  # what cannot be written is noticed here, and not after the status is given
        return status
    except OnefoldError as error:
        return _failed(error, error.exit_status)
    except _UsageError as error:
        return _failed(error, 2, _usage(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        return _reader_is_gone()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # click ends with status 1 then, which is that of a gate
            return _reader_is_gone()
        raise
    except OSError as error:
        if error.errno == errno.ENOENT and _is_current_folder_gone():
            return _failed(error, BadArgument.exit_status, "the current folder was removed: change to another one")
        if error.errno not in _OF_THE_SYSTEM and "temporary directory" not in str(error):
            return _internal(error)
        try:
            sys.stdout.flush()
        except OSError:  # it would be tried again when the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        why = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return _failed(error, NotWritable.exit_status, f"the system refused to go on: {why}{_hint(error)}")
    except MemoryError as error:
        return _failed(error, 1, "out of memory: try a smaller --batch-size or --img-size")
    except Exception as error:
        return _internal(error)
    finally:
        OnefoldError.on_command_line = before


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_SYSTEM = {*_NO_SPACE, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EIO}
"""What no check before the work can rule out: a disk that is full by now, or too many open files."""


def _is_current_folder_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _reader_is_gone() -> int:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _hint(error: OSError) -> str:
    if "temporary directory" in str(error):
        return "; set TMPDIR to a folder that can be written"
    if error.errno in _NO_SPACE:
        return "; make room where it writes to (temporary files: TMPDIR)"
    return "; raise the limit (ulimit -n)" if error.errno in (errno.EMFILE, errno.ENFILE) else ""


def _open_closed_streams() -> None:
    """Have what a shell closed (`2>&-`) be open: the next file would take its number, and get what is said there."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(lowest)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (as long as the process)


class _Notes(logging.Handler):
    """Log lines for a person, on what stderr is by then: a live line on a terminal stands in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line."""
        print(self.format(record).encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def _speak_plainly() -> None:
    """Library warnings and log lines as single lines on stderr."""
    handler = _Notes()
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("onefold")
    for earlier in [each for each in logger.handlers if isinstance(each, _Notes)]:
        logger.removeHandler(earlier)  # of an earlier command in this process
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_place: Any, **_more: Any) -> None:
    """Ours as a line; those that other packages address to programmers are not for a user."""
    if category.__module__.startswith("onefold"):
        print(f"warning: {message}", file=sys.stderr)


def _usage(error: Exception) -> str:
    context, text = getattr(error, "ctx", None), getattr(error, "format_message", error.__str__)()
    if context is None:
        return text
    if type(error).__name__ == "NoSuchOption":
        text = unknown_option_error(context, str(getattr(error, "option_name", "")))
    elif (extra := re.match(r"Got unexpected extra argument\S* \((\S+)", text)) and "--data" in _options(context):
        text = unexpected_argument_error(extra[1].rstrip(")"))
    else:
        text = re.sub(r"Input should be a valid integer.*", "a whole number is expected", text)
        text = re.sub(r"Input should be a valid number.*", "a number is expected", text)
    return f"{text} (try `{context.command_path} --help`)"


_OTHER_NAMES = {  # options of other tools and other verbs, and what may be meant by them here
    "--batch": ["--batch-size"],
    "--bs": ["--batch-size"],
    "--checkpoint": ["--weights"],
    "--conf": ["--min-confidence"],
    "--csv": ["--out answers.csv"],
    "--dataset": ["--data"],
    "--format": ["--to"],
    "--fp16": ["--precision fp16", "--half"],
    "--gpu": ["--device cuda"],
    "--half": ["--precision fp16"],
    "--imgsz": ["--img-size"],
    "--input-size": ["--img-size"],
    "--int8": ["--precision int8"],
    "--learning-rate": ["--lr"],
    "--lr-schedule": ["--plan.schedule.kind"],
    "--lr0": ["--lr"],
    "--num-workers": ["--plan.workers"],
    "--optimizer": ["--plan.optimizer.kind"],
    "--pretrained": ["--weights"],
    "--project": ["--out"],
    "--quantize": ["--precision int8", "--int8"],
    "--runtime": ["--to"],
    "--save-dir": ["--out"],
    "--sched": ["--plan.schedule.kind"],
    "--scheduler": ["--plan.schedule.kind"],
    "--size": ["--img-size"],
    "--threshold": ["--min-confidence"],
    "--topk": ["--top"],
    "--weight-decay": ["--plan.optimizer.weight_decay"],
    "--workers": ["--plan.workers", "--threads"],
}


def unknown_option_error(context: typer.Context, flag: str) -> str:
    """Say that a verb has no such option, and which is meant: of another tool, or nearly spelled as one of its own."""
    verb, options, spelled = context.info_name, _options(context), flag.replace("_", "-")
    is_recipe = bool(context.allow_extra_args)  # of train, which takes any field of the recipe
    others = [
        name for name in _OTHER_NAMES.get(spelled, ()) if name.split()[0] in options or (is_recipe and "." in name)
    ]
    near = others or (
        [spelled] if spelled in options else difflib.get_close_matches(spelled, options, n=1, cutoff=0.75)
    )
    hint = f": did you mean {near[0]}?" if near else ""
    fields = "; a recipe's field is changed like --plan.epochs 5" if is_recipe and not near else ""
    return f"{verb} has no option {flag}{hint}{fields}"


def unexpected_argument_error(word: str) -> str:
    """Say how a place is given that stands where none is expected."""
    return f"{word!r} is not expected here: if it is the place of the photos, give it as --data {word}"


def _options(context: typer.Context) -> list[str]:
    return [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]


def _internal(error: Exception) -> int:
    return _failed(error, 70, f"internal: {type(error).__name__}: {error}; run again with --debug and report it")


def _failed(error: BaseException, status: int, text: str | None = None) -> int:
    if os.environ.get("ONEFOLD_DEBUG"):
        raise error
    line = " ".join((text or str(error)).split())
    with suppress(OSError):  # stderr is on a full disk, or its reader is gone: the status tells
        print(f"error: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)
    return status
