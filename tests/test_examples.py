"""The scripts and the notebook in examples/ run as they are, offline, on what they make themselves."""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run a script as `python examples/NAME ARGUMENTS` does; what it makes lies in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in names)


def test_custom_block_trains_alike_by_each_route_and_fuses(tmp_path, monkeypatch, capsys):
    run("custom_block.py", tmp_path, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    losses = [[float(loss.strip(",")) for loss in line.split()[2:]] for line in lines[:3]]
    for route in losses[1:]:
        assert route == pytest.approx(losses[0], rel=1e-4)
    assert "Conv2d(16, 16, kernel_size=(3, 3)" in lines[3]
    assert lines[4].endswith("norms left: 0")


@pytest.mark.slow
@pytest.mark.usefixtures("timm")
def test_a_timm_network_is_fused(tmp_path, monkeypatch, capsys):
    run("fuse_timm_network.py", tmp_path, monkeypatch)
    assert "norms left: none" in capsys.readouterr().out


def test_without_timm_one_sentence_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    run("fuse_timm_network.py", tmp_path, monkeypatch)
    assert capsys.readouterr().out.startswith("Skipped: timm:mobileone_s0 needs timm")


@pytest.mark.slow
def test_photos_are_learned(tmp_path, monkeypatch, capsys):
    run("finetune_photos.py", tmp_path, monkeypatch)
    first, answer = capsys.readouterr().out.splitlines()
    assert "held-out photos" in first
    assert answer.startswith("blue/")


@pytest.mark.slow
def test_int8_passes_its_gate(tmp_path, monkeypatch, capsys):
    run("int8_with_gate.py", tmp_path, monkeypatch)
    assert "passed: no artifact loses more than 2 points" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "a notebook is kept without its outputs"
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert list(tmp_path.glob("onefold-*/report.html"))
