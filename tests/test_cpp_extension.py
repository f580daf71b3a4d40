"""Compiled code is the wheel's, or of this machine's compiler; without both one sentence for all processes says so."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from onefold import cpp_extension
from onefold.checksums import write_sealed_folder
from onefold.cpp_extension import WARNED_VARIABLE, NotCompiledWarning, load_library
from onefold.data.crop import load_resampler
from onefold.file_io import cache_folder
from onefold.reparam.kernels.base import load_kernels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"one": 'extern "C" int one() { return 1; }', "two": 'extern "C" int two() { return 2; }'}


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries of a test's own are forgotten after it."""
    monkeypatch.setattr(cpp_extension, "LIBRARY_SOURCES", dict(cpp_extension.LIBRARY_SOURCES))


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which no compiler is found, and nothing compiled is kept."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(WARNED_VARIABLE, "")  # set, so that it is as before when the test is over
    return tmp_path


def load(folder: Path, name: str) -> object:
    (folder / f"{name}.cpp").write_text(SOURCES[name])
    cpp_extension.LIBRARY_SOURCES[name] = (str(folder / f"{name}.cpp"),)
    return load_library(name)


def test_the_first_library_warns_and_no_other(no_compiler: Path):
    with pytest.warns(NotCompiledWarning, match=r"no C\+\+ compiler: install .* 2 to 6 times as long") as seen:
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
    (said,) = (line for line in done.stderr.splitlines() if "times as long" in line)
    assert said.startswith("warning: the C++ code")


def test_a_switch_holds_as_long_as_it_is_set(monkeypatch: pytest.MonkeyPatch):
    """A process that once did without compiled code would train other bits ever after."""
    monkeypatch.delenv("ONEFOLD_KERNELS", raising=False)
    before = [load() is None for load in (load_kernels, load_resampler)]
    monkeypatch.setenv("ONEFOLD_KERNELS", "plain")
    assert [load_kernels(), load_resampler()] == [None, None]
    monkeypatch.delenv("ONEFOLD_KERNELS")
    assert [load() is None for load in (load_kernels, load_resampler)] == before
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


def test_a_library_of_other_flags_is_another(compiler: Path, monkeypatch: pytest.MonkeyPatch):
    source = '#ifndef GIVEN\n#define GIVEN 1\n#endif\nextern "C" int given() { return GIVEN; }'
    (compiler / "given.cpp").write_text(source)
    cpp_extension.LIBRARY_SOURCES["given"] = (str(compiler / "given.cpp"),)
    line = os.environ["CXX"]
    for flag, answer in (("", 1), (" -DGIVEN=2", 2), ("", 1)):
        monkeypatch.setenv("CXX", line + flag)
        library = load_library("given")
        assert library is not None
        assert library.given() == answer


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


# ---------------------------------------------------------------------------------------- from a wheel

LEVEL = """
#if defined(__SSE4_2__) || defined(__ARM_FEATURE_DOTPROD)
extern "C" int level() { return 2; }
#else
extern "C" int level() { return 1; }
#endif
"""
BETTER = {"x86_64": "x86-64-v2", "aarch64": "armv8.2-a+dotprod"}.get(platform.machine(), "")
PLAIN = {"x86_64": "x86-64", "aarch64": "armv8-a"}.get(platform.machine(), "")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "level.cpp"
    path.write_text(LEVEL)
    return path


@pytest.fixture(scope="module")
def compiled(source: Path) -> dict[str, bytes]:
    """The libraries of a wheel, one for plain processors and one for those with the feature `better`."""
    if not (BETTER and sys.platform == "linux" and (shutil.which("c++") or shutil.which("g++"))):
        pytest.skip("there is no C++ compiler whose wheels would carry libraries")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_extension, "LIBRARY_SOURCES", {"level": (str(source),)})
        patch.setattr(cpp_extension, "_LEVELS", {platform.machine(): {BETTER: "better", PLAIN: ""}})
        return cpp_extension.compile_for_wheel()


@pytest.fixture
def install(
    no_compiler: Path, source: Path, compiled: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, bytes]]:
    """Put libraries where a wheel has them, the compiled ones or others under their names, on such a processor."""

    def put(*, change: Callable[[bytes], bytes] = bytes, features: str = "flags : fpu better") -> dict[str, bytes]:
        contents = {name: change(content) for name, content in compiled.items()}
        monkeypatch.setattr(cpp_extension, "_WHEEL", no_compiler / "lib")
        monkeypatch.setattr(cpp_extension, "_LEVELS", {platform.machine(): {BETTER: "better", PLAIN: ""}})
        monkeypatch.setattr(cpp_extension, "_processor", lambda: features)
        cpp_extension.LIBRARY_SOURCES["level"] = (str(source),)
        write_sealed_folder(no_compiler / "lib", contents)
        return contents

    return put


