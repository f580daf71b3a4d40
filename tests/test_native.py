"""Without a C++ compiler everything works, and one sentence for all processes says that it is slower."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onefold.data.crop import resampler
from onefold.native import WARNED, NotCompiledWarning, loaded
from onefold.reparam.kernels.base import library

SOURCES = {"one": "int one() { return 1; }", "two": "int two() { return 2; }"}


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which no compiler is found, and nothing compiled is kept."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(WARNED, "")  # set, so that it is as before when the test is over
    return tmp_path


def load(folder: Path, name: str) -> object:
    (folder / f"{name}.cpp").write_text(SOURCES[name])
    return loaded(name, [folder / f"{name}.cpp"])


def test_the_first_library_warns_and_no_other(no_compiler: Path):
    with pytest.warns(NotCompiledWarning, match=r"no C\+\+ compiler: install .* slower") as seen:
        assert [load(no_compiler, name) for name in ("one", "two", "one")] == [None] * 3
    assert len(seen) == 1


def test_of_processes_side_by_side_the_first_warns(no_compiler: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert load(no_compiler, "one") is None  # a warning would be an error here
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.warns(NotCompiledWarning):
        load(no_compiler, "one")


def test_a_compiler_that_fails_is_quoted(no_compiler: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = no_compiler / "broken"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho some lines >&2\necho 'out of cheese' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.warns(NotCompiledWarning, match=r"compiled \(out of cheese\)"):
        assert load(no_compiler, "one") is None


@pytest.mark.slow
def test_a_training_without_a_compiler_says_so_once(no_compiler: Path):
    """Two processes, each of which resizes, trains and evaluates."""
    command = [sys.executable, "-m", "onefold.cli", "train", "--recipe", "digits:w025", "--epochs", "1", "--out", "run"]
    command += ["--processes", "2"] if sys.platform == "linux" else []
    done = subprocess.run(command, cwd=no_compiler, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("slower") == 1
    assert next(line for line in done.stderr.splitlines() if "slower" in line).startswith("warning: the C++ code")


def test_a_switch_holds_as_long_as_it_is_set(monkeypatch: pytest.MonkeyPatch):
    """A process that once did without compiled code would train other bits ever after."""
    monkeypatch.delenv("ONEFOLD_KERNELS", raising=False)
    before = [load() is None for load in (library, resampler)]
    monkeypatch.setenv("ONEFOLD_KERNELS", "plain")
    assert [library(), resampler()] == [None, None]
    monkeypatch.delenv("ONEFOLD_KERNELS")
    assert [load() is None for load in (library, resampler)] == before
    if before == [True, True]:
        pytest.skip("there is no C++ compiler")
