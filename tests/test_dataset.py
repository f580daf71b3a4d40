"""Datasets of what a user has: splits, classes, labels.csv, and one sentence for each place that cannot be used."""

from __future__ import annotations

import builtins
import csv
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from image_fixtures import SMALL, noise, write_images
from onefold.cli import main
from onefold.data import Dataset, DatasetInfo, ImageFiles, ImageLoader, Subset, find_images, open_dataset, read_dataset
from onefold.data.fingerprint import ImageList, dataset_fingerprint
from onefold.data.preprocessing import IMAGENET_PREPROCESSING
from onefold.data.repeated_images import Files, leave_out_copies
from onefold.data.table_columns import MultiLabelError, find_class_separator, normalize_numbers, parse_list_cells
from onefold.errors import BadArgument, BadData, MissingExtra


def test_the_digits_are_embedded_and_split_by_class() -> None:
    train = open_dataset("digits", "train", seed=0, val_fraction=0.2)
    val = open_dataset("digits", "val", seed=0, val_fraction=0.2)
    assert train.classes == val.classes == tuple("0123456789")
    assert len(train) + len(val) == 1797
    assert not {train.name(i) for i in range(len(train))} & {val.name(i) for i in range(len(val))}
    held = Counter(val.label(i) for i in range(len(val)))
    assert all(35 <= held[digit] <= 37 for digit in range(10))  # a fifth of 174 to 183
    pixels = np.asarray(train.image(0))
    assert pixels.shape == (8, 8, 3)
    assert pixels.max() > 200
    other = open_dataset("digits", "val", seed=1, val_fraction=0.2)
    assert {val.name(i) for i in range(len(val))} != {other.name(i) for i in range(len(other))}


def test_the_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r'pip install "onefold\[digits\]"'):
        open_dataset("digits", "train", seed=0, val_fraction=0.2)


def labelled(source: Dataset) -> dict[str, str]:
    return {source.name(i): source.classes[source.label(i)] for i in range(len(source))}


@pytest.mark.parametrize("held_out", ["val", "validation", "Dev"])
def test_a_folder_that_is_split_already(tmp_path: Path, held_out: str) -> None:
    write_images(tmp_path, ["train/dog/1.jpg", "train/cat/2.JPEG", "train/cat/deep/er/3.png", f"{held_out}/cat/4.png"])
    write_images(tmp_path, [f"{held_out}/dog/5.webp"])
    (tmp_path / "train/cat/.hidden.jpg").write_bytes(b"")
    (tmp_path / "train/.DS_Store").write_bytes(b"")
    (tmp_path / "train/__MACOSX").mkdir()
    (tmp_path / "train/cat/notes.txt").write_text("a note")
    train = open_dataset(tmp_path, "train", seed=0, val_fraction=0.5)
    assert train.classes == ("cat", "dog")
    assert labelled(train) == {"cat/2.JPEG": "cat", "cat/deep/er/3.png": "cat", "dog/1.jpg": "dog"}
    val = open_dataset(str(tmp_path), "val", seed=0, val_fraction=0.5)
    assert labelled(val) == {"cat/4.png": "cat", "dog/5.webp": "dog"}
    np.testing.assert_array_equal(np.asarray(val.image(0)), np.asarray(noise(12, 16, 3)))


def test_one_folder_of_class_folders_is_split_by_names_and_seed(tmp_path: Path) -> None:
    files = [f"{kind}/{i}.png" for kind in ("a", "b") for i in range(10)] + ["c/only.png", "train/1.png", "train/2.png"]
    write_images(tmp_path, files)  # a class may be called train
    train, val = (labelled(open_dataset(tmp_path, s, seed=3, val_fraction=0.3)) for s in ("train", "val"))
    assert sorted({**train, **val}) == sorted(files)
    assert Counter(val.values()) == {"a": 3, "b": 3, "train": 1}
    write_images(tmp_path, ["a/new.png"])
    later = labelled(open_dataset(tmp_path, "val", seed=3, val_fraction=0.3))
    assert len(set(val) - set(later)) <= 1
    everything = open_dataset(tmp_path, "val", seed=3, val_fraction=1.0)
    assert len(everything) == len(files) + 1
    assert len(open_dataset(tmp_path, "train", seed=3, val_fraction=0.0)) == len(files) + 1


def test_train_alone_is_split_and_val_alone_can_be_evaluated_on(tmp_path: Path) -> None:
    write_images(tmp_path / "one", [f"train/{kind}/{i}.png" for kind in "ab" for i in range(4)])
    train, val = (labelled(open_dataset(tmp_path / "one", s, seed=0, val_fraction=0.25)) for s in ("train", "val"))
    assert (len(train), len(val), set(train.values())) == (6, 2, {"a", "b"})
    write_images(tmp_path / "two", ["val/a/1.png", "val/b/1.png"])
    assert len(open_dataset(tmp_path / "two", "val", seed=0, val_fraction=0.2)) == 2
    with pytest.raises(BadData, match="has val/ and no train/"):
        open_dataset(tmp_path / "two", "train", seed=0, val_fraction=0.2)


