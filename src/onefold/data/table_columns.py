"""Columns: what a table, a Parquet file or a sample's JSON says of an image, by the columns' names and values.

The names of columns are those of the table at the top of tables.py. Values are read alike in all three: numbers in any
of their forms are one class, true and false are classes or splits, and several classes of one image are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from onefold.data.dataset_info import Split
from onefold.data.decode import printable_name
from onefold.data.folders import join_names
from onefold.data.splits import SPLIT_WORDS, parse_split_name, resolve_ambiguous_split, split_into_words
from onefold.errors import BadData

_IMAGE_WORDS = ("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "jpg", "png")
_FILE_WORDS = {
    **dict.fromkeys(("file", "files", "filename", "filenames", "filepath", "filepaths", "path", "paths", "fname"), 0),
    **dict.fromkeys(_IMAGE_WORDS, 1),
    **dict.fromkeys((f"{image}{word}" for image in _IMAGE_WORDS for word in ("id", "name", "path", "file")), 1),
    **dict.fromkeys(("id", "ids", "uid", "uuid", "key"), 2),
    **dict.fromkeys(("name", "url", "uri"), 3),
}
_CLASS_WORDS = {
    **dict.fromkeys(("label", "labels"), 0),
    **dict.fromkeys(("class", "classes", "cls"), 1),
    **dict.fromkeys(("category", "categories", "classification"), 2),
    **dict.fromkeys(("target", "targets"), 3),
    **dict.fromkeys(("breed", "species", "variety", "cultivar", "disease", "diagnosis", "dx", "emotion"), 4),
    **dict.fromkeys(("tag", "tags", "choice", "choices", "y"), 4),
}
_OWNER_WORDS = frozenset(
    ("code", "patient", "sample", "case", "item", "gcs")
)  # beside a word for an image: id_code, patientId
_MISSING = frozenset(  # as pandas reads them, in any case, and what people write for that; NA in capitals alone
    ("", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "n.a.", "nan")
) | {"null", "none", "-", "--", "---", "\u2013", "\u2014", "?"}
_NUMBER_WORDS = frozenset(("id", "ids", "index", "idx", "no", "number", "code"))
_MEASURED = (
    frozenset(("score", "scores", "age", "count", "counts", "price", "weight", "width", "height", "size", "length"))
    | frozenset(("area", "year", "time", "hour", "month", "day", "number", "num", "temperature", "distance", "depth"))
    | frozenset(("votes", "frame"))
)
_BOXES = (
    *(frozenset(("x", "y", *sides)) for sides in (("width", "height"), ("w", "h"))),
    *(frozenset(sides) for sides in (("xmin", "ymin", "xmax", "ymax"), ("x min", "y min", "x max", "y max"))),
    *(frozenset(sides) for sides in (("x 1", "y 1", "x 2", "y 2"), ("bbox x", "bbox y", "bbox w", "bbox h"))),
)
NONE_WORD = "none"
"""What a class of words may be called, in any case, though pandas takes it for a cell that says nothing: no defect."""
_NO_SPLIT = frozenset(("unlabeled", "unlabelled", "none", "unused", "excluded", "ignored", "unassigned")) | {
    *("ignore", "exclude", "skip", "skipped", "drop", "dropped", "discard", "discarded", "unknown"),
}
_NEUTRAL_WORDS = frozenset(("name", "names", "fine", "text"))
_REMOTE_WORDS = frozenset(("display", "annotation", "annotations", "metadata", "ground", "truth", "gt"))
_SPLIT_COLUMNS = frozenset(
    ("split", "subset", "set", "dataset", "data set", "partition", "phase", "usage", "fold", "ml use")
) | frozenset(("evaluation status", "eval status"))
_SURE_COLUMNS = frozenset(("split", "partition", "ml use"))  # that say nothing else
_VERTEX_SPLIT = "aiplatform googleapis com ml use"  # how the column ends
BOOLEAN_WORDS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
FLAG_WORDS = {**BOOLEAN_WORDS, "no": False, "n": False, "f": False, "yes": True, "y": True, "t": True}
"""What a column that is called as one split may say; of columns of classes `yes` is one."""

_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,2})?")
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,15}(\.0*)?")
_LIST_TEXT = re.compile(r"[\[({](.*)[\])}]", re.DOTALL)
_PARTS = re.compile(r",|(?<=['\"])\s+(?=['\"])")
_VECTOR = re.compile(r"\s*[01]\.?0*(?:\s*,\s*[01]\.?0*|\s+[01]\.?0*)*\s*,?\s*")
_VECTOR_PARTS = re.compile(r"[01]\.?0*")
_LISTED = "\0"  # between the values of a JSON list in one cell
_MIN_SETS = 6  # cells that are not all sorted by chance
_STRONG_SEPARATORS = (_LISTED, "|", ";", "\uff1b")
_WORD_SEPARATORS = (" and ", " ")
_CLASS_SEPARATORS = (*_STRONG_SEPARATORS, ",", "\uff0c", "\u3001", "+", "&", "/", *_WORD_SEPARATORS)


class NotATableError(BadData):
    """A file that does not say which image is of which class."""


class MultiLabelError(BadData):
    """Images that have several classes each; `images` are those that the table lists, where it is known."""

    def __init__(self, where: str, seen: str) -> None:
        self.images: frozenset[str] = frozenset()
        super().__init__(
            f"{where}: {seen}. Images of several classes (multi-label) are not supported, each has one here: keep one "
            "class an image, or train a network for each class (class, not_class)"
        )


def rank_image_column(column: str) -> int | None:
    """Give how surely a column names images, 0 the most; None where it does not."""
    words = [word for word in split_into_words(column) if not word.isdigit() and word not in _OWNER_WORDS]
    return min(_FILE_WORDS[word] for word in words) if words and set(words) <= set(_FILE_WORDS) else None


def rank_class_column(column: str) -> int | None:
    """Give how surely a column names classes, 0 the most; None where it does not, or numbers them."""
    words = split_into_words(column)
    ranks = [_CLASS_WORDS[word] for word in words if word in _CLASS_WORDS]
    rest = {word for word in words if word not in _CLASS_WORDS} - _NEUTRAL_WORDS
    is_remote = bool(rest & _REMOTE_WORDS)  # after those that are called so alone
    return min(ranks) + 10 * is_remote if ranks and rest <= _REMOTE_WORDS else None


def ends_with_class_word(column: str) -> bool:
    """Whether a column's last word is one for a class, whatever stands before it: Finding Labels, final_diagnosis."""
    words = [word for word in split_into_words(column) if not word.isdigit()]
    return len(words) > 1 and words[-1] in _CLASS_WORDS and not is_class_index_column(column)


