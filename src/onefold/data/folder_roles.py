"""Which folders are splits and which are classes: decided by their names, and by the folders that they hold.

A folder called `train` is a class where it holds images directly beside other folders that do; it is a split where it
holds folders, and another split holds folders of the same names. What can be either is refused, with what was seen and
what to type.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onefold.data.class_difference import class_difference
from onefold.data.dataset_info import SPLITS, Split
from onefold.data.folders import Folder, join_names, merge_initial_folders
from onefold.data.splits import (
    FILLER_WORDS,
    SPLIT_WORDS,
    WEAK_WORDS,
    SplitName,
    parse_split_name,
    resolve_ambiguous_split,
    split_into_words,
)
from onefold.errors import BadData
from onefold.file_io import normalize_class_name, normalize_name

_UNLABELLED = frozenset(("unlabeled", "unlabelled", "pred", "predict", "prediction", "predictions", "submission"))


class NoClassFoldersError(BadData):
    """Images that lie in no class folders."""


@dataclass(frozen=True, kw_only=True)
class _SplitFolder:
    """A split, or a part of one, as it lies in a folder; split None where nothing says for what the images are.

    `root` is the folder that the class folders lie in, `shown` how the split is called ("valid/"); `classes` gives the
    folders of each class, relative to the place. Without classes the folder's own table says which there are.
    """

    split: Split | None
    root: str
    shown: str
    classes: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class FolderRoles:
    """Which folders are splits and classes; `reasons` says of other folders why their images are in no split."""

    folders: tuple[_SplitFolder, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def detect_folder_roles(root: Folder, place: str, tables: Mapping[str, frozenset[str]]) -> FolderRoles:
    """Decide which folders below `root` are splits and which are classes.

    `tables` gives the classes of each folder that has a table of its own. Raises BadData for what can be understood in
    two ways, for splits of different classes, and for images without class folders.
    """
    merged = merge_initial_folders(root)
    reasons: dict[str, str] = {}
    roles = _detect_roles(_without_unlabelled(merged, reasons), place, tables)
    note = "folders of one letter hold folders that begin with it, which are the classes"
    notes = roles.notes if merged is root else (note, *roles.notes)
    return replace(roles, reasons={**roles.reasons, **reasons}, notes=notes)


def _without_unlabelled(folder: Folder, reasons: dict[str, str]) -> Folder:
    """Give a tree without the folders in which tools put what has no class (`_unlabeled`, `no_label`), with reasons."""
    children = {}
    for name, child in folder.children.items():
        words = split_into_words(name)
        if len(folder.children) > 2 and (
            words == ["no", "label"] or (words and {*words} <= {"unlabeled", "unlabelled"})
        ):
            reasons[child.path] = "no class, as the folder is called"
        else:
            children[name] = _without_unlabelled(child, reasons)
    return Folder(folder.path, folder.num_direct, folder.num_images, children)


def _detect_roles(root: Folder, place: str, tables: Mapping[str, frozenset[str]]) -> FolderRoles:
    for level in _levels(root):
        named = [(said, folder) for name, folder in level.children.items() if (said := parse_split_name(name))]
        named += _train_beside(named, level)
        if named and (found := _as_splits(level, _choose(named, place), place, tables)):
            return found
    level = _class_level(root)
    if not level.children:
        raise _flat(level, place)
    if _is_only_images(level):
        raise _flat(next(iter(level.children.values())), place)
    _check_classes(level.children.values(), _names(level), place)
    inner = {name: _choose_quietly(folder) for name, folder in level.children.items() if folder.num_images}
    if {split for splits in inner.values() for split in splits} - {"train"} and all(inner.values()):
        _check_classes([folder for group in inner.values() for folder in group.get("train", ())], frozenset(), place)
        return _splits_within_classes(level, inner)
    for name, folder in level.children.items():
        words = sorted(n for n in folder.children if (said := parse_split_name(n)) and not said.stem)
        if len({said.split for said in map(parse_split_name, words) if said}) > 1:
            raise BadData(
                f"{place}: {folder.path}/ holds the splits {join_names(words)}, so {name} may be a dataset or a "
                f"class: give {folder.path}/ alone as --data, or give all class folders the same splits"
            )
    said_by = {name: said for name in level.children if (said := parse_split_name(name)) and not said.stem}
    words = sorted(said_by)
    if len({said.split for said in said_by.values()}) > 1:  # as of segmentation and detection
        raise NoClassFoldersError(
            f"{place}: {join_names(words)} are words for splits, and hold images without class folders: put the "
            f"images of each class in a folder of its own ({words[0]}/<class>/), or add a labels.csv (file,label)"
        )
    _check_held_out(level, "train", place)
    _check_inner_folders(level, place)
    called = (f"{join_names(words)}: a class here, since it holds images as the folders beside it do",) if words else ()
    notes = (*_merged(level), *called, *_nested(level))
    return FolderRoles(folders=(_split_folder(None, level, "", level),), notes=notes)


def _train_beside(named: _Named, level: Folder) -> _Named:
    """Give the folders that are train since what is held out of them lies beside them: rps/ and rps-test-set/."""
    stems = {said.stem for said, _ in named} - {said.stem for said, _ in named if said.split == "train"} - {""}
    found = [
        (SplitName("train", "train", stem, ""), folder)
        for name, folder in level.children.items()
        if (stem := " ".join(word for word in split_into_words(name) if word not in FILLER_WORDS)) in stems
    ]
    return found if len(found) > 1 or any(folder.children for _, folder in found) else []


def _check_classes(folders: Collection[Folder], beside: frozenset[str], place: str) -> None:
    """Raise BadData where one with a split's name holds folders that are called as those of another, or `beside` it.

    Then the classes are further down (train_v1/cat and train_v2/cat; cat, dog and val/cat), and it is none. Splits
    within it are no classes: "test tube" is one, with train and val inside as cat has.
    """
    counts = Counter(name for folder in folders for name in _names(folder) if not parse_split_name(name))
    for folder in folders:
        same = sorted(name for name in _names(folder) if counts[name] > 1 or name in beside)
        if len(same) > 1 and parse_split_name(folder.name):
            raise BadData(
                f"{place}: {folder.path}/ holds folders that are called as others ({join_names(same, 3)}), so it may "
                "be a split or a class: give the folder of one dataset, with train, val and test (or --val FOLDER)"
            )


def _check_inner_folders(level: Folder, place: str) -> None:
    """Raise BadData where all folders hold those of the same names (amazon/bike, dslr/bike): either may be the classes.

    Numbers inside of folders with names are parts of a class, as are images/ and masks/.
    """
    inner = {name: _names(_class_level(folder)) for name, folder in level.children.items() if folder.num_images}
    if len(inner) < 2 or any(level.children[name].num_direct for name in inner):
        return
    shared = sorted(
        name for name in frozenset.intersection(*inner.values()) if not {*split_into_words(name)} <= FILLER_WORDS
    )
    is_number = all(name.isdecimal() for name in shared) and not all(name.isdecimal() for name in inner)
    if len(shared) < 2 or is_number or any(len(names) > 2 * len(shared) for names in inner.values()):
        return
    where = f"{place}/{level.path}".removesuffix("/")
    raise BadData(
        f"{where}: {join_names(sorted(inner), 3)} all hold folders called {join_names(shared, 3)}, so the classes may "
        f"be the outer or the inner ones: give one folder ({where}/{min(inner)}), or put a labels.csv with the columns "
        f"file,label into {where}"
    )


def _check_held_out(level: Folder, split: Split, place: str) -> None:
    """Raise BadData where a class folder of one split holds a folder that is called as another one: cat/val/."""
    for folder in level.children.values():
        for child in folder.children.values():
            said = parse_split_name(child.name)
            if said and not said.stem and said.split != split and child.num_images:
                raise BadData(
                    f"{place}: {child.path}/ is called as a split and lies within a class folder: move its images to "
                    f"{said.split}/{folder.name}/, beside train/, or rename it if they are of {split}"
                )


def _nested(level: Folder) -> tuple[str, ...]:
    """Say which class folders hold several folders of images, or one beside images: classes, versions, or trash."""
    nested = {}
    for name, folder in level.children.items():
        if len(folder.children) > (not folder.num_direct and folder.children.keys().isdisjoint(level.children)):
            nested[name] = sorted(folder.children)
    shown = f"{join_names(sorted(nested), 3)}: a class with all folders inside"
    return tuple(f"{shown} ({name}/: {join_names(nested[name], 3)})" for name in sorted(nested)[:1])


def _levels(folder: Folder) -> Iterator[Folder]:
    """Give the folder, and what is inside as long as that is one folder that may be an archive's, not a class."""
    yield folder
    while len(folder.children) == 1:
        (inner,) = folder.children.values()
        if folder.num_direct and not inner.children:
            return
        folder = inner
        yield folder


