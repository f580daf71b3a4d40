"""Classes that only one of two splits has: which they are, and what may be meant, for an error that says what to do.

| only in train | only in val | is said |
|---|---|---|
| Cat, fire_truck, 007, class0 | cat, fire truck, 7, Class 0 | how to rename those of val |
| 0 | 2 (0 to N - 1 beside 1 to N) | where the numbers begin |
| cat, dog | 0, 1 | that one has names and the other numbers |
| | owl | to move it away, or to train on it too |
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.errors import BadData


class ClassDifferenceError(BadData):
    """Classes of a split that train does not have; `classes` are train's."""

    def __init__(self, text: str, classes: frozenset[str]) -> None:
        self.classes = classes
        super().__init__(text)


def class_difference(place: str, sides: Mapping[str, frozenset[str]]) -> ClassDifferenceError:
    """Say which classes only one of two splits has, of train and another one, and what to do."""
    (one, these), (other, those) = sides.items()
    parts = [
        f"only in {name}: {join_names(sorted(x))}" for name, x in ((one, these - those), (other, those - these)) if x
    ]
    way_out = _way_out(one, these, other, those)
    return ClassDifferenceError(f"{place}: the classes differ; {'; '.join(parts)}: {way_out}", these)


def _way_out(one: str, these: frozenset[str], other: str, those: frozenset[str]) -> str:
    alike = _find_alike(these - those, those - these)
    if alike:
        renamed = [f"{printable_name(name)} to {printable_name(alike[name])}" for name in sorted(alike)[:3]]
        more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
        return f"rename in {other} {', '.join(renamed)}{more}"
    if all(map(str.isdecimal, these | those)):
        first, others = {int(name) for name in these}, {int(name) for name in those}
        for step in (1, -1):
            if others <= {number + step for number in first} and min(others) == min(first) + step:
                return f"{one} counts from {min(first)} and {other} from {min(others)}: number both alike"
    is_number = [all(map(str.isdecimal, names)) for names in (these, those)]
    if any(is_number) and not all(is_number):
        numbering, naming = (one, other) if is_number[0] else (other, one)
        return f"{numbering} numbers the classes and {naming} names them: write names in both"
    extra = join_names(sorted(those - these), 3)
    return f"move {extra} out of {other}, or put images of it into {one}"


def _find_alike(wanted: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Give for names the wanted one that differs in case, blanks, signs and leading zeros only, where it is one."""
    by_form: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        by_form[_form(name)].append(name)
    found = {name: by_form.get(_form(name), []) for name in names}
    return {name: those[0] for name, those in found.items() if len(those) == 1}


def _form(name: str) -> str:
    plain = re.sub(r"[\W_]+", "", name.casefold())
    return re.sub(r"(?<!\d)0+(?=\d)", "", plain) or name
