"""Tables of pixels: each picture has the numbers of its row, and the reader's classes and splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onefold.data import open_dataset, read_dataset


def write(file: Path, header: str, rows: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join((header, *rows)), encoding="utf-8")


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_have_the_numbers_of_their_rows(tmp_path: Path, channels: int):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5 * 5 * channels))
    usages = ["Training"] * 4 + ["PublicTest"] * 2
    rows = [f"{'ab'[i % 2]},{' '.join(map(str, each))},{usages[i]}" for i, each in enumerate(pixels)]
    write(tmp_path / "x.csv", "emotion,pixels,Usage", rows)
    for split, numbers in (("train", [0, 1, 2, 3]), ("val", [4, 5])):
        for place in (tmp_path, tmp_path / "x.csv"):
            dataset = open_dataset(place, split, seed=0, val_fraction=0.5)
            assert dataset.classes == ("a", "b")
            assert [dataset.label(i) for i in range(len(dataset))] == [i % 2 for i in numbers]
            assert [dataset.name(i) for i in range(len(dataset))] == [f"x.csv/{i:07d}" for i in numbers]
            for i, number in enumerate(numbers):
                image = np.asarray(dataset.image(i)).reshape(5, 5, 3)
                expected = np.broadcast_to(pixels[number].reshape(5, 5, channels), (5, 5, 3))
                assert (image == expected).all()
            assert dataset.digest(0) != dataset.digest(1)
            assert dataset.num_bytes(0) == 25 * channels


def test_a_column_a_pixel_with_other_separators_and_quotes(tmp_path: Path):
    header = ";".join(("label", *(f'"pixel{i}"' for i in range(16))))
    write(tmp_path / "train.csv", header, [";".join((str(i % 2), *(str(i + k) for k in range(16)))) for i in range(4)])
    dataset = read_dataset(tmp_path, seed=0, val_fraction=0).open("train")
    assert [np.asarray(dataset.image(i))[0, 0, 0] for i in range(4)] == [0, 1, 2, 3]
    assert np.asarray(dataset.image(0))[:, :, 1].tolist() == np.arange(16).reshape(4, 4).tolist()


def test_numbers_in_several_forms_are_one_class(tmp_path: Path):
    write(tmp_path / "x.csv", "label,pixels", ["0,1 2 3 4", "0.0,1 2 3 5", "1,1 2 3 6", "1.0,1 2 3 7"])
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert info.classes == ("0", "1")
    assert [split.images_per_class for split in info.splits] == [(1, 1), (1, 1)]