@pytest.mark.parametrize("table", ["file,label\n{}", "\ufeffFile ; Label ; extra\n{};x", "label\tfile\n"])
def test_labels_by_name(tmp_path: Path, table: str) -> None:
    write_images(tmp_path, ["images/1.png", "2.png", "images/3.png", "4.png"])
    names = {"1.png": "zebra", "2.png": "ant, red", "images/3.png": "zebra", "4.png": "ant, red"}
    separator = max(",;\t", key=table.count)
    columns = [c.strip() for c in table.splitlines()[0].split(separator)]
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=separator)
        writer.writerow(columns)
        for file, label in names.items():
            writer.writerow([{"file": file, "label": label}.get(c.strip("\ufeff").lower(), "x") for c in columns])
    source = open_dataset(tmp_path, "val", seed=0, val_fraction=1.0)
    assert source.classes == ("ant, red", "zebra")
    expected = {"images/1.png": "zebra", "2.png": "ant, red", "images/3.png": "zebra", "4.png": "ant, red"}
    assert labelled(source) == expected
    half = open_dataset(tmp_path, "train", seed=0, val_fraction=0.5)
    assert Counter(labelled(half).values()) == {"ant, red": 1, "zebra": 1}


@pytest.mark.parametrize(
    ("separator", "joined", "several"),
    [
        ("|", ["cat|dog", "dog", "cat"], True),
        (";", ["cat;dog", "cat;owl"], True),
        (",", ["cat, dog", "dog", "cat"], True),
        (",", ["tench, Tinca tinca", "maillot", "maillot, tank suit"], False),
        (",", ["Portland, Oregon", "Portland, Maine", "Salem, Oregon", "Salem, Maine"], False),
        ("|", ["a|b", "c|d"], False),
        (";", ["cat;", "cat"], False),
        ("|", ["cat", "dog"], False),
        (" ", ["clear", "clear haze", "haze water clear", "water"], True),
        (" ", ["late blight", "early blight", "late rot", "early rot", "rot"], False),
        (" ", ["a", "b", "a b"], True),
        (" ", ["a", "b", "a  b"], True),
        ("+", ["a", "b", "a+b"], True),
        ("&", ["a", "b", "a & b"], True),
        ("/", ["a", "b", "a/b"], True),
        ("/", ["F-16A/B", "F/A-18", "Cessna 172"], False),
        (" and ", ["a", "b", "a and b", "black and tan coonhound"], False),
        ("\u3001", ["a", "b", "a\u3001b"], True),
        (" ", ["sea lion", "lion", "bear", "polar bear", "brown bear"], False),
        (" ", ["golden retriever", "labrador retriever", "poodle", "flat coated retriever"], False),
    ],
)
def test_cells_that_name_several_classes_are_told_from_names(separator: str, joined: list[str], several: bool) -> None:
    assert find_class_separator(joined) == (separator if several else "")


@pytest.mark.parametrize(
    ("cells", "plain"),
    [
        (["['cat', 'dog']", "['cat']"], ["cat\0dog", "cat"]),
        (["['cat' 'dog']", "['owl']"], ["cat\0dog", "owl"]),
        (['["cat"]', "('dog')"], ["cat", "dog"]),
        (["[cat]", "dog"], ["[cat]", "dog"]),
        (["[0, 1]", "[1]"], ["0\0001", "1"]),
        (["['cat', 'dog']", "cat"], ["cat\0dog", "cat"]),
        (["('cat',)", "('dog',)"], ["cat", "dog"]),
        (["[0 1 0]", "[1 1 0]"], ["1", "0\0001"]),
        (["[1., 0.]", "[0., 1.]"], ["0", "1"]),
    ],
)
def test_lists_in_a_text_are_lists(cells: list[str], plain: list[str]) -> None:
    assert parse_list_cells(cells) == plain


@pytest.mark.parametrize(
    ("values", "plain"),
    [
        (["0", "01", "1.0", "1"], ["0", "1", "1", "1"]),
        (["3.0", "2.0"], ["3", "2"]),
        (["01", "02", "10"], ["01", "02", "10"]),
        (["01", "1", "cat"], ["01", "1", "cat"]),
        (["1.5", "1"], ["1.5", "1"]),
        (["-1", "-1.0"], ["-1", "-1"]),
    ],
)
def test_whole_numbers_in_several_forms_are_one_class_each(values: list[str], plain: list[str]) -> None:
    assert normalize_numbers(values) == plain


def test_a_multi_label_table_that_is_not_labels_csv_says_so_too(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "marks.csv").write_text("file,cat,dog\n1.png,1,1\n2.png,0,1\n")
    with pytest.raises(MultiLabelError, match=r"line 2: 1 in the columns cat, dog\. Images of several classes"):
        read_dataset(tmp_path, seed=0, val_fraction=0.5)