def test_the_wheels_library_for_this_processor_is_taken(install, monkeypatch: pytest.MonkeyPatch):
    """Without a compiler, and without a warning, which would be an error here."""
    install()
    assert load_library("level").level() == 2
    assert cpp_extension.LIBRARY_ORIGINS["level"] == f"from the wheel, for {BETTER}"
    monkeypatch.setattr(cpp_extension, "_processor", lambda: "flags : fpu bet")
    assert load_library("level").level() == 1
    assert cpp_extension.LIBRARY_ORIGINS["level"] == f"from the wheel, for {PLAIN}"
    monkeypatch.setenv("ONEFOLD_KERNELS", "compile")
    with pytest.warns(NotCompiledWarning):
        assert load_library("level") is None
    assert cpp_extension.LIBRARY_ORIGINS["level"].startswith("not compiled (no C++ compiler")


def another_machine(content: bytes) -> bytes:
    return content[:18] + (b"\xf3\0" if content[18:20] != b"\xf3\0" else b"\x3e\0") + content[20:]  # e_machine: RISC-V


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (another_machine, "cannot open shared object file|Exec format|invalid ELF|wrong"),
        (lambda content: content[:4] + b"\1" + content[5:], "wrong ELF class"),
        (lambda content: b"", "file too short"),
    ],
    ids=["machine", "32 bits", "empty"],
)
def test_a_library_of_another_abi_is_passed_over_and_said(install, caplog: pytest.LogCaptureFixture, change, says: str):
    install(change=change)
    with pytest.warns(NotCompiledWarning, match="no C"):
        assert load_library("level") is None
    (note,) = caplog.messages
    assert note.startswith("the wheel's C++ library level cannot be used: ")
    assert re.search(says, note)


def test_a_damaged_library_of_the_wheel_is_not_loaded(install, no_compiler: Path, caplog: pytest.LogCaptureFixture):
    for damage in (lambda whole: whole[: len(whole) // 2], lambda whole: bytes(len(whole)), lambda whole: whole + b"x"):
        for name, content in install().items():
            (no_compiler / "lib" / name).write_bytes(damage(content))
        with pytest.warns(NotCompiledWarning):
            assert load_library("level") is None
        assert "is damaged: its size or SHA-256" in caplog.messages[-1]
        os.environ[WARNED_VARIABLE] = ""
    (no_compiler / "lib" / "manifest.json").unlink()
    with pytest.warns(NotCompiledWarning):
        assert load_library("level") is None
    assert "manifest.json is missing or damaged" in caplog.messages[-1]


def test_a_library_of_other_sources_or_processors_is_not_found(
    install, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    install()
    cpp_extension.LIBRARY_SOURCES["level"] = (str(source), str(source))  # a version of other sources
    with pytest.warns(NotCompiledWarning):
        assert load_library("level") is None
    assert "it is of another version, or for other processors than this" in caplog.text
    install()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setenv(WARNED_VARIABLE, "")
    with pytest.warns(NotCompiledWarning):
        assert load_library("level") is None
    assert caplog.messages[-1].endswith("than this riscv64")


def test_with_a_compiler_what_the_wheel_lacks_is_compiled(
    install, no_compiler: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    install(change=another_machine)
    monkeypatch.setenv("PATH", os.defpath)
    assert load_library("level").level() in (1, 2)
    assert cpp_extension.LIBRARY_ORIGINS["level"].startswith(
        f"compiled on this machine, kept in {no_compiler / 'cache'}"
    )
    assert len(caplog.messages) == 1


PURE = "this wheel is pure Python, without compiled C++ code: no C++ compiler"


@pytest.fixture
def build_hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """hatch_build.py, with as much of hatchling as it stands on."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = type("BuildHookInterface", (SimpleNamespace,), {})  # type: ignore[attr-defined]
    names = interface.__name__.split(".")
    for i in range(len(names)):
        monkeypatch.setitem(sys.modules, ".".join(names[: i + 1]), interface)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_carries_what_was_compiled_and_is_pure_without_a_compiler(
    build_hook: ModuleType, no_compiler: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    app = SimpleNamespace(display_info=said.append, display_warning=said.append)
    hook = build_hook.CompiledLibraries(root=str(ROOT), app=app)
    pure = {"pure_python": True, "force_include": {}}
    for version, says in (("editable", []), ("standard", [PURE])):
        data = {**pure, "force_include": {}}
        hook.initialize(version, data)
        assert data == pure
        assert [line[: len(PURE)] for line in said] == says
    monkeypatch.setattr(cpp_extension, "compile_for_wheel", lambda: {"one-x.so": b"ELF"})
    data = {**pure, "force_include": {}}
    hook.initialize("standard", data)
    assert data["tag"].startswith("py3-none-")
    assert data["pure_python"] is False
    ((folder, place),) = data["force_include"].items()
    assert place == "onefold/lib"
    assert sorted(path.name for path in Path(folder).iterdir()) == ["manifest.json", "one-x.so"]
    hook.finalize("standard", data, "")
    assert not Path(folder).exists()


def test_a_compiler_that_is_no_command_line_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "g++ 'open")
    with pytest.raises(OSError, match="CXX is no command line: No closing quotation"):
        cpp_extension._compiler()
