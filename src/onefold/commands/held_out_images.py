"""Which photos a network was trained on, and which are held out: to score it, to calibrate it, and to go on with a run.

A run folder keeps what it was trained on:

    data.json    the dataset as `read_dataset` described it, where it lay, and what the weights were trained on
    images.csv   each image of train and val: name, class, and a digest by which it is known again

The weights and artifacts that are made of a run carry the digests too (see `TrainedOn`). So a score never depends on a
seed of its own: images that were trained on are left out, or the score says how many of them it has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onefold.checksums import read_sealed_json, write_sealed_json
from onefold.commands.saved_recipe import read_recipe
from onefold.data import Dataset, Subset, find_images
from onefold.data.dataset import DatasetSplits, read_dataset
from onefold.data.dataset_info import DatasetInfo, Split
from onefold.data.decode import printable_name
from onefold.data.fingerprint import (
    MAX_CONTENTS,
    ImageList,
    KeyKind,
    TrainedCopies,
    TrainedOn,
    evenly_spaced,
    find_trained_copies,
    find_trained_images,
    image_keys,
)
from onefold.data.folder_roles import NoClassFoldersError
from onefold.data.folders import ImageFiles
from onefold.data.preprocessing import ValueRange
from onefold.data.remote_files import REMOTE_PREFIXES
from onefold.errors import BadArgument, BadCheckpoint, BadData
from onefold.models.load_model import read_card
from onefold.recipes import RECIPE_FILE, Data, Recipe
from onefold.train import RunFolder

_log = logging.getLogger("onefold")

DATA_FILE, IMAGES_FILE = "data.json", "images.csv"
"""Files of a run folder: see the top of this file."""

TrainingRecords = tuple[TrainedOn, ...]

_HELD_OUT = 0.2  # of photos none of which was trained on: kept for scoring, where the others calibrate
_SHOWN = 3  # remarks on how a place is read

# ------------------------------------------------------------------------------------ the data of a run


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Where the data of a run are, and what of them was decided when it started: what any machine needs to open them.

    `typed` has the places as the user named them; on another machine they may be there where those of `found` are not.
    """

    found: Data
    typed: Data
    classes: Sequence[str] | None
    test_is_val: bool

    def open(self) -> DatasetSplits:
        """Open the data; raises BadData where they are not here."""
        spec, val = (
            here if _is_there(here) else typed
            for here, typed in ((self.found.spec, self.typed.spec), (self.found.val, self.typed.val))
        )
        return open_data(replace(self.found, spec=spec, val=val), "", self.classes, test_is_val=self.test_is_val)


def find_run_data(out: Path, recipe: Recipe, place: str | None = None, val: str | None = None) -> RunData:
    """Find the data of the run in `out`: at `place`, or where they were found when it started, or moved along with it.

    `val` is the place of those that it is validated on, where that is another. Raises BadData where they are gone.
    """
    saved = read_run_data(out)
    dataset = saved.get("dataset")
    classes = dataset.get("classes") if isinstance(dataset, dict) else _classes_of_best(out)
    typed = replace(recipe.data, spec=place or recipe.data.spec, val=val or recipe.data.val)
    places = {"--data": place or _place(out, recipe.data.spec, saved), "--val": typed.val}
    if typed.val and not val and isinstance(saved.get("val"), dict):
        places["--val"] = _place(out, typed.val, saved["val"])
    gone = {option: saved if option == "--data" else saved["val"] for option in places if places[option] is None}
    if gone and saved:
        were = " and ".join(printable_name(str(where.get("place"))) for where in gone.values())
        advice = " and ".join(f"{option} FOLDER" for option in gone)
        other = "" if "--data" in gone else " when it is resumed, or score on others with --data FOLDER"
        raise BadData(f"the photos of {out} were in {were}, and are gone: say where they are with {advice}{other}")
    # A run that kept nothing is of before test was kept aside: there it was val where there was no other.
    found = replace(typed, spec=places["--data"] or typed.spec, val=places["--val"] or typed.val)
    return RunData(found=found, typed=typed, classes=classes, test_is_val=not saved)


