"""Without a C++ compiler everything works, and one sentence for all processes says that it is slower."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from onefold.data.crop import resampler
from onefold.native import WARNED, NotCompiledWarning, loaded
from onefold.reparam.kernels.base import library
from onefold.storage import cache_folder

SOURCES = {"one": 'extern "C" int one() { return 1; }', "two": 'extern "C" int two() { return 2; }'}


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


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler in name that copies a library that is there, and a fresh cache."""
    real = shutil.which("c++") or shutil.which("g++") or pytest.skip("there is no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setenv("CXX", f"{launcher} {real} -O0")
    return tmp_path


def test_a_library_in_the_cache_is_checked_before_it_is_loaded(compiler: Path, caplog: pytest.LogCaptureFixture):
    """Loaded half-written it would end this process by SIGBUS; another's would compute something else."""
    assert load(compiler, "one").one() == 1
    (library,) = (compiler / "cache").rglob("*.so")
    whole = library.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], bytes(len(whole)), b"\x7fELF" + whole[:3] + whole[4:]):
        library.unlink()  # a file that is loaded is not written to
        library.write_bytes(damaged)
        assert not caplog.messages
        assert load(compiler, "one").one() == 1
        assert "compiled anew" in caplog.text
        assert library.read_bytes() == whole
        caplog.clear()
    assert [path.name for path in (compiler / "cache" / "onefold").iterdir() if path.suffix == ".new"] == []


def test_without_a_home_the_cache_is_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user that the system does not know
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(OSError, match="others may write to it"):
        cache_folder()
