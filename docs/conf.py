"""Sphinx configuration: `make docs` builds the pages offline into build/docs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

project = "onefold"
author = "the onefold authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
root_doc = "index"
html_theme = "furo"
html_title = "onefold"
myst_heading_anchors = 3
# Links out of docs/ lead to files of the repository, which are no pages of the site.
suppress_warnings = ["myst.xref_missing"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
nitpicky = False