def open_run_data(out: Path, recipe: Recipe, place: str | None = None) -> DatasetSplits:
    """Find the data of a run, and open them; see `find_run_data`."""
    return find_run_data(out, recipe, place).open()


def _classes_of_best(out: Path) -> Sequence[str] | None:
    """Give the classes of a run that did not keep what it was trained on, in the order of its outputs."""
    try:
        return read_card(RunFolder(out).best / "model.safetensors").classes
    except (OSError, BadCheckpoint):
        return None


def write_run_data(
    out: Path, info: DatasetInfo, images: Mapping[str, Dataset], records: TrainingRecords, val: str = ""
) -> None:
    """Keep in the run folder what it is trained on; `val` is where its val lies, if elsewhere."""
    ImageList.from_splits(images).write(out / IMAGES_FILE)
    values = {"dataset": info.to_dict(), **_where(out, info.place), "trained_on": records_to_dict(records)}
    values |= {"val": _where(out, val)} if val else {}
    write_sealed_json(out / DATA_FILE, values)


def update_run_data_location(out: Path, place: str | None, val: str | None) -> None:
    """Keep in the run folder that its images, or those that it is validated on, are elsewhere now."""
    moved = ({} if place is None else _where(out, place)) | ({} if val is None else {"val": _where(out, val)})
    write_sealed_json(out / DATA_FILE, read_run_data(out) | moved)


def check_run_data(out: Path, images: Mapping[str, Dataset]) -> None:
    """Raise BadCheckpoint where the images of a split are others than those the run was started with."""
    if differences := _differences(out, images):
        advice = "Put them back, or start a run of its own on these (--out)"
        raise BadCheckpoint(f"{out} was started on other images: {differences}. {advice}")


def _differences(out: Path, images: Mapping[str, Dataset]) -> str:
    listed = ImageList.read(out / IMAGES_FILE)
    found = [] if listed is None else [listed.difference(split, images[split]) for split in images]
    return "; ".join(filter(None, found))


def _where(out: Path, place: str) -> dict[str, str]:
    is_local = place != "digits" and not place.startswith(REMOTE_PREFIXES)
    absolute = os.path.abspath(place) if is_local else place
    return {"place": absolute, "from_here": os.path.relpath(absolute, out) if is_local else absolute}


def run_training_records(out: Path) -> TrainingRecords | None:
    """Give what the run in `out` wrote of what it was trained on; None where it wrote nothing."""
    return records_from_dict(read_run_data(out).get("trained_on"))


def open_data(
    data: Data, place: str = "", classes: Sequence[str] | None = None, *, test_is_val: bool = False
) -> DatasetSplits:
    """Open a recipe's data, or those of another place split as it says; see `read_dataset`."""
    return read_dataset(
        place or data.spec,
        seed=data.seed,
        val_fraction=data.val_fraction,
        class_order=classes,
        test_is_val=test_is_val,
        val=data.val or None,
    )


def _open_and_tell(data: Data, place: str) -> DatasetSplits:
    """Open the data of a place that was not trained on, and log what one might have expected otherwise, in one line."""
    splits = open_data(data, place)
    info = splits.info
    remarks = [*info.notes, *(f"left out {one}" for one in info.left_out if one.what.startswith("images"))]
    if remarks:
        more = f"; and {len(remarks) - _SHOWN} more: onefold data {place}" if len(remarks) > _SHOWN else ""
        _log.info("of %s: %s%s", place, "; ".join(remarks[:_SHOWN]), more)
    return splits


def read_run_data(out: Path) -> dict[str, Any]:
    """Read what a run folder keeps of its data; empty of an older run. Raises BadCheckpoint where it is damaged."""
    try:
        return read_sealed_json(out / DATA_FILE)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadCheckpoint(
            f"{out / DATA_FILE} cannot be read: {error}; put it back as the training wrote it"
        ) from error


def _place(out: Path, spec: str, saved: Mapping[str, Any]) -> str | None:
    """Find the data of a run: as seen from the run folder (both may have moved), where they were, or as typed."""
    places = [spec]
    if isinstance(saved.get("place"), str) and isinstance(saved.get("from_here"), str):
        places = [os.path.normpath(os.path.join(out, saved["from_here"])), saved["place"], spec]
    return next((place for place in places if _is_there(place)), None)