def _class_level(folder: Folder, wanted: frozenset[str] = frozenset()) -> Folder:
    """Find the folder whose subfolders are the classes: of those `wanted` most, else the first with two or more."""
    levels = [level for level in _levels(folder) if level.children]
    if not levels:
        return folder
    shared = max(levels, key=lambda level: len(_names(level) & wanted))
    if _names(shared) & wanted:
        return shared
    several = (level for level in levels if len(level.children) > 1)
    return next(several, next((level for level in levels if not all(map(parse_split_name, level.children))), levels[0]))


def _is_only_images(level: Folder) -> bool:
    """Whether a folder holds nothing but one folder that is called images, data or the like, which is no class."""
    return len(level.children) == 1 and all(
        {*split_into_words(name)} <= {*FILLER_WORDS, *SPLIT_WORDS} and split_into_words(name) for name in level.children
    )


def _names(level: Folder) -> frozenset[str]:
    return frozenset(normalize_class_name(name) for name in level.children)


def _split_folder(
    split: Split | None, level: Folder, shown: str, within: Folder, known: frozenset[str] | None = None
) -> _SplitFolder:
    """Give a split whose classes are the subfolders of `within` (only the `known` ones)."""
    classes: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for name, folder in sorted(within.children.items()):
        composed = normalize_class_name(name)
        if known is None or composed in known:
            classes[composed] += (folder.path,)
    return _SplitFolder(split=split, root=level.path, shown=shown, classes=dict(classes))


