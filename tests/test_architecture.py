"""The house keeps its own laws: imports, the public face, sizes, and a README that tells the truth."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import onefold
from onefold.recipes import Recipe, all_recipes, find_recipe

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_the_law_of_imports_holds():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_face_is_exactly_what_can_be_had():
    for name in onefold.__all__:
        thing = getattr(onefold, name)
        assert (thing.__name__ if isinstance(thing, ModuleType) else thing.__module__).startswith("onefold.")
        assert callable(thing)
    assert sorted(onefold._HOME_OF) == sorted(onefold.__all__)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = onefold.nothing_like_this


def test_importing_the_package_imports_no_torch():
    code = "import sys, onefold; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_room_is_an_attic_and_no_file_two_ideas():
    for path in SOURCES:
        assert path.stem not in ("utils", "helpers", "misc", "common"), path
        assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_found_by_its_name_and_survives_its_file(recipe: Recipe):
    assert find_recipe(recipe.name) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_architecture_maps_exactly_the_files_there_are():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    (tree,) = re.findall(r"```\nsrc/onefold/\n(.*?)```", text, re.S)
    mapped = re.findall(r"^  ([a-z0-9_/]+\.py)\b", tree, re.M)
    package = ROOT / "src" / "onefold"
    files = {str(path.relative_to(package)) for path in SOURCES}
    rooms = {str(path.relative_to(package)) for path in SOURCES if path.name == "__init__.py"} - {"__init__.py"}
    assert len(mapped) == len(set(mapped))
    assert set(mapped) | rooms == files | rooms


@pytest.mark.parametrize("package", ["onefold", "onefold.data", "onefold.models", "onefold.runtimes", "onefold.train"])
def test_an_import_of_everything_has_what_is_imported_when_it_is_used(package: str):
    """`import *` asks no module's __getattr__; the stubs that a type checker sees are the names to be had."""
    path = ROOT / "src" / package.replace(".", "/") / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    stated = {each.asname or "_" for node in imports for each in node.names}
    assert set(importlib.import_module(package).__all__) >= {name for name in stated if not name.startswith("_")}