def _is_there(place: str) -> bool:
    if place == "digits" or place.startswith(REMOTE_PREFIXES):
        return True
    return os.path.exists(os.path.dirname(place) or "." if any(c in place for c in "*?[{") else place)


# ------------------------------------------------------------------------------- what was trained on


def records_to_dict(records: Sequence[TrainedOn]) -> dict[str, Any]:
    """Give records as a card or a manifest holds them; each once, the last eight."""
    plain = {record.keys.tobytes(): record.to_dict() for record in records}
    return {"records": list(plain.values())[-8:]}


def records_from_dict(values: object) -> TrainingRecords | None:
    """Read what `records_to_dict` wrote; None where there is nothing, or nothing that can be read."""
    records = values.get("records") if isinstance(values, Mapping) else None
    if not isinstance(records, list):
        return None
    try:
        return tuple(TrainedOn.from_dict(record) for record in records)
    except BadArgument as error:
        _log.warning("%s", error)
        return None


def training_records(source: str | Path, values: object) -> TrainingRecords | None:
    """Give what a network was trained on: by its card or manifest, or of an older run by its recipe. None: unknown."""
    records = records_from_dict(values)
    if records is not None or not (Path(source) / RECIPE_FILE).is_file():
        return records
    try:
        recipe = read_recipe(Path(source))
        return (make_training_record(open_run_data(Path(source), recipe).open("train"), recipe),)
    except (BadData, BadCheckpoint):
        return None


def make_training_record(training: Dataset, recipe: Recipe) -> TrainedOn:
    """Give the record of training images that were split and decoded as a recipe says."""
    images, data = ImageList.from_splits({"train": training}), recipe.data
    record = TrainedOn.from_keys(images.keys("train"), images.by, seed=data.seed, val_fraction=data.val_fraction)
    return record.with_pixels(training, recipe.preprocessing.value_range)


def count_trained_images(records: TrainingRecords | None, images: Dataset) -> int | None:
    """Count the images that were trained on; None where that is not known."""
    return None if records is None else sum(seen is True for seen in find_trained_images(records, images))


def describe_seen_images(
    count: int, counted: Mapping[str, int | None], copies: Mapping[str, TrainedCopies | None]
) -> str:
    """Say how many of `count` images the network has seen, and that its score is optimistic; empty where it has none.

    `counted` has the numbers of those known by their content, by how they were seen; `copies` by whose they are.
    """
    parts = [f"{number} of them {how}" for how, number in counted.items() if number]
    for whose, found in copies.items():
        if found and found.found:
            of = "them" if found.looked_at == count else f"{found.looked_at} looked at"
            parts.append(f"{found.found} of {of} are by their pixels copies of {whose} (saved again, resized)")
    return f"{' and '.join(parts)}: the score is optimistic" if parts else ""


# ------------------------------------------------------------------------------- photos for a purpose


def evaluation_sets(
    source: str | Path, place: str | None, records: TrainingRecords | None, only: Split | None = None
) -> dict[str, Dataset]:
    """Give the labelled images to evaluate on, under their titles: those of the split `only`, or val and test.

    Without a place they are the images of the run in `source`. Of a place that has neither val nor test they are all
    images that were not trained on, if there are any.
    """
    if place is None:
        run = Path(source)
        if not (run / RECIPE_FILE).is_file():
            raise BadArgument("there is nothing to evaluate on: give --data FOLDER (or digits)")
        splits = open_run_data(run, recipe := read_recipe(run))
        if unknown := [str(one) for one in splits.info.left_out if one.what.startswith("images of ")]:
            _log.warning("left out %s", "; ".join(unknown))  # of classes without an output
        if only not in (None, "val"):
            return {f"{recipe.data.spec} ({only})": splits.open(only)}
        sets = {f"{recipe.data.spec} (held out)": splits.open("val")}
        if differences := _differences(run, {"val": splits.open("val")}):
            _log.warning("these are not the images that %s was validated on: %s", run, differences)
        has_test = "test" in splits.datasets and only is None
        return sets | ({f"{recipe.data.spec} (test)": splits.open("test")} if has_test else {})
    if only is not None:
        return {f"{place} ({only})": _open_and_tell(Data(spec=place), place).open(only)}
    default = Data(spec=place, val_fraction=Data().val_fraction if place == "digits" and not records else 1.0)
    splits = _open_and_tell(default, place)
    names = dict.fromkeys((splits.evaluation_split, "test" if "test" in splits.datasets else splits.evaluation_split))
    sets = {}
    for split in names:
        images, title = splits.open(split), f"{place} ({split})" if len(names) > 1 else place
        if splits.is_val_cut and split == "val" and records:
            images, left_out = _not_trained_on(images, place, records)
            if left_out:
                title += f" ({len(images)} images that were not trained on, {left_out} that were are left out)"
        sets[title] = images
    return sets


