"""`onefold models` prints what was counted: the table in the package is what `count_model` gives, and needs no torch.

`python tests/test_models_table.py` writes it anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from onefold.commands.models import COUNTS_FILE, ModelRow, count_model, model_rows
from onefold.file_io import write_text
from onefold.models import CATALOGUE


@pytest.fixture(scope="module")
def rows() -> dict[str, ModelRow]:
    return {row.name: row for row in model_rows()}


def test_the_table_has_the_catalogue_in_its_order(rows: dict[str, ModelRow]) -> None:
    assert list(rows) == list(CATALOGUE)
    for name, entry in CATALOGUE.items():
        assert (rows[name].size, rows[name].top1, rows[name].source) == (entry.size, entry.top1, entry.source)


@pytest.mark.parametrize("name", ["mobileone_s0", "mobilenetv1_025.tf"])
def test_the_table_holds_what_is_counted(name: str, rows: dict[str, ModelRow]) -> None:
    assert count_model(name) == rows[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CATALOGUE))
def test_the_table_holds_what_is_counted_of_every_network(name: str, rows: dict[str, ModelRow]) -> None:
    assert count_model(name) == rows[name]


def test_another_size_is_counted(rows: dict[str, ModelRow]) -> None:
    (row,) = model_rows("mobilenetv1_025", 128)
    full = rows["mobilenetv1_025"]
    assert row.train["params"] == full.train["params"]
    assert row.folded["macs"] == pytest.approx(full.folded["macs"] * (128 / 224) ** 2, rel=0.02)


def test_the_table_is_there_without_torch() -> None:
    code = "import sys; from onefold.cli import main; main(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(asdict(count_model(name))) for name in CATALOGUE)
    write_text(COUNTS_FILE, f"[\n{lines}\n]\n")
