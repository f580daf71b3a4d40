"""Thumbnails are left out; copies of one photo, and photos of one thing, are on one side of a split that is made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from image_fixtures import write_images
from onefold.data import read_dataset
from onefold.data.photo_copies import called_as_groups, find_group_column, find_thumbnails, group_by_photo
from onefold.data.splits import split_by_seed
from onefold.errors import BadData


@pytest.mark.parametrize(
    ("names", "thumbnails"),
    [
        (["a/x.jpg", "a/thumb_x.jpg"], ["a/thumb_x.jpg"]),
        (["a/x.png", "a/X_Thumb.jpg"], ["a/X_Thumb.jpg"]),
        (["a/x.jpg", "b/thumb_x.jpg"], []),
        (["a/x.jpg", "a/x-150x150.jpg", "a/x-scaled.jpg"], ["a/x-150x150.jpg", "a/x-scaled.jpg"]),
        (["a/x-150x150.jpg", "a/x-scaled.jpg"], ["a/x-150x150.jpg"]),
        (["a/wall-150x150.jpg", "a/roof-150x150.jpg"], []),
        (["a/x.jpg", "a/thumbs/x.jpg"], ["a/thumbs/x.jpg"]),
        (["photos/a/x.jpg", "thumbnails/a/x_thumb.jpg"], ["thumbnails/a/x_thumb.jpg"]),
        (["thumb/a.jpg", "index/b.jpg"], []),  # fingers
        (["a/thumbtack.jpg", "a/tack.jpg"], []),
    ],
)
def test_thumbnails_are_known_beside_their_photos(names: list[str], thumbnails: list[str]):
    assert find_thumbnails(names) == thumbnails


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (["a_jpg.rf.1f0c9d.jpg", "a_jpg.rf.2f0c9d.jpg", "b_jpg.rf.3f0c9d.jpg"], [2]),
        (["leaf.JPG", "leaf_90deg.JPG", "leaf_new30degFlipLR.JPG", "tree.JPG"], [3]),
        (["a_aug1.png", "a_aug2.png", "b_aug1.png", "b_aug2.png"], [2, 2]),
        (["a_orig.png", "a_aug_0.png", "a_aug_1.png", "b_orig.png", "c.png"], [3]),
        (["IMG_1234.jpg", "IMG_E1234.jpg", "IMG_1235.jpg"], [2]),
        (["a.jpg", "a (1).jpg", "a - Copy.jpg", "b.jpg"], [3]),
        (["PXL_1.jpg", "PXL_1-edited.jpg", "PXL_2.jpg", "PXL_2~2.jpg"], [2, 2]),
        (["IMG_1.heic", "IMG_1.jpg", "IMG_2.jpg", "IMG_3.png", "IMG_3.jpg"], [2]),
        (["1IMG_1_BURST20200101120000_COVER.jpg", "2IMG_2_BURST20200101120000.jpg", "IMG_3.jpg"], [2]),
        (["film1_frame_1.jpg", "film1_frame_2.jpg", "film2-frame1.jpg", "film2-frame2.jpg"], [2, 2]),
        (["c/small/a.jpg", "c/large/a.jpg", "c/large/b.jpg"], [2]),
        (["c/original/a.jpg", "c/augmented/a_flip.jpg", "c/augmented/a_rot90.jpg", "c/original/b.jpg"], [3]),
        (["c/a.jpg", "c/a.png", "c/b.jpg"], []),
        (["frame_1.jpg", "frame_2.jpg", "frame_3.jpg"], []),
        (["cat (1).jpg", "cat (2).jpg", "cat (3).jpg"], []),
        (["cat.jpg", "cat (1).jpg", "cat (2).jpg", "cat (3).jpg", "cat (4).jpg"], []),
        (["img_1.jpg", "img_2.jpg", "img_3.jpg"], []),
        (["scan_crop_1.jpg", "scan_crop_2.jpg", "scan_crop_3.jpg"], []),  # a whole class
    ],
)
def test_copies_of_one_photo_are_known_by_their_names(names: list[str], sizes: list[int]):
    groups = Counter(group_by_photo(names, [0] * len(names)))
    assert sorted(count for group, count in groups.items() if group) == sizes


def test_sizes_as_classes_hold_different_photos():
    assert group_by_photo(["small/1.jpg", "small/2.jpg", "large/1.jpg", "large/2.jpg"], [0, 0, 1, 1]) == [""] * 4


@given(st.data())
def test_groups_are_on_one_side(data: st.DataObject):
    groups = data.draw(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=2, max_size=40))
    labels = [data.draw(st.integers(0, 2)) for _ in groups]
    names = [f"{i}.jpg" for i in range(len(groups))]
    fraction = data.draw(st.sampled_from([0.1, 0.25, 0.5, 0.9]))
    sides = split_by_seed(names, labels, 3, fraction, groups)
    assert sorted([*sides["train"], *sides["val"]]) == [*range(len(names))]
    assert {groups[i] for i in sides["train"]} & {groups[i] for i in sides["val"]} <= {""}
    assert {labels[i] for i in sides["val"]} <= {labels[i] for i in sides["train"]}


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([0.0, 0.1, 0.25, 0.9, 1.0]))
def test_groups_of_one_image_are_none(labels: list[int], fraction: float):
    names = [f"{i}.jpg" for i in range(len(labels))]
    assert split_by_seed(names, labels, 7, fraction, names) == split_by_seed(names, labels, 7, fraction)


def test_a_column_says_of_what_thing_a_photo_is():
    cells = {
        "image": ["1", "2", "3", "4"],
        "lesion_id": ["a", "a", "b", "c"],
        "patient": ["p", "p", "q", "q"],
        "age": ["5", "5", "6", "6"],
        "plant": ["x", "x", "y", "y"],
    }
    things = {name: cells[name] for name in called_as_groups(cells)}
    assert [*things] == ["lesion_id", "patient"]  # plant: kinds of plants
    called = ["StudyInstanceUID", "seq_id", "video_name", "observation_id", "plant_name", "group", "", "7"]
    assert called_as_groups(called) == called[:4]
    assert find_group_column(things, ["n", "m", "n", "m"]) == "patient"
    assert find_group_column({"lesion_id": cells["lesion_id"]}, ["n", "m", "n", "m"]) == "lesion_id"
    assert find_group_column({"patient": ["p", "q", "", ""]}, ["n", "m", "n", "m"]) is None  # none recurs
    of_more = {"lesion_id": ["a", "b", "b", "a", "c"], "patient": ["p", "p", "q", "q", "q"]}
    assert find_group_column(of_more, ["n", "n", "m", "m", "m"]) == "lesion_id"  # n is of p alone


def test_a_class_of_heic_photos_that_are_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onefold.data.decode._heif_opener", lambda: None)
    write_images(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)])
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "1.HEIC").write_bytes(b"x")
    with pytest.raises(BadData, match=r"owl/ holds 1 \.heic files and no image that is read: HEIC photos, which pip"):
        read_dataset(tmp_path, seed=0, val_fraction=0.5)
    (tmp_path / "owl").rename(tmp_path / "cat" / "more")
    assert [str(one)[:12] for one in read_dataset(tmp_path, seed=0, val_fraction=0.5).info.left_out] == ["1 .heic file"]


def test_versions_of_one_photo_on_both_sides_are_told(tmp_path: Path):
    names = [f"train/{c}/{i}_jpg.rf.{i}1f0c9d.jpg" for c in "ab" for i in range(3)]
    write_images(tmp_path, [*names, "valid/a/1_jpg.rf.2e2e2e.jpg", "valid/b/7_jpg.rf.1e1e1e.jpg"])
    said = "1 images of valid/ are called as versions of photos in train/ (1_jpg): then the score flatters"
    assert said in read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes


def lesions(place: Path, header: str, rows: list[str]) -> Path:
    write_images(place, [f"{row.split(',')[1]}.png" for row in rows])
    (place / "x.csv").write_text("\n".join((header, *rows)), encoding="utf-8")
    return place


def test_photos_of_one_lesion_are_on_one_side_and_it_is_said(tmp_path: Path):
    rows = [f"L{i // 3},i{i},{'nv' if i // 3 % 2 else 'bkl'}" for i in range(36)]
    splits = read_dataset(lesions(tmp_path, "lesion_id,image_id,dx", rows), seed=1, val_fraction=0.25)
    sides = {
        split: {int(dataset.name(i)[1:-4]) // 3 for i in range(len(dataset))}
        for split, dataset in splits.datasets.items()
    }
    assert not sides["train"] & sides["val"]
    assert len(sides["val"]) == 2
    assert (
        "the 36 images of x.csv are of 12 of the column lesion_id: val has all images of one, or none"
        in splits.info.notes
    )


def test_patients_on_both_sides_of_splits_that_are_given_are_told(tmp_path: Path):
    rows = [f"p{i % 5},i{i},{'yes' if i % 2 else 'no'},{'val' if i > 7 else 'train'}" for i in range(10)]
    info = read_dataset(lesions(tmp_path, "patient_id,image,label,split", rows), seed=1, val_fraction=0.25).info
    assert any(
        note.startswith("2 of the 2 patient_id of x.csv (its column says val) are in x.csv") for note in info.notes
    )


def test_lesions_that_a_table_beside_the_one_of_classes_says(tmp_path: Path):
    rows = [f"L{i // 3},i{i},{'nv' if i // 3 % 2 else 'bkl'}" for i in range(36)]
    lesions(tmp_path, "lesion_id,image_id,dx", rows)
    classes = [f"{row.split(',')[1]},{row.split(',')[2]}" for row in rows]
    (tmp_path / "truth.csv").write_text("\n".join(("image,label", *classes)), encoding="utf-8")
    (tmp_path / "x.csv").write_text("\n".join(("image,lesion_id", *(f"i{i},L{i // 3}" for i in range(36)))))
    splits = read_dataset(tmp_path, seed=1, val_fraction=0.25)
    sides = [{int(dataset.name(i)[1:-4]) // 3 for i in range(len(dataset))} for dataset in splits.datasets.values()]
    assert not sides[0] & sides[1]
    assert "x.csv says the lesion_id of each image" in splits.info.notes
    assert not splits.info.left_out


def test_a_patient_with_one_photo_in_each_split_is_on_both_sides(tmp_path: Path):
    write_images(tmp_path, [f"{i}.png" for i in range(1, 7)])
    (tmp_path / "train.csv").write_text("image,label,patient_id\n1,cat,p0\n2,cat,p1\n3,dog,p2\n4,dog,NaN\n")
    (tmp_path / "val.csv").write_text("image,label,patient_id\n5,cat,p0\n6,dog,NaN\n")
    said = "1 of the 1 patient_id of val.csv are in train.csv too (p0): photos of one thing are on both sides"
    assert any(note.startswith(said) for note in read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes)


@pytest.mark.parametrize("header", ["image,label,patient_id", "image,age,patient_id", "image,patient_id"])
@pytest.mark.parametrize("is_partial", [False, True])
def test_a_table_says_the_patients_of_class_folders(tmp_path: Path, header: str, is_partial: bool):
    write_images(tmp_path / "images", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(8)])
    rows = [
        f"{c}/{i}.png,{'7,' if ',age' in header else f'{c},' if 'label' in header else ''}p{i // 2}"
        for c in ("cat", "dog")
        for i in range(6 if is_partial else 8)
    ]
    (tmp_path / "meta.csv").write_text("\n".join((header, *rows)))
    splits = read_dataset(tmp_path, seed=1, val_fraction=0.5)
    which = "12 of the 16 images" if is_partial else "each image"
    assert f"meta.csv says the patient_id of {which}" in splits.info.notes
    assert splits.info.container == "class folders"
    assert not splits.info.left_out
    sides = [
        {int(dataset.name(i)[-5]) // 2 for i in range(len(dataset))} - ({3} if is_partial else set())
        for dataset in splits.datasets.values()
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_patients_in_split_folders_are_told(tmp_path: Path):
    write_images(tmp_path, [f"{s}/{c}/{i}.png" for s in ("train", "val") for c in ("cat", "dog") for i in range(2)])
    rows = [f"{s}/{c}/{i}.png,p{i}" for s in ("train", "val") for c in ("cat", "dog") for i in range(2)]
    (tmp_path / "meta.csv").write_text("\n".join(("file,patient", *rows)))
    notes = read_dataset(tmp_path, seed=1, val_fraction=0.5).info.notes
    assert any(note.startswith("2 of the 2 patient of val/ are in train/ too (p0)") for note in notes)


def test_lists_of_splits_keep_the_patients_of_their_table(tmp_path: Path):
    write_images(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "labels.csv").write_text(
        "\n".join(("file,label,patient", *(f"{i}.png,c{i % 2},p{i % 3}" for i in range(6))))
    )
    (tmp_path / "train.txt").write_text("0.png\n1.png\n2.png\n3.png\n")
    (tmp_path / "val.txt").write_text("4.png\n5.png\n")
    notes = read_dataset(tmp_path, seed=1, val_fraction=0.5).info.notes
    assert any(note.startswith("2 of the 2 patient of val.txt are in train.txt too (p1)") for note in notes)