def validation_images(source: str | Path, data: str | None) -> tuple[Dataset, str]:
    """Give the first of the sets to evaluate on, and its title; nothing is known of what was trained on."""
    title, images = next(iter(evaluation_sets(source, data, None).items()))
    return images, title


def _not_trained_on(images: Dataset, place: str, records: TrainingRecords) -> tuple[Dataset, int]:
    """Give those of the images that were not trained on, if there are any, and how many others there are."""
    seen = find_trained_images(records, images)
    if None in seen:  # there were more than a record holds: by the rule that they were split by
        record = records[-1]
        held_out = open_data(Data(seed=record.seed, val_fraction=record.val_fraction), place).open("val")
        return held_out, len(images) - len(held_out)
    rest = [i for i, was_trained_on in enumerate(seen) if not was_trained_on]
    return (Subset(images, rest), len(images) - len(rest)) if 0 < len(rest) < len(images) else (images, 0)


@dataclass(frozen=True, kw_only=True)
class DeploymentPhotos:
    """Photos to calibrate with, and others to score on; `title` names those, `labelled` is whether they have classes.

    `why_unlabelled` says why they have none. `scored` may be some of `num_held_out`, and are all of them where it is 0.
    `seen` says how many of those scored were trained on, `num_seen`; empty where none is known to be.
    """

    calibration: Dataset
    scored: Dataset
    title: str
    labelled: bool = True
    why_unlabelled: str = ""
    num_held_out: int = 0
    num_seen: int = 0
    seen: str = ""


def calibration_photos(place: str, records: TrainingRecords | None) -> Dataset:
    """Give the photos of a place that calibrate: those that were trained on, or train, or all but those to score on.

    Photos without classes are all taken.
    """
    try:
        return _labelled(place, records, calibrates=True).calibration
    except NoClassFoldersError:
        return open_unlabelled_photos(place)


def split_photos(
    place: str, records: TrainingRecords | None, *, calibrates: bool = True, val: str | None = None
) -> DeploymentPhotos:
    """Divide the photos of a place into some to calibrate with and others to score on, all where nothing `calibrates`.

    Those of `val` are scored in their place. Raises BadData where photos have classes that cannot be read: then they
    could be scored, and are not to be taken for photos without classes.
    """
    try:
        photos = _labelled(place, records, calibrates)
    except NoClassFoldersError as error:
        photos = split_unlabelled_photos(place, str(error))
    if val is None:
        return photos
    title, scored = next(iter(evaluation_sets("", val, records).items()))
    return DeploymentPhotos(calibration=remove_copies(photos.calibration, scored), scored=scored, title=title)


