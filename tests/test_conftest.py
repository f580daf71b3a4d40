"""The options that CI gives to pytest: what has passed is not run again, and what has not begun in time is skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import conftest

# The clock jumps in the first test, so that the limit is over without a wait.
TESTS = """
import time

def test_first():
    now = time.monotonic
    time.monotonic = lambda: now() + 3600

def test_second():
    pass

def test_third():
    raise AssertionError("it runs where there is time for it")
"""


def run_pytest(folder: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-rs"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_what_has_not_begun_in_time_is_skipped_and_said(tmp_path: Path) -> None:
    for name in ("conftest.py", "available_runtimes.py"):
        shutil.copy(Path(conftest.__file__).parent / name, tmp_path)
    (tmp_path / "test_three.py").write_text(TESTS)
    status, said = run_pytest(tmp_path, "--time-limit", "30", "--write-passed", "passed.txt")
    assert status == 0, said
    assert "1 passed, 2 skipped" in said
    assert "not begun within 30 minutes, the time limit of this run" in said
    assert (tmp_path / "passed.txt").read_text() == "test_three.py::test_first\n"
    # in the next run the first one's clock does not jump: it is not run
    status, said = run_pytest(tmp_path, "--time-limit", "30", "--deselect-passed", "passed.txt")
    assert status == 1, said
    assert "1 failed, 1 passed, 1 deselected" in said
    status, said = run_pytest(tmp_path, "--time-limit", "61", "-k", "first or second")
    assert status == 0, said
    assert "2 passed" in said
