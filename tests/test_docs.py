"""README and docs: every `console` and `python` block runs, links lead somewhere, the site builds without a warning."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """The lines of a page's `console` blocks that start with a dollar; a backslash at the end of one continues it."""
    text = "".join(blocks(page, "console")).replace("\\\n", " ")
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


def with_blocks(language: str) -> list[Path]:
    """The pages that hold a block of this language."""
    return [page for page in PAGES if blocks(page, language)]


def test_every_line_of_a_console_block_is_a_command_of_ours():
    for page in PAGES:
        for line in "".join(blocks(page, "console")).replace("\\\n", " ").splitlines():
            assert line.startswith("$ onefold "), f"{page.name}: {line!r} is not run by a test: mark the block `sh`"


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("console"), ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_as_they_are_typed(page: Path, tmp_path: Path):
    for command in commands(page):
        words = shlex.split(command)
        program = Path(sys.executable).with_name(words[0])
        done = subprocess.run([program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


LONG = ("timm",)  # pages whose python trains a network of usual size


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page.stem in LONG else []) for page in with_blocks("python")],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request):
    code = "\n".join(blocks(page, "python"))
    if "import timm" in code:
        request.getfixturevalue("timm")  # skips where it is not installed
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*.md")], ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "create_model" in page


def test_readme_fits_one_screen_of_reading():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900