def _labelled(place: str, records: TrainingRecords | None, calibrates: bool) -> DeploymentPhotos:
    splits = _open_and_tell(Data(val_fraction=_HELD_OUT), place)
    if not splits.is_val_cut:
        scored, title = splits.open(splits.evaluation_split), f"{place} ({splits.evaluation_split})"
        calibration = splits.datasets.get("train", scored)
        if calibrates and "train" not in splits.datasets:
            calibration, scored = _divided(scored)
            title += ", a fifth of it: there is no train, and the rest calibrates"
    elif "train" not in splits.datasets or "val" not in splits.datasets:  # one image of each class
        (whole,) = (splits.datasets[split] for split in ("train", "val") if split in splits.datasets)
        calibration, scored = _divided(whole) if calibrates else (whole, whole)
        title = f"{place} (a fifth of it; the rest calibrates)" if calibrates else place
    else:
        whole = open_data(Data(val_fraction=0.0), place).datasets["train"]
        seen = find_trained_images(records or (), whole)
        trained = [i for i, was_trained_on in enumerate(seen) if was_trained_on]
        rest = [i for i, was_trained_on in enumerate(seen) if was_trained_on is False]
        calibration, scored, title = splits.datasets["train"], splits.datasets["val"], f"{place} (held out)"
        if None in seen and records:
            split = open_data(Data(seed=records[-1].seed, val_fraction=records[-1].val_fraction), place)
            calibration, scored = split.datasets["train"], split.datasets["val"]
        elif trained and rest:
            calibration, scored = Subset(whole, trained), Subset(whole, rest)
        elif trained:
            title = f"{place} (a part of it, all of which was trained on)"
    return DeploymentPhotos(calibration=remove_copies(calibration, scored), scored=scored, title=title)


def split_unlabelled_photos(place: str, why: str) -> DeploymentPhotos:
    """Divide photos that have no classes: every fifth is to score on."""
    rest, part = _divided(open_unlabelled_photos(place))
    title = f"{place} (not labelled: answers compared with the float network's)"
    return DeploymentPhotos(
        calibration=remove_copies(rest, part), scored=part, title=title, labelled=False, why_unlabelled=why
    )


def _divided(photos: Dataset) -> tuple[Dataset, Dataset]:
    """Give four of five photos, to calibrate with, and every fifth, to score on."""
    scored = [i for i in range(len(photos)) if i % 5 == 2] or [*range(len(photos))][:1]
    kept = set(scored)
    rest = [i for i in range(len(photos)) if i not in kept]
    return Subset(photos, rest), Subset(photos, scored)


def remove_copies(calibration: Dataset, scored: Dataset) -> Dataset:
    """Give the photos of `calibration` that are not among those to score on, whatever they are called there."""
    by: KeyKind = "content" if max(len(calibration), len(scored)) <= MAX_CONTENTS else "name"
    kept = set(image_keys(scored, by))
    chosen = [i for i, key in enumerate(image_keys(calibration, by)) if key not in kept or not key]
    return calibration if len(chosen) == len(calibration) else Subset(calibration, chosen)


def remove_pixel_copies(photos: DeploymentPhotos, count: int, value_range: ValueRange | None) -> DeploymentPhotos:
    """Give `count` photos to calibrate with, evenly, none of which is by its pixels a copy of one to score on.

    Where most of them are, as of frames of one video, they are kept. The title says either.
    """
    chosen = Subset(photos.calibration, evenly_spaced(len(photos.calibration), count))
    record = TrainedOn.from_keys(image_keys(photos.scored, "content"), "content").with_pixels(
        photos.scored, value_range
    )
    copies = find_trained_copies([record], chosen, value_range)
    if copies is None or not copies.found:
        return photos
    them = f"{copies.found} of {len(chosen)} photos to calibrate with are by their pixels copies of those"
    if 2 * copies.found > len(chosen) or len(chosen) - copies.found < 2:
        _log.warning("%s to score on (saved again, resized): the accuracy of int8 is optimistic", them)
        return replace(photos, title=f"{photos.title} ({them}: optimistic for int8)")
    _log.info("%s to score on (saved again, resized): left out of calibration", them)
    rest = [i for i in range(len(chosen)) if i not in copies.numbers]
    return replace(photos, calibration=Subset(chosen, rest), title=f"{photos.title} ({them}, and left out)")


def open_unlabelled_photos(place: str) -> Dataset:
    """Give all photos of a folder at any depth, as if of one class. Raises BadData where there are none."""
    names = [str(path.relative_to(place)) for path in find_images([place])]
    return ImageFiles(root=Path(place), names=names, labels=[0] * len(names), classes=("photos",))
