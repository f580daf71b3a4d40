"""Which class of the data is which output of a network: one rule, for evaluation, teachers, and heads that are kept.

1. By name, where any of the data's names is among the network's. Names are compared in Unicode's form NFC; where those
   of both are exactly the numbers 0 to N-1, as numbers, so that "07" is 7.
2. By WordNet id, where the network is one for ImageNet-1k: its outputs are in the order of the sorted ids.
3. By number, where the data's names are exactly the numbers 0 to N-1 and the network has N outputs; "07" is 7. So
   numbers are never in the order of texts, in which 10 comes before 2.
4. By order, where the network does not name its outputs and has as many as the data have classes: the i-th output is
   the i-th class of the data, as torchvision's ImageFolder numbers sorted folders. This assumption is logged.

Everything else cannot be decided, and is refused.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from onefold.data.class_lists import read_class_lists
from onefold.data.imagenet_variants import wordnet_ids
from onefold.errors import BadData
from onefold.file_io import normalize_class_name, parse_json, read_text
from onefold.models.checkpoint_metadata import find_class_names

_log = logging.getLogger("onefold")

_IMAGENET = 1000
_FIRST = (("tench", "goldfish"), ("n01440764", "n01443537"))  # how lists of ImageNet-1k's classes begin
_SHOWN = 3
_HINT = "give data of its classes, or the names of its outputs, in their order, with --classes FILE"


def match_classes(
    wanted: Sequence[str], known: Sequence[str] | None, num_outputs: int, title: str, *, hint: str = _HINT
) -> list[int | None]:
    """Give for each class of the data the network's output, None for a class that the network does not know.

    `known` are the network's names, None where it has none. In messages `title` names the network, and `hint` says what
    to do. Logs what it assumes. Raises BadData where it cannot be decided.
    """
    if not num_outputs:
        raise BadData(f"{title} has no last layer, so that its outputs are features and no classes: fit one (train)")
    wanted = [normalize_class_name(name) for name in wanted]
    outputs = None if known is None else [normalize_class_name(name) for name in known]
    ids = wordnet_ids() if num_outputs == _IMAGENET else ()
    numbers, theirs = _numbers(wanted), _numbers(outputs or ())
    if outputs is not None and sorted(theirs) == sorted(numbers) == list(range(num_outputs)):
        return [theirs.index(number) for number in numbers]  # "07" is 7, also where "10" is "10"
    if outputs is not None and set(wanted) & set(outputs):
        double = sorted(name for name, count in Counter(outputs).items() if count > 1 and name in wanted)
        if double:
            raise BadData(f"{title} has two outputs each for {len(double)} of the classes: {_shown(double)}; {hint}")
        index = {name: i for i, name in enumerate(outputs)}
        return [index.get(name) for name in wanted]
    if ids and set(wanted) <= set(ids) and (outputs is None or _is_imagenet(outputs)):
        return [ids.index(name) for name in wanted]
    if len(numbers) == len(wanted):
        if sorted(numbers) == list(range(num_outputs)):
            if outputs is not None:
                taken = ", ".join(f"{i} for {outputs[i]!r}" for i in range(min(_SHOWN, num_outputs)))
                _log.info("the data number their classes, and %s names them: %s, and so on", title, taken)
            return [*numbers]
        if outputs is None:
            raise BadData(
                f"the data's classes are {len(wanted)} numbers ({_shown(wanted)}), not 0 to {num_outputs - 1} as "
                f"{title} numbers its outputs, which it does not name: {hint}"
            )
    if outputs is None:
        if len(wanted) != num_outputs:
            raise BadData(f"the data have {len(wanted)} classes and {title} has {num_outputs}, without names: {hint}")
        text = "%s does not name its classes: its outputs are taken for the data's classes in their order (%s); %s"
        _log.info(text, title, _shown(wanted), "--classes FILE says otherwise")
        return list(range(num_outputs))
    return [None] * len(wanted)


def match_all_classes(
    wanted: Sequence[str], known: Sequence[str] | None, num_outputs: int, title: str, *, hint: str = _HINT
) -> list[int]:
    """Do the same where the network has to know every class of the data; raises BadData where it does not."""
    found = match_classes(wanted, known, num_outputs, title, hint=hint)
    unknown = [name for name, output in zip(wanted, found, strict=True) if output is None]
    if unknown:
        known_ones = f" (it knows {_shown(known)})" if known else ""
        raise BadData(f"the data have classes that {title} does not know: {_shown(unknown)}{known_ones}: {hint}")
    return [output for output in found if output is not None]


def read_class_names(path: Path, num_classes: int, title: str, known: Sequence[str] | None = None) -> tuple[str, ...]:
    """Read the names of a network's classes, in the order of its outputs, from a file that a user gives.

    Where the network's own names, `known`, are at other outputs, a list without numbers is refused, since it may be in
    any order; one with numbers says itself which output is which, and counts, with a warning.

    It has one name a line, perhaps with its number (`0 cat`, `cat 0`, `cat,0`), or columns (see class_lists.py); or is
    JSON: a list of names, or a mapping of numbers to names or of names to numbers; or YAML with such under `names`.
    Raises BadData where it cannot be read, or names another number of classes than the network has.
    """
    notes: list[str] = []
    text = read_text(path, notes)
    for note in notes:
        _log.warning("%s", note)
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise BadData(f"cannot read class names from {path}: it begins as JSON and is none ({error})") from error
        remarks: list[str] = []
        beside = value if isinstance(value, dict) else {}  # COCO's files hold categories among others
        names = find_class_names({"classes": value, "beside": beside}, num_classes, remarks)
        if names is None:
            count = len(value)
            raise BadData(f"{path} has {count} entries that do not name {num_classes} classes, as {title} has")
        for remark in remarks:
            _log.info("%s: %s", path, remark)
        return _check_order(names, known, path, title, is_numbered=isinstance(value, dict))
    lists = read_class_lists(text, is_table=path.suffix.lower() in (".csv", ".tsv"))
    for each in lists:
        if isinstance(each.names, Mapping):
            numbers = sorted(each.names)
            if numbers not in ([*range(num_classes)], [*range(1, num_classes + 1)]):
                continue
            ordered = [each.names[number] for number in numbers]
            _log.info("%s numbers its lines: %s, and so on, in the order of their numbers", path, _shown(ordered))
            return _check_order(ordered, known, path, title, is_numbered=True)
        if len(each.names) == num_classes:
            return _check_order(each.names, known, path, title, is_numbered=False)
    if not lists and text.strip():
        raise BadData(f"{path}: it cannot be told which column names the classes: call it `name`")
    count = len(lists[0].names) if lists else 0
    raise BadData(f"{path} names {count} classes, one per line; {title} has {num_classes}")


def _check_order(
    names: Sequence[str], known: Sequence[str] | None, path: Path, title: str, *, is_numbered: bool
) -> tuple[str, ...]:
    """Give the names of a file, in NFC, where the network does not contradict them."""
    normalized = tuple(map(normalize_class_name, names))
    outputs: dict[str, list[int]] = {}  # two may have one name: ImageNet's cranes
    for i, name in enumerate(known or ()):
        outputs.setdefault(normalize_class_name(name), []).append(i)
    moved = [(name, i) for i, name in enumerate(normalized) if i not in outputs.get(name, [i])]
    if not moved:
        return normalized
    name, i = moved[0]
    own = f"calls its output {outputs[name][0]} so ({_shown(known or ())})"
    said = f"{path} has {name!r} at output {i}, and {title} {own}"
    if not is_numbered:
        raise BadData(
            f"{said}: leave --classes away, or, where its own names are wrong, number the lines (0 {normalized[0]})"
        )
    _log.warning("%s: the file counts", said)
    return normalized


def _numbers(names: Sequence[str]) -> list[int]:
    """Give the names that are numbers, as numbers."""
    return [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 8]


def _is_imagenet(names: Sequence[str]) -> bool:
    """Whether 1000 names are those of ImageNet-1k in the order of its ids, by how the list begins."""
    return any(all(word in name.lower() for word, name in zip(words, names, strict=False)) for words in _FIRST)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