def _merged(level: Folder) -> tuple[str, ...]:
    """Say which folders are one class, since their names differ in their Unicode form or in blanks only."""
    forms: dict[str, set[str]] = defaultdict(set)
    for name in level.children:
        forms[normalize_class_name(name)].add(normalize_name(name))
    counts = Counter(map(normalize_class_name, level.children))
    where = f"{level.path}/: " if level.path else ""
    sides = [(len(forms[name]) > 1, name) for name in sorted(forms) if counts[name] > 1]
    return tuple(
        f"{where}folders of one name in two Unicode forms are one class: {join_names(those)}"
        if not is_blank
        else f"{where}folders whose names differ in blanks only are one class: {join_names(those)}"
        for is_blank in (False, True)
        if (those := [name for side, name in sides if side == is_blank])
    )


_Named = Sequence[tuple[SplitName, Folder]]
_Group = dict[Split, list[Folder]]


def _choose(named: _Named, place: str) -> _Group:
    """Choose the folders of each split among those with a split's name; empty where none is meant so."""
    stems: dict[str, list[tuple[SplitName, Folder]]] = defaultdict(list)
    for said, folder in named:
        stems[said.stem].append((said, folder))
    several = [
        stem
        for stem, those in stems.items()
        if stem
        and len({said.split for said, _ in those} | {"train"}) > 1
        and any(said.split == "train" for said, _ in those)
    ]
    if "" not in stems and len(several) > 1:
        shown = join_names([folder.name for stem in several for _, folder in stems[stem]])
        raise BadData(f"{place} holds several sets of splits, {shown}: give the folder of one, or class folders")
    chosen = stems.get("") or (stems[several[0]] if several else [])
    trains = [stem for stem, those in stems.items() if any(said.split == "train" for said, _ in those)]
    if chosen and len(trains) == 1 and all(said.split != "train" for said, _ in chosen):  # train_mini beside val
        chosen = [*chosen, *(each for each in stems[trains[0]] if each[0].split == "train")]
    words = {said.word for said, _ in chosen}
    strong_val = any(SPLIT_WORDS[word] == "val" and word not in WEAK_WORDS for word in words)
    group: dict[Split, list[tuple[SplitName, Folder]]] = defaultdict(list)
    for said, folder in chosen:
        group[resolve_ambiguous_split(said, strong_val)].append((said, folder))
    clashing = [split for split, those in group.items() if len(those) > 1 and len({s.number for s, _ in those}) > 1]
    for split, those in group.items():
        words = {said.word for said, _ in those}
        if split == "train" and words > {"trainval"} and "val" in group:
            those[:] = [(said, folder) for said, folder in those if said.word != "trainval"]
        elif split == "test" and len(words) > 1:
            first = min(words, key=lambda word: (word != "test", list(SPLIT_WORDS).index(word)))
            those[:] = [(said, folder) for said, folder in those if said.word == first]
        elif len(those) > 1 and (len({said.number for said, _ in those}) == 1 or len(clashing) > 1 or len(words) > 1):
            shown = " and ".join(f"{folder.name}/" for _, folder in those)
            raise BadData(f"{place}: {shown} may each be {split}: rename or move away those that are not")
    return {split: [folder for _, folder in those] for split, those in group.items()}


