"""How far a command is, as it is seen on a terminal and in a log, whatever the command does to its own process."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from onefold.cli.progress_writer import Clock, live_line
from onefold.cli.terminal_progress import _Stages, show_progress
from onefold.commands.progress_bars import training_bar, use_progress_handler
from onefold.progress_steps import Steps

logger = logging.getLogger("onefold").getChild("progress")


PARTS = ("look",)  # functions that tell of parts


def told(*records: tuple[str, str, int, int]) -> list[list[str]]:
    """What the writer is told of stages: (function, what, done, total)."""
    updates: list[str] = []
    stages = _Stages("exporting", updates.append)
    for function, what, done, total in records:
        record = logging.LogRecord(logger.name, 10, "x.py", 1, what, (), None, function)
        record.done, record.total = done, total
        record.part = function in PARTS
        stages.emit(record)
    return [update.split("\t")[1:] for update in updates]


def test_a_stage_within_another_is_a_share_of_its_step():
    assert told(
        ("export", "exporting to onnx", 0, 2),
        ("calibrate", "calibrating", 1, 4),
        ("calibrate", "calibrated", 1, 1),
        ("export", "exporting to openvino", 1, 2),
    ) == [
        ["0.00000", "exporting to onnx (1 of 2)"],
        ["0.12500", "exporting to onnx (1 of 2), calibrating (2 of 4)"],
        ["0.00000", "exporting to onnx (1 of 2)"],
        ["0.50000", "exporting to openvino (2 of 2)"],
    ]


def test_what_is_counted_within_a_stage_that_is_not_tells_how_long_that_takes():
    assert told(("bench", "timing", 0, 0), ("series", "calls", 30, 40)) == [
        ["0.00000", "timing"],
        ["0.75000", "timing, calls (31 of 40)"],
    ]
    assert told(("bench", "timing", 0, 0), ("series", "calls", 1, 1)) == [["0.00000", "timing"]] * 2


def test_of_a_part_of_something_longer_nothing_is_told_of_what_is_left():
    assert told(("look", "looking at photos", 3, 4), ("look", "", 1, 1)) == [
        ["0.00000", "looking at photos (4 of 4)"],
        ["0.00000", "exporting"],
    ]
    assert told(("export", "exporting", 1, 2), ("look", "looking", 1, 4))[-1] == [
        "0.62500",
        "exporting (2 of 2), looking (2 of 4)",
    ]


def test_of_steps_that_are_not_alike_the_costs_tell_how_far_it_is(monkeypatch):
    """One that takes nine tenths of the time is nine tenths of the way; one without a name is not shown."""
    updates: list[str] = []
    with use_progress_handler(_Stages("deploying", updates.append)):
        steps = Steps([("exporting", 5.0), ("calibrating", 90.0), ("timing", 5.0)])
        steps.begin(0)
        steps.begin(1)
        inner = Steps([("reading", 1.0), ("", 3.0)])
        inner.begin(1)
        logger.debug("trying", extra={"done": 1, "total": 2})
        steps.begin(2)
        steps.end()
    assert [update.split("\t")[1:] for update in updates] == [
        ["0.00000", "exporting (1 of 3)"],
        ["0.05000", "calibrating (2 of 3)"],
        ["0.27500", "calibrating (2 of 3)"],  # 5 + 90 / 4
        ["0.61250", "calibrating (2 of 3), trying (2 of 2)"],  # 5 + 90 (1 + 3 / 2) / 4
        ["0.95000", "timing (3 of 3)"],
        ["0.00000", "deploying"],
    ]


def test_steps_with_numbers_of_their_own_are_not_numbered_again_and_counts_say_of_what():
    updates = list[str]()
    with use_progress_handler(_Stages("deploying", updates.append)):
        Steps([("trying candidate 1 of 1", 1.0), ("calibrating", 1.0)], numbered=False).begin(0)
        logger.debug("calibrating", extra={"done": 163, "total": 179, "unit": "operation "})
    assert updates[-1].split("\t")[2] == "trying candidate 1 of 1, calibrating (operation 164 of 179)"


def test_what_is_left_is_reckoned_from_the_last_update():
    clock = Clock("exporting", 100.0)
    assert clock.text(104.0) == "exporting: 0:00:04"
    clock.update("10.0\t0.25000\treading photos (2 of 4)\n", 110.0)
    assert clock.text(110.0) == "reading photos (2 of 4): 0:00:10, about 0:00:30 left"
    assert clock.text(130.0) == "reading photos (2 of 4): 0:00:30, about 0:00:10 left"
    assert clock.text(150.0) == "reading photos (2 of 4): 0:00:50"  # it takes longer than that
    assert live_line(clock, 150.0, 80, "|") == "\r\x1b[2K| reading photos (2 of 4): 0:00:50"
    assert live_line(clock, 130.0, 40, "|") == "\r\x1b[2K| readi...: 0:00:30, about 0:00:10 left"


BUSY = """
import ctypes, logging
from onefold.cli import terminal_progress
from onefold.runtimes.base import suppress_native_output, suppress_output

