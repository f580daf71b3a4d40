"""How a command ends: its exit status, and where it failed one line on stderr that says why and what to do."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from onefold.errors import OnefoldError

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's own, or of the click that typer carries


def status_of(command: Callable[[], int]) -> int:
    """Run a command; its exit status (see `errors`), a traceback only where ONEFOLD_DEBUG is set."""
    _speak_plainly()
    try:
        return command()
    except OnefoldError as error:
        return _failed(error, error.exit_status)
    except _UsageError as error:
        return _failed(error, 2, _usage(error))
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        return _failed(error, 1, "out of memory: try a smaller --batch-size or --img-size")
    except Exception as error:
        return _failed(error, 70, f"internal: {type(error).__name__}: {error}; run again with --debug and report it")


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
    context = getattr(error, "ctx", None)
    hint = f" (try `{context.command_path} --help`)" if context else ""
    return getattr(error, "format_message", error.__str__)() + hint


def _failed(error: BaseException, status: int, text: str | None = None) -> int:
    if os.environ.get("ONEFOLD_DEBUG"):
        raise error
    line = " ".join((text or str(error)).split())
    print(f"error: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return status