def _choose_quietly(folder: Folder) -> _Group:
    """Give the splits that a class folder is divided into; none where it holds anything else."""
    named = [(said, inner) for name, inner in folder.children.items() if (said := parse_split_name(name))]
    if folder.num_direct or len(named) < len(folder.children) or len({said.stem for said, _ in named}) > 1:
        return {}
    return _choose(named, folder.path)


def _splits_within_classes(level: Folder, inner: Mapping[str, _Group]) -> FolderRoles:
    """Arrange cat/train/, cat/test/, dog/train/, dog/test/."""
    folders = []
    for split in SPLITS:
        classes: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for name, group in sorted(inner.items()):
            classes[normalize_class_name(name)] += tuple(folder.path for folder in group.get(split, ()))
        words = sorted({folder.name for group in inner.values() for folder in group.get(split, ())})
        if words:
            shown = f"{'/, '.join(words)}/ in the class folders"
            folders.append(_SplitFolder(split=split, root=level.path, shown=shown, classes=dict(classes)))
    return FolderRoles(folders=tuple(folders), notes=_merged(level))


def _as_splits(level: Folder, group: _Group, place: str, tables: Mapping[str, frozenset[str]]) -> FolderRoles | None:
    """Arrange the folders of `group` as splits; None where they are classes, as their neighbours are."""
    chosen = [folder for folders in group.values() for folder in folders]
    others = [folder for folder in level.children.values() if folder not in chosen]
    train, held_out = group.get("train", []), [*group.get("val", []), *group.get("test", [])]

    def holds_classes(folder: Folder) -> bool:
        return folder.path in tables or bool(folder.children)

    def classes_of(folder: Folder) -> frozenset[str]:
        return tables.get(folder.path) or _names(_class_level(folder, classes))

    classes: frozenset[str] = frozenset()
    folders: list[_SplitFolder] = []
    reasons: dict[str, str] = {}
    notes: list[str] = []
    unnamed = [
        folder
        for folder in others
        if folder.num_images
        and not _UNLABELLED & set(split_into_words(folder.name))
        and not ((said := parse_split_name(folder.name)) and not said.stem)
    ]
    if not chosen:
        return None
    if train and not any(map(holds_classes, train)):
        if unnamed and not any(map(holds_classes, held_out)):
            return None
        raise _flat(train[0], place)
    if not train and unnamed:
        classes = frozenset(normalize_class_name(folder.name) for folder in unnamed)
        if not any(holds_classes(folder) and classes & classes_of(folder) for folder in held_out):
            return None
        beside = join_names([f"{folder.name}/" for folder in chosen])
        folders.append(_split_folder("train", level, f"the class folders beside {beside}", level, classes))
    elif not any(map(holds_classes, chosen)):
        raise _flat(chosen[0], place)
    elif train and unnamed and not held_out:
        seen = f"{train[0].name}/ (with the folders {join_names(sorted(train[0].children), 3)})"
        beside = join_names([f"{folder.name}/" for folder in unnamed], 3)
        raise BadData(
            f"{place} holds {seen} beside {beside}: {train[0].name} may be a split or a class. If it is a split, give "
            f"--data {place}/{train[0].path}; if it is a class, rename it (to {train[0].name}_class, say)"
        )
    elif train:
        classes = frozenset().union(*map(classes_of, train))
    for split in SPLITS:
        for folder in group.get(split, ()):
            shown = f"{folder.path}/"
            if not folder.num_images and folder.path not in tables:
                if split == "train":
                    raise BadData(f"{place}/{folder.path} holds no images")
                notes.append(f"{shown} holds no images")
                continue
            names = classes_of(folder) if holds_classes(folder) else frozenset()
            classes = classes or names
            if split == "test" and not names & classes:
                why = f"its classes are none of train ({join_names(sorted(names), 3)})" if names else ""
                reasons[folder.path] = f"no labels to score {shown} by: {why or 'it has no class folders'}"
                continue
            if not names or (folder.path not in tables and _is_only_images(_class_level(folder, classes))):
                raise _flat(folder, place)
            if split == "test":
                for child in _class_level(folder, classes).children.values():
                    if normalize_class_name(child.name) not in classes:
                        reasons[child.path] = "a class that train does not have"
            elif extra := names - classes:
                inside = _class_level(folder, classes).children.items()
                filled = {normalize_class_name(name) for name, child in inside if child.num_images}
                if folder.path in tables or extra & filled:
                    raise class_difference(place, {train[0].name if train else "train": classes, folder.name: names})
                notes.append(f"{shown}: {join_names(sorted(extra))} holds no images, and is no class of train")
            if split != "train" and (missing := sorted(classes - names)):
                notes.append(f"{shown} has no images of {join_names(missing)}")
            if folder.path in tables:
                folders.append(_SplitFolder(split=split, root=folder.path, shown=shown, classes={}))
                continue
            inner = _class_level(folder, classes)
            _check_classes(inner.children.values(), classes, place)
            _check_held_out(inner, split, place)
            folders.append(_split_folder(split, inner, shown, inner, classes))
            notes += _merged(inner)
            if split == "train":
                _check_inner_folders(inner, place)
                notes += _nested(inner)
    if train:
        reasons |= {folder.path: "beside the splits" for folder in others}
    return FolderRoles(folders=tuple(folders), reasons=reasons, notes=tuple(notes))