def only_other_column(cells: Mapping[str, Sequence[str]], images: str) -> str:
    """Give the one column beside those of images, where its values are words, or classes by number, and recur; else "".

    Numbers are of classes where each is of two images or more and they are 0 to N - 1, 1 to N, or -1 and 1, or where
    the column is called as one of numbers (landmark_id); not where it is called as what is measured (age, count).
    """
    others = [
        name
        for name in cells
        if name != images
        and not (len(cells) > 2 and rank_image_column(name) is not None)
        and not (is_split_column(name) and any(map(parse_split_name, {*cells[name]})))
        and not holds_splits(cells[name], 2)
    ]
    if len(others) != 1 or is_split_column(others[0]):
        return ""
    name, words = others[0], split_into_words(others[0])
    values = [value for value in cells[name] if not is_missing(value) or value.casefold() == NONE_WORD]
    seen = {*values}
    if 2 * len(values) < len(cells[name]) or not 1 < len(seen) < len(values):
        return ""
    if not any(map(_DECIMAL.fullmatch, seen)):
        return "" if {value.casefold() for value in seen} <= {NONE_WORD} or all(map(parse_split_name, seen)) else name
    numbers = sorted(int(number) for value in seen if (number := normalize_number(value)) is not None)
    is_sign = seen in ({"-1", "1"}, {"-1.0", "1.0"})
    is_of_all = numbers in ([*range(len(seen))], [*range(1, len(seen) + 1)]) and not _MEASURED & {*words}
    is_called = len(numbers) == len(seen) and bool(words) and words[-1] in _NUMBER_WORDS
    return name if 2 * len(seen) <= len(values) and (is_sign or is_of_all or is_called) else ""