def test_labels_by_index(tmp_path: Path) -> None:
    write_images(tmp_path, ["1.png", "2.png"])
    table = tmp_path / "labels.csv"
    table.write_text("index,file,name\n3,1.png,owl\n0,2.png,elk\n")
    source = open_dataset(tmp_path, "val", seed=0, val_fraction=1.0)
    assert (source.classes, source.label(0), source.label(1)) == (("0", "3"), 1, 0)
    info = read_dataset(tmp_path, seed=0, val_fraction=0.0).info
    assert info.notes == ("labels.csv numbers its 2 classes 0, 3 (up to 3): a number that no image has is no class",)
    table.write_text("index,file,label\n3,1.png,owl\n0,2.png,elk\n")
    assert open_dataset(tmp_path, "train", seed=0, val_fraction=0.0).classes == ("elk", "owl")
    for column, classes in (("name", ("1", "2")), ("label", ("elk", "owl"))):  # numbered from 1: there is no class 0
        table.write_text(f"index,file,{column}\n2,1.png,owl\n1,2.png,elk\n")
        source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
        assert (source.classes, source.label(0), source.label(1)) == (classes, 1, 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected the columns file,label or file,index"),
        ("title,label\nx,a\n", "expected the columns file,label or file,index"),
        ("file,score\n1.png,a\n", "expected the columns"),
        ("file,label\n", "lists no images"),
        ("file,label\n1.png,a\ngone.png,b\nlost.png,b\n", "lists 2 files that are not there: gone.png, lost.png"),
        (
            "file,label\n1.png,a\n1.png,b\n",
            "1.png is a in line 2 and b in line 3. Images of several classes (multi-label)",
        ),
        ("file,label\n1.png,\n", "labels no image: label say nothing in any line"),
        ("file,label\n1.png\n", "labels no image: label say nothing in any line"),
        ("file,label\n,a\n", "line 2: expected a file and its class"),
        (
            "file,label,is_val,test\n1.png,a,1,1\n2.png,b,0,0\n",
            "an image is of test and val by the columns is_val, test",
        ),
        ("file,label\n1.png,tench, Tinca tinca\n2.png,b\n", "line 2 has 3 values, and the first line names 2 columns"),
        ("file,index\n1.png,-1\n", "line 2: the index is '-1'"),
        ("file,index\n1.png,two\n", "line 2: the index is 'two'"),
        ("file,index\n1.png,0\n2.png,1000000\n", "line 3: the index is '1000000', expected a number from 0"),
        ("file,index\n1.png,99999999999999999999\n", "line 2: the index is"),
        ("file,index,label\n1.png,0,a\n2.png,0,b\n", "line 3: index 0 is called both 'a' and 'b'"),
    ],
)
def test_a_table_of_labels_that_cannot_be_used(tmp_path: Path, text: str, sentence: str) -> None:
    write_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(BadData, match=r"labels\.csv") as caught:
        open_dataset(tmp_path, "val", seed=0, val_fraction=1.0)
    assert sentence in str(caught.value)


def test_the_sample_of_imagenet_opens(shared_data: Path) -> None:
    source = open_dataset(shared_data / "imagenet-sample", "val", seed=0, val_fraction=1.0)
    assert (len(source), len(source.classes)) == (1000, 1000)
    assert sorted(source.label(i) for i in range(1000)) == list(range(1000))
    assert source.name(0) == "images/n01440764_tench.jpg"
    assert IMAGENET_PREPROCESSING(source.image(999)).shape == (3, 224, 224)


def folder_faults(root: Path) -> dict[str, str]:
    """Folders that cannot be used for training, each with what the sentence must say."""
    write_images(root / "flat", ["1.png", "2.png"])
    (root / "nothing").mkdir()
    (root / "file.png").write_bytes(b"")
    (root / "set.zip").write_bytes(b"")
    write_images(root / "one", ["cat/1.png"])
    write_images(root / "hollow", ["cat/1.png", "dog/1.png"])
    (root / "hollow/emu").mkdir()
    (root / "hollow/fox/.git").mkdir(parents=True)
    (root / "psd/cat").mkdir(parents=True)
    (root / "psd/cat/1.psd").write_bytes(b"")
    (root / "psd/dog").mkdir()
    write_images(
        root / "differ", ["train/cat/1.png", "train/dog/1.png", "val/dog/1.png", "val/owl/1.png", "val/yak/1.png"]
    )
    write_images(root / "flat-split", ["train/1.png", "val/2.png"])
    write_images(root / "single", ["a/1.png", "b/1.png"])
    return {
        "missing": "missing is not there: expected a folder of images, or the word digits",
        "file.png": "is a file: expected a folder",
        "set.zip": "is an archive: unpack it",
        "flat": "holds 2 images and no class folders",
        "nothing": "holds no images: it has no files at all",
        "one": "has one class only, cat: training needs two or more",
        "hollow": "class folders without images in",
        "psd": "holds no images: of files it has 1 .psd",
        "differ": "the classes differ; only in train: cat; only in val: owl, yak",
        "flat-split": "train holds 1 images and no class folders",
    }


def test_a_folder_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    for name, sentence in folder_faults(tmp_path).items():
        with pytest.raises(BadData) as caught:
            open_dataset(tmp_path / name, "train", seed=0, val_fraction=0.2)
        assert sentence in str(caught.value)
    with pytest.raises(BadData, match="emu, fox; fill or remove them"):
        open_dataset(tmp_path / "hollow", "val", seed=0, val_fraction=0.2)
    assert len(open_dataset(tmp_path / "one", "val", seed=0, val_fraction=1.0)) == 1  # to evaluate, one class will do
    with pytest.raises(BadData, match="leaves no image for val"):
        open_dataset(tmp_path / "single", "val", seed=0, val_fraction=0.2)
    for split, fraction in (("exam", 0.2), ("train", 1.5)):
        with pytest.raises(BadArgument):
            open_dataset(tmp_path / "one", split, seed=0, val_fraction=fraction)  # type: ignore[arg-type]


