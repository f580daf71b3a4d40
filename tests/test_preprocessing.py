"""Preprocessing to the pixel: sizes, corners, numbers, and values that cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from image_fixtures import noise, photos
from onefold.data import (
    Augment,
    CachedDataset,
    CentreCrop,
    ImageFiles,
    ImageLoader,
    Preprocessing,
    RandomResizedCrop,
    Resize,
)
from onefold.data.crop import CropBox
from onefold.data.decode import decode_image, read_samples
from onefold.data.preprocessing import IMAGENET_PREPROCESSING, ValueRange
from onefold.data.value_range import describe_range_mismatch, measure_value_range
from onefold.errors import BadArgument, BadData
from test_decode import png


@pytest.mark.parametrize(
    ("size", "width", "height", "crop_pct", "resized", "corner"),
    [
        (224, 500, 375, 0.875, (341, 256), (58, 16)),  # 256 * 500 / 375 = 341.3; (341 - 224) / 2 = 58.5, halves to even
        (224, 375, 500, 0.875, (256, 341), (16, 58)),
        (224, 259, 256, 0.875, (259, 256), (18, 16)),  # not resized; 17.5 to even
        (160, 640, 427, 0.875, (274, 183), (57, 12)),  # round(182.86); 274.28; 11.5 to even
        (32, 8, 8, 1.0, (32, 32), (0, 0)),
    ],
)
def test_the_crop_is_where_the_conventions_put_it(
    size: int, width: int, height: int, crop_pct: float, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = noise(height, width)
    left, top = corner
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    cropped = Preprocessing(size=size, crop_pct=crop_pct).crop(image)
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(expected))


def test_the_numbers_are_scaled_and_in_planes() -> None:
    pixel = Image.new("RGB", (1, 1), (0, 128, 255))
    value = Preprocessing(size=1, crop_pct=1.0)(pixel)
    assert value.dtype == np.float32
    assert value.shape == (3, 1, 1)
    assert value.flags.c_contiguous
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    np.testing.assert_allclose(value[:, 0, 0], expected, rtol=1e-7)
    image = noise(9, 7)
    planes = IMAGENET_PREPROCESSING.normalise(image)
    direct = (np.asarray(image, np.float64) / 255 - IMAGENET_PREPROCESSING.mean) / IMAGENET_PREPROCESSING.std
    np.testing.assert_allclose(planes, direct.transpose(2, 0, 1), rtol=1e-6, atol=1e-7)


def test_one_channel_is_grey() -> None:
    grey = Preprocessing(size=8, crop_pct=1.0, channels=1, mean=(0.5,), std=(0.5,))
    value = grey(Image.new("RGB", (20, 10), (255, 255, 255)))
    np.testing.assert_array_equal(value, np.ones((1, 8, 8), np.float32))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("sides", [(1, 3_000_000), (3_000_000, 1), (1, 1), (2, 3)])
def test_odd_shapes_give_an_input_in_bounded_memory(sides: tuple[int, int]) -> None:
    assert IMAGENET_PREPROCESSING(Image.new("RGB", sides, (255, 0, 0))).shape == (3, 224, 224)


def test_preprocessing_goes_through_json_and_refuses_what_cannot_be() -> None:
    value = Preprocessing(size=160, crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")
    assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    assert Preprocessing.from_dict({}) == IMAGENET_PREPROCESSING
    for bad in (
        {"size": 0},
        {"size": 224.0},
        {"crop_pct": 0.0},
        {"crop_pct": 1.5},
        {"mean": [0.5]},
        {"std": [0.1, 0.0, 0.1]},
        {"std": [0.1, float("nan"), 0.1]},
        {"interpolation": "lanczos"},
        {"channels": 1},
        {"mena": [0.5, 0.5, 0.5]},
    ):
        with pytest.raises(BadArgument, match="preprocessing"):
            Preprocessing.from_dict(bad)


# ------------------------------------------------------------------------------- more than 8 bits a sample


def deep_files(folder: Path, low: float, high: float, suffix: str = ".png", dtype: str = "uint16") -> ImageFiles:
    """Six images whose samples fill low to high between them."""
    names = [f"{i}{suffix}" for i in range(6)]
    for i, name in enumerate(names):
        samples = np.linspace(low, high, 48 * 6).reshape(6, 6, 8)[i].astype(dtype)
        Image.fromarray(samples).save(folder / name)
    return ImageFiles(folder, names, [0] * 6, ("a",))


@pytest.mark.parametrize(
    ("low", "high", "value_range"),
    [
        (0, 200, (0, 255)),
        (0, 1000, (0, 1023)),
        (0, 1023, (0, 1023)),
        (90, 4000, (0, 4095)),
        (0, 16000, (0, 16383)),
        (0, 65535, (0, 65535)),
        (5000, 60000, (0, 65535)),
        (7000, 8500, (6850, 8650)),  # thermal: degrees around a room's
        (60000, 65535, (59446, 65535)),
        (20, 40, (18, 42)),
        (3000, 3000, (2999, 3001)),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_range_of_deep_samples_is_that_of_the_set(
    tmp_path: Path, low: int, high: int, value_range: ValueRange, suffix: str
) -> None:
    measured = measure_value_range(deep_files(tmp_path, low, high, suffix))
    assert measured is not None
    assert (measured.value_range, measured.is_float) == (value_range, False)
    assert f"{value_range[1]:g} as white" in measured.sentence
    assert measured.is_full_range == (value_range == (0, 65535))


@pytest.mark.parametrize(
    ("low", "high", "dtype", "value_range"),
    [
        (0.0, 1.0, "float32", (0, 1)),
        (0.0, 255.0, "float32", (0, 255)),
        (20.0, 40.0, "float32", (18, 42)),  # degrees
        (-1000.0, 1000.0, "float32", (-1200, 1200)),
        (-1000, 3000, "int32", (-1400, 3400)),
    ],
)
def test_floats_and_signed_samples_get_a_range_too(
    tmp_path: Path, low: float, high: float, dtype: str, value_range: ValueRange
) -> None:
    images = deep_files(tmp_path, low, high, ".tif", dtype)
    with pytest.raises(BadData, match="range is not known"):
        images.image(0)
    measured = measure_value_range(images)
    assert measured is not None
    assert measured.is_float
    assert measured.value_range == pytest.approx(value_range)
    greys = np.concatenate([np.asarray(images.image(i, value_range=measured.value_range))[..., 0] for i in range(6)])
    assert (np.diff(greys.ravel().astype(int)) >= 0).all()  # levels are kept, over the whole set
    assert len(np.unique(greys)) > 150


def test_eight_bits_have_no_range_and_a_dead_pixel_does_not_count(tmp_path: Path) -> None:
    assert measure_value_range(photos(tmp_path / "8 bits", 4)) is None
    samples = np.full((100, 100), 7000, np.uint16)
    samples[:50] = 8000
    samples[3, 3], samples[7, 7] = 0, 65535
    Image.fromarray(samples).save(tmp_path / "0.png")
    measured = measure_value_range(ImageFiles(tmp_path, ["0.png"], [0], ("a",)))
    assert measured is not None
    assert measured.value_range == (6900, 8100)


def test_samples_of_more_than_8_bits_under_a_jpegs_name_are_measured_too(tmp_path: Path) -> None:
    deep_files(tmp_path, 90, 4000)
    for path in tmp_path.glob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    measured = measure_value_range(ImageFiles(tmp_path, [f"{i}.jpg" for i in range(6)], [0] * 6, ("a",)))
    assert measured is not None
    assert measured.value_range == (0, 4095)


def test_one_value_is_one_grey_in_every_file_and_way_of_reading(tmp_path: Path) -> None:
    images = deep_files(tmp_path, 0, 4095)
    preprocessing = Preprocessing(size=4, crop_pct=1.0, value_range=(0, 4095))
    for i in range(6):
        stored = np.asarray(Image.open(tmp_path / images.names[i])).astype(float)
        greys = np.asarray(images.image(i, value_range=(0, 4095)))
        np.testing.assert_array_equal(greys, np.repeat(np.rint(stored * 255 / 4095)[..., None], 3, axis=-1))
        box = CropBox(size=6, place=lambda sides: (0, 0, 6, 6), value_range=(0, 4095))
        for cut in (images.crop(i, box), CachedDataset(images).crop(i, box)):
            np.testing.assert_array_equal(cut.resized(), greys[:, :6])
    augment = Augment(steps=(RandomResizedCrop(size=4, scale=(1.0, 1.0)),), preprocessing=preprocessing)
    for transform in (
        preprocessing,
        augment,
        Augment(steps=(Resize(size=4), CentreCrop(size=4)), preprocessing=preprocessing),
    ):
        batch, _ = next(ImageLoader(images, transform, batch_size=6).epoch(0))
        assert batch.max() - batch.min() > 3.5  # of 4.4 from black to white; unscaled it would be 0.3


def test_sixteen_bit_colours_are_scaled_with_both_their_bytes() -> None:
    levels = np.array([0, 1, 100, 2048, 4094, 4095])
    for colour, channels in ((2, 3), (6, 4), (4, 2)):  # RGB, RGBA, grey with alpha
        samples = np.repeat(levels, channels).astype(">u2").reshape(6, channels)
        if channels != 3:
            samples[:, -1] = 65535
        row = samples.view(np.uint8).reshape(6, 2 * channels)
        row[1:] -= row[:-1].copy()  # PNG's filter 1: each byte less that of the pixel before
        data = png(6, 1, b"\1" + row.tobytes(), depth=16, colour=colour)
        read = read_samples(data)
        assert read is not None
        np.testing.assert_array_equal(read.reshape(6, -1), np.repeat(levels, read.size // 6).reshape(6, -1))
        greys = np.rint(levels * 255 / 4095).astype(int)
        seen = np.asarray(decode_image(data, value_range=(0, 4095))).astype(int)
        np.testing.assert_array_equal(seen, np.repeat(greys, 3).reshape(1, 6, 3))


def test_a_network_says_where_it_would_see_deep_samples_nearly_uniform(tmp_path: Path) -> None:
    images = deep_files(tmp_path, 7000, 8500)
    assert "this network takes 0 as black and 65535 as white" in (describe_range_mismatch(images, None) or "")
    assert "takes 0 as black and 4095 as white" in (describe_range_mismatch(images, (0, 4095)) or "")
    assert describe_range_mismatch(images, (6850, 8650)) is None
    assert describe_range_mismatch(images, (7200, 8800)) is None
    assert describe_range_mismatch(photos(tmp_path / "8 bits", 4), (6850, 8650)) is None


def test_a_picture_of_16_bits_is_mapped_by_the_value_range_when_it_is_prepared() -> None:
    samples = np.full((8, 8), 1000, np.uint16)
    deep, eight = Image.fromarray(samples), Image.new("RGB", (8, 8), (62,) * 3)  # 1000 of 4095 is 62 of 255
    for channels in (1, 3):
        values = {"size": 4, "channels": channels, "mean": (0.4,) * channels, "std": (0.2,) * channels}
        ranged = Preprocessing(**values, value_range=(0, 4095))
        assert np.array_equal(ranged(deep), ranged(eight))
        assert np.array_equal(Preprocessing(**values)(deep), ranged(Image.new("RGB", (8, 8), (4,) * 3)))
        with pytest.raises(BadArgument, match="range is not known"):
            Preprocessing(**values)(Image.fromarray(samples.astype(np.float32)))


def test_a_value_range_is_kept_where_there_is_one() -> None:
    assert "value_range" not in Preprocessing().to_dict()
    deep = Preprocessing(value_range=(0, 4095))
    assert Preprocessing.from_dict(json.loads(json.dumps(deep.to_dict()))) == deep
    for wrong in ((5, 5), (6, 5), (0, math.inf), (0, math.nan)):
        with pytest.raises(BadArgument, match="value_range"):
            Preprocessing(value_range=wrong)