def is_box_column(column: str, columns: Collection[str]) -> bool:
    """Whether a column has a number of a box, or of a point beside another column of classes.

    A box is x and y beside width and height, or xmin, ymin, xmax and ymax.
    """
    there = {" ".join(split_into_words(name)): name for name in columns}
    called = " ".join(split_into_words(column))
    others = [name for word, name in there.items() if word != "y"]
    if called in ("x", "y") and {"x", "y"} <= there.keys() and any(rank_class_column(n) is not None for n in others):
        return True
    return any(each <= there.keys() and called in each for each in _BOXES)


def is_measured_column(column: str) -> bool:
    """Whether a column of several words is called as a measurement or a key: file_size, region_count, region_id."""
    words = split_into_words(column)
    return len(words) > 1 and words[-1] in _MEASURED | {"id"}


def is_class_name_column(column: str) -> bool:
    """Whether a column gives the names of classes that another column may number: label_name, class_text."""
    return rank_class_column(column) is not None and bool({"name", "names", "text"} & {*split_into_words(column)})


def is_class_index_column(column: str) -> bool:
    """Whether a column numbers classes: index, class_id, label_idx and the like."""
    words = set(split_into_words(column))
    if words == {"index"}:
        return True
    return bool(words & set(_CLASS_WORDS)) and bool(words & _NUMBER_WORDS) and words <= {*_CLASS_WORDS, *_NUMBER_WORDS}


def is_split_column(column: str) -> bool:
    """Whether a column may say the split of an image: by a word, or (is_valid, is_train) by true and false."""
    called = " ".join(split_into_words(column))
    return called in _SPLIT_COLUMNS or called.endswith(_VERTEX_SPLIT) or _flagged(column) is not None


def holds_splits(cells: Iterable[str], least: int) -> bool:
    """Whether all cells that say anything are words for splits, and `least` different ones or more."""
    found = [parse_split_name(value) for value in {*cells} if not is_missing(value)]
    splits = {said.split if said and not said.stem else None for said in found}
    return None not in splits and len(splits) >= least


def split_word(column: str, value: str) -> str:
    """Give the word that a value of a split column stands for: of is_valid, true is val and false train.

    What is not train is test, since test chooses nothing.
    """
    split, flag = _flagged(column), FLAG_WORDS.get(value.lower())
    if split is None or flag is None:
        return value
    return split if flag else "test" if split == "train" else "train"


def _flagged(column: str) -> Split | None:
    """Give the split that a column is true for: is_valid, is_train, test and the like."""
    words = split_into_words(column)
    said = parse_split_name(" ".join(words[1:] if words[:1] == ["is"] else words))
    is_flag = words[:1] == ["is"] or (len(words) == 1 and words[0] in SPLIT_WORDS)
    return said.split if said and is_flag and not said.stem else None


def _is_no_split(cell: str) -> bool:
    """Whether a cell of a split column says that its image is in none."""
    return is_missing(cell) or cell.casefold() in _NO_SPLIT


def is_missing(cell: str) -> bool:
    """Whether a cell says nothing: it is empty, or NaN, NA, None, null or the like, as in pandas; or a dash, or `?`."""
    return cell.casefold() in _MISSING or cell == "NA"


def missing_words_of_classes(cells: Iterable[str]) -> frozenset[str]:
    """Give the cells that look as if they said nothing, and are a class: of two, the other one.

    So is None beside one other class (no defect), and - beside +.
    """
    seen = {*cells}
    others = {cell.casefold() for cell in seen if not is_missing(cell)}
    word = "-" if others == {"+"} else NONE_WORD
    return frozenset(cell for cell in seen if cell.casefold() == word) if len(others) == 1 else frozenset()