@pytest.mark.timeout(20)
def test_loops_of_links_and_special_files_do_not_hang(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png"])
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "a/self").symlink_to("self")
    (tmp_path / "b/self.png").symlink_to("self.png")
    os.mkfifo(tmp_path / "b/pipe.jpg")
    source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    assert [source.name(i) for i in range(len(source))] == [
        "a/1.png",
        "b/1.png",
        "b/pipe.jpg",
    ]
    (left_out,) = (one for one in read_dataset(tmp_path, seed=0, val_fraction=0.0).info.left_out if "link" in one.what)
    assert str(left_out) == "2 links to nothing (a/self, b/self.png): what they point to is not there"
    (tmp_path / "b/self.png").unlink()
    (tmp_path / "a/self").unlink()
    (tmp_path / "a/broken.jpg").symlink_to("nowhere.jpg")
    (left_out,) = read_dataset(tmp_path, seed=0, val_fraction=0.0).info.left_out
    assert str(left_out) == "1 link to nothing (a/broken.jpg): what they point to is not there"
    batches = ImageLoader(source, SMALL, batch_size=4, on_bad="skip")
    ((images, labels),) = batches.epoch(0)
    assert (len(images), labels.tolist()) == (2, [0, 1])
    assert list(batches.bad) == ["b/pipe.jpg"]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = os.fsdecode(b"caf\xe9")
    write_images(tmp_path, [f"{raw}/{raw}.png", "plain/<b>\n.png"])
    source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    assert source.classes == ("caf\u00e9", "plain")
    assert source.name(0) == "caf\u00e9/caf\u00e9.png"
    assert source.image(0).size == (16, 12)
    listed_before = ImageList(by="name", splits={"train": [(source.name(0), source.classes[0], "0")]})
    listed_before.write(tmp_path / "images.csv")
    assert ImageList.read(tmp_path / "images.csv") is not None
    assert len(dataset_fingerprint(source)) == 129
    table = b"file,label\ncaf\xe9.png,caf\xe9\nother.png,x\n"
    listed = write_images(tmp_path / "listed", [f"{raw}.png", "other.png"])
    (listed / "labels.csv").write_bytes(table)
    assert open_dataset(listed, "train", seed=0, val_fraction=0.0).classes == ("caf\u00e9", "x")
    assert (
        "is not UTF-8: it is read as Windows-1252 ('caf\u00e9.png,caf\u00e9')"
        in read_dataset(listed, seed=0, val_fraction=0.0).info.notes[0]
    )


def test_find_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["b/2.png", "b/a/1.jpg", "c.tif"])
    (tmp_path / "b/.x.png").write_bytes(b"")
    (tmp_path / "odd.data").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    found = find_images([tmp_path / "odd.data", str(tmp_path / "b"), tmp_path / "b/2.png", tmp_path / "c.tif"])
    assert found == [tmp_path / "odd.data", tmp_path / "b/2.png", tmp_path / "b/a/1.jpg", tmp_path / "c.tif"]
    with pytest.raises(BadData, match="empty holds no images"):
        find_images([tmp_path / "empty"])
    with pytest.raises(BadData, match="nowhere is not there"):
        find_images([tmp_path / "c.tif", tmp_path / "nowhere"])


def test_the_fingerprint_sees_names_sizes_labels_and_classes(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png"])
    base = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    prints = {dataset_fingerprint(base)}
    assert dataset_fingerprint(open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)) in prints
    one = ImageFiles(tmp_path, ["a/1.png", "b/1.png"], [0, 1], ("a", "b"))
    assert dataset_fingerprint(one) in prints
    prints |= {dataset_fingerprint(replace(one, labels=[1, 0])), dataset_fingerprint(replace(one, classes=("a", "c")))}
    prints |= {dataset_fingerprint(Subset(one, [1, 0])), dataset_fingerprint(Subset(one, [0]))}
    with (tmp_path / "a/1.png").open("ab") as file:
        file.write(b"!")
    prints.add(dataset_fingerprint(one))
    (tmp_path / "a/1.png").unlink()
    prints.add(dataset_fingerprint(one))
    assert len(prints) == 7