def _flat(folder: Folder, place: str) -> NoClassFoldersError:
    where = f"{place}/{folder.path}" if folder.path else place
    return NoClassFoldersError(
        f"{where} holds {folder.num_images} images and no class folders: put the images of each class "
        "in a folder of its own, or add a labels.csv with the columns file,label"
    )


# ------------------------------------------------------------------------------------ images: of which split


def read_single_split(root: Folder, place: str, split: Split) -> FolderRoles:
    """Find the classes of images that are all of one split, which their file's name says."""
    level = _class_level(merge_initial_folders(root))
    if not level.children or _is_only_images(level):
        raise _flat(root, place)
    _check_held_out(level, split, place)
    return FolderRoles(folders=(_split_folder(split, level, "", level),), notes=_merged(level))


def assign_images(images: Sequence[str], arrangement: FolderRoles) -> list[tuple[int, str] | None]:
    """Give for each image the number of its `_SplitFolder` and its class; None where it is in none."""
    owners = {
        path: (i, name)
        for i, folder in enumerate(arrangement.folders)
        for name, paths in folder.classes.items()
        for path in paths
    }
    found: dict[str, tuple[int, str] | None] = {}
    assigned = []
    for image in images:
        folder = image.rpartition("/")[0]
        if folder not in found:
            inner = folder
            while inner and inner not in owners:
                inner = inner.rpartition("/")[0]
            found[folder] = owners.get(inner)
        assigned.append(found[folder])
    return assigned