def read_split_columns(
    columns: Mapping[str, Sequence[str]], shown: str, notes: list[str]
) -> tuple[Split | None, ...] | None:
    """Read the columns of a table that say splits: the first of words, else all flags (is_valid, test) together.

    None, with notes, where no column divides the rows. Raises BadData where flags contradict each other.
    """
    flags: dict[str, tuple[Split | None, ...]] = {}
    for name, cells in columns.items():
        splits = read_split_column(name, cells, shown, notes)
        if splits is None:
            continue
        if _flagged(name) is None or not all(is_missing(cell) or cell.lower() in FLAG_WORDS for cell in cells):
            return splits
        flags[name] = splits
    if len(flags) < 2:
        return next(iter(flags.values()), None)
    found: list[Split | None] = []
    for i in range(len(next(iter(flags.values())))):
        true = {said for name in flags if (said := _flagged(name)) and FLAG_WORDS.get(columns[name][i].lower())}
        if len(true) > 1:
            raise BadData(f"{shown}: an image is of {' and '.join(sorted(true))} by the columns {join_names([*flags])}")
        rest: Split = "test" if any(_flagged(name) == "train" for name in flags) else "train"
        is_known = any(not is_missing(columns[name][i]) for name in flags)
        found.append(next(iter(true)) if true else rest if is_known else None)
    return tuple(found)


def read_split_column(
    column: str, cells: Sequence[str], shown: str, notes: list[str]
) -> tuple[Split | None, ...] | None:
    """Read a column of splits, None for a cell that says nothing.

    None, with a note that says why, where the column divides nothing or has no words for splits.

    Raises BadData where only some of its values are words for splits, and where none is in a column called split.
    """
    is_flag = all(is_missing(cell) or cell.lower() in FLAG_WORDS for cell in {*cells})  # `y` beside `x` is none
    values, where = (
        [split_word(column, cell) if is_flag else cell for cell in cells],
        f"the column {printable_name(column)}",
    )
    seen = join_names(sorted(set(cells) - {""}), 3) or "empty"
    if _flagged(column) and len(set(values)) == 1:
        notes.append(f"{shown}: {where} is {seen} in all rows, so it divides nothing and is not used")
        return None
    known = {value: parse_split_name(value) for value in set(values)}
    is_called = " ".join(split_into_words(column)) in _SURE_COLUMNS and len(known) > 1
    if not any(known.values()) and not is_called:
        notes.append(f"{shown}: {where} ({seen}) is not used: it has no words for splits")
        return None
    if unknown := sorted(value for value, said in known.items() if said is None and not _is_no_split(value)):
        quoted = join_names([repr(value) for value in unknown])
        raise BadData(
            f"{shown}: {where} says {quoted}: expected words for splits, such as train, val and test, or another "
            "name of the column"
        )
    strong = any(said.split == "val" and not said.is_ambiguous for said in known.values() if said)
    return tuple(resolve_ambiguous_split(said, strong) if (said := known[value]) else None for value in values)


