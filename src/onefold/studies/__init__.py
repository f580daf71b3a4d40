"""Studies: experiments of the papers, run again on this machine beside the papers' own tables.

Each module has one study or several that belong together; `find_study` opens one by its name.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module

from onefold.errors import BadArgument
from onefold.studies.study import Study as Study

_MODULES = {
    "activations": "activations",
    "blocks": "activations",
    "branches": "branches",
    "correlation": "correlation",
    "pareto": "pareto",
    "width-resolution": "width_resolution",
    "depth-width": "convolutions",
    "standard-vs-separable": "convolutions",
    "resolution": "resolution",
    "tokens": "tokens",
}


def study_names() -> tuple[str, ...]:
    """The names of all studies, in the order in which they are listed."""
    return tuple(_MODULES)


def find_study(name: str) -> Study:
    """Give the study of this name. Raises BadArgument where there is none."""
    if name not in _MODULES:
        near = get_close_matches(name, _MODULES, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(_MODULES)}"
        raise BadArgument(f"there is no study {name!r}: {hint}")
    studies: dict[str, Study] = import_module(f"onefold.studies.{_MODULES[name]}").STUDIES
    return studies[name]