with terminal_progress.show_progress("first"):
    with suppress_output(), suppress_native_output():  # what is written to stderr here is lost
        ctypes.PyDLL(None).usleep(900_000)  # and no other thread of Python runs
    logging.getLogger("onefold.progress").debug("second")
    print("an answer,", end=" ")
    print("in two parts")
    ctypes.PyDLL(None).usleep(900_000)
    print("the end", end="")
print("!")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no terminals of this kind")
def test_a_terminal_is_written_to_while_python_stands_still():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_PROGRESS", None)
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=theirs, stderr=theirs, stdin=theirs, env=environment
    ) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so of a terminal that is closed
                break
            if not part:
                break
            text += part
        assert process.wait() == 0
    os.close(ours)
    shown = text.decode()
    assert len(re.findall(r"\S first: 0:00:0\d", shown)) > 1
    assert len(re.findall(r"\S second: 0:00:0\d", shown)) > 1
    left = [line.rpartition("\x1b[2K")[2] for line in shown.replace("\r\n", "\n").split("\n")]
    assert left == ["an answer, in two parts", "the end!", ""]


def test_a_log_has_a_line_now_and_then(tmp_path: Path, monkeypatch):
    from onefold.cli import terminal_progress as module

    monkeypatch.setattr(module, "_FIRST_S", 0.05)
    monkeypatch.setattr(module, "_EVERY_S", 0.05)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with show_progress("reading [photos]"):
            logger.debug("reading\n%s", "b/\x1b[2J", extra={"done": 4, "total": 5})
            deadline = time.monotonic() + 30
            while "5 of 5" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
    assert re.fullmatch(r"(.*: 0:00:00\n)+", log.read_text())
    assert log.read_text().splitlines()[-1] == "reading?b/?[2J (5 of 5): 0:00:00"


TRAINED = """
import math
from types import SimpleNamespace
from onefold.commands.progress_bars import training_bar
with training_bar() as on_progress:
    at = dict(epochs=1, epoch=1, steps=1, step=1, global_step=1, loss=0.5, eta_s=math.nan, metrics={"top1": 50.0})
    on_progress(SimpleNamespace(**at, is_evaluation=True))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no terminals of this kind")
@pytest.mark.parametrize("columns", [0, 120])
def test_in_python_a_terminal_shows_a_bar_though_it_may_not_know_its_width(columns: int):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    done = subprocess.run([sys.executable, "-c", TRAINED], stderr=theirs, check=True)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "epoch 1/1: 100%" in text
    assert "val top-1=50.00" in text


def test_in_python_a_log_has_a_line_for_each_validation(capsys):
    with training_bar() as on_progress:
        at = {"epochs": 2, "epoch": 1, "steps": 3, "loss": 0.5, "eta_s": math.nan}
        on_progress(SimpleNamespace(**at, step=3, global_step=3, metrics={}, is_evaluation=False))  # type: ignore[arg-type]
        on_progress(SimpleNamespace(**at, step=3, global_step=3, metrics={"top1": 50.0}, is_evaluation=True))  # type: ignore[arg-type]
    assert capsys.readouterr().err == "epoch 1 of 2: loss 0.500, val top-1 50.00 %\n"


def test_a_command_whose_stderr_is_no_file_is_not_disturbed(capsys):
    with show_progress("scoring"):
        print("an answer")
    assert capsys.readouterr() == ("an answer\n", "")
    assert not logger.handlers


def test_libraries_that_count_what_was_not_collected_stay_quiet_at_the_end() -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, triton._C.libtriton; sys.argv[1:] = ['--version']; from onefold.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "leaked" in done.stderr) == (0, False)