def cell_text(value: object) -> str:
    """Write a value of JSON as a cell: true and false as JSON does, a list's values together, nothing for the rest."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return _LISTED.join(map(cell_text, value))
    return str(value).strip() if isinstance(value, str | int | float) else ""


def normalize_number(text: str) -> str | None:
    """Write a whole number, 0 or more, in its plain form: 1 for 01 and 1.0; None for what is none."""
    return str(int(text.partition(".")[0])) if _WHOLE_NUMBER.fullmatch(text) and text[0] != "-" else None


def normalize_numbers(values: Sequence[str]) -> Sequence[str]:
    """Write integers alike, 01 and 1.0 as 1, where all values are such and some have two forms, or a fraction.

    Columns of integers become 3.0 where one is missing. Names such as 01 and 02, each in one form, stay as they are.
    """
    if not all(map(_WHOLE_NUMBER.fullmatch, values)):
        return values
    forms = {value: int(value.partition(".")[0]) for value in values}
    if len(set(forms.values())) == len(forms) and not any("." in value for value in forms):
        return values
    return [str(forms[value]) for value in values]


def refuse_measurements(where: str, values: Iterable[str]) -> None:
    """Raise BadData where all values are numbers and some have a fraction: targets of a regression, not classes."""
    seen = sorted(set(values))
    if not all(map(_DECIMAL.fullmatch, seen)):
        return
    if measured := [value for value in seen if not float(value).is_integer()]:
        shown = join_names([*measured, *(value for value in seen if value not in measured)][:2])
        raise BadData(
            f"{where} holds measurements ({shown}), not classes: name the column of the classes `label`, or write the "
            "name of a class in place of each number"
        )


def parse_list_cells(cells: Sequence[str]) -> Sequence[str]:
    """Give lists in a text (`['cat', 'dog']`, as pandas writes them) as `cell_text` writes lists.

    So where all cells are such, or where those that are name classes that other cells name. Of lists of 0 and 1, one
    number a class, the class is where the 1 stands, and with several they are several classes.
    """
    inside = {cell: found for cell in set(cells) if (found := _LIST_TEXT.fullmatch(cell))}
    vectors = {cell: _VECTOR_PARTS.findall(found[1]) for cell, found in inside.items() if _VECTOR.fullmatch(found[1])}
    lengths = {len(parts) for parts in vectors.values()}
    if len(vectors) == len(set(cells)) and len(lengths) == 1 and lengths != {1}:
        ones = {cell: [str(i) for i, part in enumerate(parts) if part[0] == "1"] for cell, parts in vectors.items()}
        return [_LISTED.join(ones[cell]) for cell in cells]
    parts = {
        cell: [
            part for text in _PARTS.split(found[1]) if (part := text.strip(" '\"")) or found[1].strip() in ("", "''")
        ]
        for cell, found in inside.items()
    }
    bare = {cell for cell in cells if cell not in inside}
    if bare and not any(part in bare for those in parts.values() for part in those):
        return cells
    return [_LISTED.join(parts[cell]) if cell in parts else cell for cell in cells]


def find_class_separator(cells: Iterable[str]) -> str:
    """Give the separator by which cells name several classes, as in cat|dog; "" where they name one each.

    Bars and semicolons separate classes where one of them stands elsewhere too, alone or beside another. Names have the
    other signs too (`tench, Tinca tinca`, `F-16A/B`): they separate where that is so of all classes of most such cells,
    and one of them stands alone. Names have blanks more often still (`late blight`): they, and the word `and`, separate
    where beside that cells have one word, two and more, or all classes of most such cells stand alone.
    """
    cells = {" ".join(cell.split()) for cell in cells}
    for separator in _CLASS_SEPARATORS:
        joined = {cell: {part.strip() for part in cell.split(separator)} for cell in cells if separator in cell}
        joined = {cell: parts for cell, parts in joined.items() if len(parts) > 1 and "" not in parts}
        alone = {cell for cell in cells if separator not in cell}
        frequency = Counter(part for parts in (*joined.values(), *({cell} for cell in alone)) for part in parts)
        whole = sum(all(frequency[part] > 1 for part in parts) for parts in joined.values())
        if separator in _WORD_SEPARATORS and len({len(parts) for parts in joined.values()}) < 2:
            whole = sum(parts <= alone for parts in joined.values())
        repeated = any(frequency[part] > 1 for parts in joined.values() for part in parts)
        is_plain = any(parts & alone for parts in joined.values()) or (separator == " " and _are_sets_of_words(joined))
        if separator not in _STRONG_SEPARATORS and not (2 * whole > len(joined) and is_plain):
            continue
        if joined and (separator == _LISTED or repeated):
            return separator
    return ""


def _are_sets_of_words(cells: Collection[str]) -> bool:
    """Whether cells are words in alphabetical order, of several lengths, as sets of tags are and names are not."""
    words = [cell.split() for cell in cells]
    is_sorted = all(each == sorted(each, key=str.casefold) for each in words)
    return is_sorted and len(words) >= _MIN_SETS and len({len(each) for each in words}) > 2


def find_joined_names(names: Collection[str]) -> str:
    """Say which class is called as two others together (cat_dog beside cat and dog): it may be images of both."""
    known = set(names)
    for separator in ("_", "-"):
        joined = [name for name in sorted(known) if len(parts := name.split(separator)) > 1 and known.issuperset(parts)]
        if joined:
            each = " and ".join(printable_name(part) for part in joined[0].split(separator))
            return f"{join_names(joined, 3)} counts as a class of its own, though {each} are classes too"
    return ""
