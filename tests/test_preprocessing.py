"""Preprocessing to the pixel: sizes, corners, numbers, and values that cannot be."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from onefold.data import Preprocessing
from onefold.data.preprocessing import IMAGENET
from onefold.errors import BadArgument
from pictures import noise


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
    planes = IMAGENET.normalise(image)
    direct = (np.asarray(image, np.float64) / 255 - IMAGENET.mean) / IMAGENET.std
    np.testing.assert_allclose(planes, direct.transpose(2, 0, 1), rtol=1e-6, atol=1e-7)


def test_one_channel_is_grey() -> None:
    grey = Preprocessing(size=8, crop_pct=1.0, channels=1, mean=(0.5,), std=(0.5,))
    value = grey(Image.new("RGB", (20, 10), (255, 255, 255)))
    np.testing.assert_array_equal(value, np.ones((1, 8, 8), np.float32))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("sides", [(1, 3_000_000), (3_000_000, 1), (1, 1), (2, 3)])
def test_odd_shapes_give_an_input_in_bounded_memory(sides: tuple[int, int]) -> None:
    assert IMAGENET(Image.new("RGB", sides, (255, 0, 0))).shape == (3, 224, 224)


def test_preprocessing_goes_through_json_and_refuses_what_cannot_be() -> None:
    value = Preprocessing(size=160, crop_pct=0.9, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic")
    assert Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    assert Preprocessing.from_dict({}) == IMAGENET
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