def test_data_prints_what_a_place_is_and_leaves_nothing_unsaid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, [f"{side}/{kind}/{i}.png" for side in ("train", "valid") for kind in "ab" for i in range(2)])
    write_images(tmp_path, ["test/1.png", "cover.png"])
    (tmp_path / "train/a/notes.txt").write_text("a note")
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "old.tar").write_bytes(b"")
    assert main(["data", str(tmp_path), "--json"]) == 0
    info = DatasetInfo.from_dict(json.loads(capsys.readouterr().out))
    assert (info.classes, info.class_order, info.container) == (("a", "b"), "sorted by name", "class folders")
    assert [(split.name, split.source, split.images_per_class) for split in info.splits] == [
        ("train", "train/", (2, 2)),
        ("val", "valid/", (2, 2)),
    ]
    assert [(one.count, one.what) for one in info.left_out] == [
        (1, "images in no folder"),
        (1, "images in test/"),
        (1, ".tar file"),
        (1, ".txt file"),
        (1, "hidden file"),
    ]
    assert main(["data", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == info.lines()
    assert len(info.lines(3)) == 3
    assert info.lines(3)[-1] == f"  and 6 more lines: onefold data {tmp_path}"


def test_test_is_kept_aside_and_was_val_for_runs_of_before(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{side}/{kind}/{i}.png" for side in ("train", "test") for kind in "ab" for i in range(4)])
    now = read_dataset(tmp_path, seed=0, val_fraction=0.25)
    assert {split: len(images) for split, images in now.datasets.items()} == {"train": 6, "val": 2, "test": 8}
    assert now.evaluation_split == "test"
    assert "test/ is kept for `onefold eval`" in now.info.notes[0]
    before = read_dataset(tmp_path, seed=0, val_fraction=0.25, test_is_val=True)
    assert {split: len(images) for split, images in before.datasets.items()} == {"train": 8, "val": 8}


def test_the_classes_of_a_run_keep_their_order(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{kind}/{i}.png" for kind in range(11) for i in range(2)])
    assert read_dataset(tmp_path, seed=0, val_fraction=0.5).info.classes == tuple(map(str, range(11)))
    before = sorted(map(str, range(11)))
    opened = read_dataset(tmp_path, seed=0, val_fraction=0.5, class_order=before)
    assert opened.info.classes == tuple(before)
    assert all(name.partition("/")[0] == kind for name, kind in labelled(opened.open("train")).items())


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_images(tmp_path, [f"train/{composed}/1.png", f"train/{decomposed}/2.png", "train/bar/3.png"])
    write_images(tmp_path, [f"val/{decomposed}/4.png", "val/bar/5.png"])
    splits = read_dataset(tmp_path, seed=0, val_fraction=0.25)
    assert [split.images_per_class for split in splits.info.splits] == [(1, 2), (1, 1)]
    assert splits.info.classes == ("bar", composed)
    assert "two Unicode forms are one class: caf\u00e9" in splits.info.notes[0]
    assert splits.open("val").name(1) == f"{composed}/4.png"
    assert splits.open("val").image(1).size == (16, 12)
    listed = write_images(tmp_path / "listed", [f"{decomposed}.png", "b.png"])
    (listed / "labels.csv").write_text(f"file,label\n{composed}.png,u\nb.png,v\n", encoding="utf-8")
    assert open_dataset(listed, "val", seed=0, val_fraction=1.0).classes == ("u", "v")


@pytest.mark.parametrize(
    ("files", "tables", "sentence"),
    [
        (["train1/1.png", "train2/2.png"], {"train1/labels.csv": "1.png,a", "train2/labels.csv": "2.png,b"}, "parts"),
        (["train1/1.png", "train2/b/2.png"], {"train1/labels.csv": "1.png,a"}, "one by a table and one by folders"),
        (["fold1_train/a/1.png", "fold2_train/a/2.png", "fold1_val/a/3.png", "fold2_val/a/4.png"], {}, "may each be"),
        (["1.png", "2.png"], {"a.csv": "1.png,a\n2.png,b", "b.csv": "1.png,b\n2.png,a"}, "several tables of labels"),
        (
            ["1.png", "2.png"],
            {"a.csv": "file,label,split\n1.png,a,train\n2.png,b,later"},
            "the column split says 'later'",
        ),
        (["train_v1/a/1.png", "train_v1/b/1.png", "train_v2/a/1.png", "train_v2/b/1.png"], {}, "a split or a class"),
        (
            [
                "x/train/a/1.png",
                "x/train/b/1.png",
                "x/val/a/1.png",
                "y/train/a/1.png",
                "y/train/b/1.png",
                "y/val/a/1.png",
            ],
            {},
            "x/train/ holds folders that are called as others (a, b)",
        ),
        (["train/a/1.png", "train/b/1.png", "train/val/a/1.png", "train/val/b/1.png"], {}, "train/val/ holds folders"),
        (["a/1.png", "b/1.png"], {"labels.csv": "file,label\n1.png,x"}, "1.png may be a/1.png, b/1.png"),
        (
            ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"],
            {"train/metadata.csv": "file_name,label\na/1.png,b\nb/2.png,a"},
            "train/metadata.csv says other classes than the folders (b of train/a/1.png)",
        ),
        (
            ["train/1.png", "train/2.png"],
            {
                "train/metadata.csv": "file_name,label\n1.png,a\n2.png,b",
                "train/metadata.jsonl": '{"file_name": "1.png", "label": "b"}\n{"file_name": "2.png", "label": "a"}',
            },
            "several tables of labels",
        ),
        (
            [f"fold{i}/{name}/{i}.png" for i in (1, 2) for name in ("cat", "dog")],
            {},
            "fold1, fold2 all hold folders called cat, dog, so the classes may be the outer or the inner ones",
        ),
        (
            [f"train/fold{i}/{name}/{i}.png" for i in (1, 2) for name in ("cat", "dog", "owl")[: i + 1]],
            {},
            "fold1, fold2 all hold folders called cat, dog, so",
        ),
        (
            [f"{split}/{name}/1.png" for split in ("训练集", "验证集") for name in ("猫", "狗")],
            {},
            "all hold folders called 狗, 猫",
        ),
    ],
)
def test_what_can_be_understood_in_two_ways_is_refused(
    tmp_path: Path, files: list[str], tables: dict[str, str], sentence: str
) -> None:
    write_images(tmp_path, files)
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BadData) as caught:
        read_dataset(tmp_path, seed=0, val_fraction=0.5)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("names", "text", "note"),
    [
        (
            "{0}/{0}a/{1}.png {0}/{0}b/{1}.png",
            {},
            "fold1, fold2: a class with all folders inside (fold1/: fold1a, fold1b)",
        ),
        ("train/{0}/{0}a/{1}.png train/{0}/{0}b/{1}.png", {}, "fold1, fold2: a class with all folders inside"),
        ("{}/{}.png", {"meta/train.txt": "fold1/1"}, "meta/train.txt (lists that may say splits) stay unread"),
        ("{}/{}.png", {"train_test_split.txt": "1 0"}, "train_test_split.txt (lists that may say splits)"),
        ("{}/{}.png FOLD1/3.png", {}, "classes whose names differ in case only are several: FOLD1, fold1"),
        (
            "{}/{}.png",
            {"x.csv": "file,label,split\nfold1/1.png,fold1,train\nfold2/1.png,fold2,val"},
            "x.csv: the splits are not used, since 2 images in class folders are in none of them",
        ),
        ("{}.png", {"x.csv": "id,label\nfold1,a\nfold2,NaN"}, "1 of 2 lines say nothing of their image (label: 'NaN')"),
        ("{}.png", {"x.csv": "id,label,test\nfold1,a,x\nfold2,b,y"}, "the column test (x, y) is not used"),
        (
            "train/{0}{1}.png val/{0}{1}.png",
            {
                "train.csv": "file,label\ntrain/fold11.png,a\ntrain/fold21.png,b",
                "val.csv": "file,label\nval/fold11.png,a\ntrain/fold11.png,b",
            },
            "1 of the 2 images of val.csv are in train.csv too (fold11.png), 1 under another class (fold11.png: a in "
            "train.csv, b in val.csv)",
        ),
        (
            "{0}/{1}.png",
            {"labels.csv": "file,label\nfold1/1.png,fold1\nfold1/2.png,fold2\nfold2/1.png,fold2\nfold2/2.png,fold2"},
            "labels.csv says other classes than the folders (fold2 of fold1/2.png; 1 of 4 images): labels.csv counts",
        ),
        (
            "{0}{1}.png",
            {
                "labels.csv": "file,label\nfold11.png,a\nfold12.png,b\nfold21.png,b",
                "more.csv": "file,label\nfold11.png,a\nfold12.png,a\nfold21.png,b",
            },
            "more.csv says another class than labels.csv of 1 of 3 images (fold12.png: a, not b): labels.csv counts",
        ),
        (
            "{0}{1}.png",
            {"x.csv": "file,label,split\nfold11.png,a,train\nfold12.png,b,train\nfold21.png,b,val\nfold11.png,a,val"},
            "1 lines list an image in another split, and the first counts: fold11.png is of train in line 2, of val in",
        ),
        (
            "fold1_fold2/{1}.png {0}/{1}.png",
            {},
            "fold1_fold2 counts as a class of its own, though fold1 and fold2 are classes too",
        ),
        ("unknown/{0}{1}.png {0}/{1}.png", {}, "unknown counts as a class: move it away if it stands for none"),
        ("images_{1}/{0}.png", {}, "images_1, images_2 are classes here: if they are parts of one dataset, add a"),
        ("{0}{1}.png", {"x.csv": "file,label\nfold11.png,a\nfold12.png,b"}, "no class of x.csv has two images"),
        (
            "hot_dog/{}.png hot-dog/{}.png",
            {},
            "classes whose names differ in blanks and signs only are several: hot-dog, hot_dog",
        ),
        ("cat/{}.png", {}, "one class only, cat: enough to be scored on, not to train"),
        ("{}{}.png", {"x.csv": "id,label,fold\nfold11,a,0\nfold21,b,1"}, "x.csv: the column fold (0, 1) is not used"),
    ],
)
def test_what_may_have_been_meant_otherwise_is_said(
    tmp_path: Path, names: str, text: dict[str, str], note: str
) -> None:
    files = [
        each.replace("{}", "{0}", 1).replace("{}", "{1}").format(fold, i)
        for each in names.split()
        for fold in ("fold1", "fold2")
        for i in (1, 2)
    ]
    write_images(tmp_path, files)
    for name, content in text.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert note in "\n".join(read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes)


def test_columns_of_parquet_files_that_are_not_used_are_said(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [b"x"] * 4
    columns = {
        "image": images,
        "image_mask": images,
        "label": list("abab"),
        "category": list("xxyy"),
        "fold": [0, 1, 2, 3],
    }
    parquet.write_table(arrow.table({**columns, "image_2": images}), tmp_path / "x.parquet")
    assert read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes == (
        f"{tmp_path}: the column fold (0, 1, 2 and 1 more) is not used: it has no words for splits",
        "the images are the column image, not image_2, image_mask",
        "the classes are the column label, not category",
    )


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([0.0, 1.0, 0.0, 1.0], ("0", "1")),
        ([1, 2, 1, 2], ("1", "2")),
        (["cat", None, "dog", None], ("cat", "dog")),
        (["0", "01", "1.0", "1"], ("0", "1")),
        ([True, False, True, False], ("false", "true")),
        ([["cat"], ["dog"], ["cat"], ["dog"]], ("cat", "dog")),
        ([["cat"], ["dog", "cat"], ["cat"], ["dog"]], None),
        (["cat|dog", "dog", "cat", "dog"], None),
    ],
)
def test_labels_of_parquet_files_are_read_as_those_of_tables(
    tmp_path: Path, labels: list[object], classes: tuple[str, ...] | None
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": [b"x"] * 4, "label": labels}), tmp_path / "x.parquet")
    if classes is None:
        with pytest.raises(MultiLabelError, match=r"\(multi-label\) are not supported"):
            read_dataset(tmp_path, seed=0, val_fraction=0.5)
    else:
        assert read_dataset(tmp_path, seed=0, val_fraction=0.5).info.classes == classes


def test_a_flag_of_parquet_files_that_is_the_same_everywhere_divides_nothing(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(name: str, is_valid: bool) -> None:
        columns = {"image": [b"x"] * 4, "label": list("abab"), "is_valid": [is_valid] * 4}
        parquet.write_table(arrow.table(columns), tmp_path / name)

    for is_valid in (True, False):
        write("1.parquet", is_valid)
        info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
        assert [(split.name, split.num_images) for split in info.splits] == [("train", 2), ("val", 2)]
        said = f"the column is_valid is {str(is_valid).lower()} in all rows, so it divides nothing and is not used"
        assert info.notes == (f"{tmp_path}: {said}",)
    write("2.parquet", True)  # the other is false everywhere: together they divide
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert [(split.name, split.num_images) for split in info.splits] == [("train", 4), ("val", 4)]


def test_a_table_in_a_class_folder_is_left_out(tmp_path: Path) -> None:
    write_images(tmp_path, [f"train/{kind}/{i}.png" for kind in ("0", "1") for i in range(2)])
    (tmp_path / "train/0/boxes.csv").write_text("Filename;Width;ClassId\n0.png;16;0\n1.png;16;0\n")
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert info.container == "class folders"
    assert [one.examples for one in info.left_out] == [("train/0/boxes.csv",)]


def test_a_class_with_the_name_of_a_split_is_said(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{kind}/{i}.png" for kind in ("cat", "dog", "test") for i in range(2)])
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert info.classes == ("cat", "dog", "test")
    assert info.notes == ("test: a class here, since it holds images as the folders beside it do",)


@pytest.mark.parametrize(
    ("files", "copies", "classes", "left_out"),
    [
        (["chest/train/cat/1", "chest/train/dog/2"], {"chest": "chest/chest"}, ("cat", "dog"), "chest/chest/: copies"),
        (["cat/1", "cat/2", "dog/1"], {"": "animals"}, ("cat", "dog"), "animals/: copies of those beside it"),
        (["cat/1", "cat/2", "dog/1"], {"cat": "cat - Copy"}, ("cat", "dog"), "cat - Copy/: copies of those in cat/"),
        (["cat/1", "cat/2", "dog/1"], {"cat": "Copy of cat"}, ("cat", "dog"), "Copy of cat/: copies of those in cat/"),
        (["x/cat/1", "x/cat/2", "x/dog/1"], {"x": "y"}, ("cat", "dog"), "y/: copies of those in x/"),
        (["cat/1", "cat/2", "dog/1"], {"cat": "cat/cat"}, ("cat", "dog"), "cat/cat/: copies of those in cat/"),
        (["Train/cat/1", "Train/dog/2"], {"Train": "train"}, ("cat", "dog"), "train/: copies of those in Train/"),
        (["cat/1", "cat/2", "dog/1"], {"cat": "owl"}, ("cat", "dog", "owl"), ""),
        (["train/cat/1", "train/dog/2"], {"train": "val"}, ("cat", "dog"), ""),
    ],
)
def test_copies_of_folders_are_left_out_and_said(
    tmp_path: Path, files: list[str], copies: dict[str, str], classes: tuple[str, ...], left_out: str
) -> None:
    write_images(tmp_path / "place", [f"{name}.png" for name in files])
    for original, copy in copies.items():
        shutil.copytree(tmp_path / "place" / original, tmp_path / "copy")
        shutil.move(tmp_path / "copy", tmp_path / "place" / copy)
    info = read_dataset(tmp_path / "place", seed=0, val_fraction=0.5).info
    assert info.classes == classes
    assert left_out in "".join(f"{one.what}: {one.reason}" for one in info.left_out)
    assert bool(left_out) == bool(info.left_out)
    if not left_out:
        assert any("hold the same files" in note for note in info.notes)


@pytest.mark.parametrize("sizes", [lambda folder: 1, int], ids=["equal sizes", "other sizes"])
@pytest.mark.parametrize("content", [lambda folder: b"", lambda folder: folder.encode()], ids=["same", "other"])
def test_thousands_of_folders_with_the_same_names_are_compared_once_each(
    sizes: Callable[[str], int], content: Callable[[str], bytes]
) -> None:
    calls: Counter[str] = Counter()

    def size(path: str) -> int:
        calls["size"] += 1
        return sizes(path.split("/")[0])

    def read(path: str) -> bytes:
        calls["read"] += 1
        return content(path.split("/")[0])

    images = [f"{folder}/{i}.png" for folder in range(2000) for i in range(5)]
    kept, left_out, notes = leave_out_copies(images, Files(size, read))
    assert (kept, left_out) == (images, [])
    assert notes == (
        ["1/, 2/, 3/ and 1996 more and 0/ hold the same files"]
        if (size("0/"), read("0/")) == (size("1/"), read("1/"))
        else []
    )
    assert calls["size"] <= len(images) + 2
    assert calls["read"] <= 2 * len(images)


def test_folders_with_the_same_names_and_other_pictures_are_no_copies(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{side}/{i}.png" for side in ("left", "right") for i in (1, 2)])
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert (info.classes, info.left_out) == (("left", "right"), ())


def test_what_is_all_of_a_place_is_called_so(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{kind}/{i}.png" for kind in "abc" for i in range(3)])
    for fraction, sources in [(0.01, ["66.7 %", "33.3 %"]), (0.33, ["67 %", "33 %"]), (0.0, ["all images"])]:
        info = read_dataset(tmp_path, seed=0, val_fraction=fraction).info
        assert [split.source.partition(" of")[0] for split in info.splits] == sources


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folders_without_end_are_refused_at_once(tmp_path: Path, kind: str):
    """As deep as a path may be: trees of folders are walked by recursion, and ancestors of ancestors are many."""
    deep = "/".join(["n"] * 1500)
    if kind == "folder":
        (tmp_path / "photos" / "a").mkdir(parents=True)
        os.makedirs(tmp_path / "photos" / "b" / "/".join(["n"] * 150))
        place = tmp_path / "photos"
    else:
        place = tmp_path / "photos.tar"
        with tarfile.open(place, "w") as archive:
            for label in "ab":
                archive.addfile(tarfile.TarInfo(f"{label}/{deep}/0.png"))
    with pytest.raises(BadData, match=r"^folders lie in each other more than 100 deep, below [ab]/n/n: name the"):
        read_dataset(str(place), seed=0, val_fraction=0.2)


def test_a_split_alone_has_the_names_of_the_whole(tmp_path: Path):
    write_images(
        tmp_path / "flowers", [f"{split}/{n}/{i}.png" for split in ("train", "valid") for n in (1, 2) for i in (3, 4)]
    )
    (tmp_path / "flowers" / "cat_to_name.json").write_text('{"1": "rose", "2": "lily"}', encoding="utf-8")
    for place in ("flowers", "flowers/train", "flowers/valid"):
        assert read_dataset(tmp_path / place, seed=0, val_fraction=0.5).info.classes == ("rose", "lily")


def test_what_may_stand_for_no_class_is_said(tmp_path: Path):
    write_images(tmp_path, [f"{c}/{i}.png" for c in ("cat", "unsorted", "\U0001f431") for i in range(2)])
    notes = read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes
    assert notes == ("unsorted counts as a class: move it away if it stands for none",)  # and a cat is one


def test_numbers_beside_names_of_classes_are_said(tmp_path: Path):
    write_images(tmp_path, [f"{i}.png" for i in range(6)])
    rows = [f"{i}.png,{c}" for i, c in enumerate(("cat", "0", "dog", "dog", "cat", "0"))]
    (tmp_path / "labels.csv").write_text("\n".join(("file,label", *rows)), encoding="utf-8")
    (note,) = read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes
    assert note.endswith("the column label has the numbers 0 beside names (cat, dog): each is a class of its own")


def test_splits_of_a_table_that_contradict_the_folders_are_said(tmp_path: Path):
    names = [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("cat", "dog") for i in range(2)]
    write_images(tmp_path, names)
    rows = [f"{name},{name.split('/')[1]},{'test' if name[-5] == '1' else 'train'}" for name in names]
    (tmp_path / "x.csv").write_text("\n".join(("file,label,split", *rows)), encoding="utf-8")
    notes = read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes
    said = "x.csv says other splits than the folders (test, not train, of train/cat/1.png; 4 of 8 images), which count"
    assert any(note.startswith(said) for note in notes)


def test_a_file_of_names_is_no_table_that_is_not_used(tmp_path: Path):
    write_images(tmp_path, [f"{c}/{i}.png" for c in range(3) for i in range(3)])
    (tmp_path / "cat_to_name.json").write_text('{"0": "owl", "1": "emu", "2": "jay"}', encoding="utf-8")
    notes = read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes
    assert notes == ("cat_to_name.json names the classes: 0 is owl, 1 is emu, 2 is jay",)


def test_classes_that_a_run_does_not_have_are_left_out(tmp_path: Path):
    write_images(tmp_path, [f"{c}/{i}.png" for c in ("ant", "cat", "dog") for i in range(6)])
    rows = [f"{c}/{i}.png,p{i // 2}" for c in ("ant", "cat", "dog") for i in range(6)]
    (tmp_path / "meta.csv").write_text("\n".join(("file,patient", *rows)), encoding="utf-8")
    opened = read_dataset(tmp_path, seed=0, val_fraction=0.5, class_order=("dog", "cat"))
    assert opened.info.classes == ("dog", "cat")
    assert [str(one) for one in opened.info.left_out] == [
        "6 images of all images: of classes that the run does not have (ant)"
    ]
    (tmp_path / "ant").rename(tmp_path.parent / "ant")
    before = read_dataset(tmp_path, seed=0, val_fraction=0.5, class_order=("dog", "cat"))
    for split, dataset in opened.datasets.items():
        same = before.datasets[split]
        assert [*map(dataset.name, range(len(dataset)))] == [*map(same.name, range(len(same)))]
        assert {dataset.classes[dataset.label(i)] for i in range(len(dataset))} == {"cat", "dog"}


def test_lists_in_cells_and_columns_without_a_name_are_read(tmp_path: Path):
    write_images(tmp_path, [f"{i}.png" for i in range(4)])
    rows = [
        {"file": f"{i}.png", "label": "ab"[i % 2], "parts": ["x/y", "z/w"], "folder": ["a", "b/c"]} for i in range(4)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert read_dataset(tmp_path, seed=0, val_fraction=0.5).info.classes == ("a", "b")
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.csv").write_text("file,,class_id\n0.png,u,cat\n1.png,u,dog\n2.png,u,owl\n", encoding="utf-8")
    with pytest.raises(BadData, match=r"line 2: the index is 'cat', expected a number"):
        read_dataset(tmp_path, seed=0, val_fraction=0.5)
