"""The operations of AutoAugment and RandAugment against numpy and timm, and the policies that draw them."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from image_fixtures import picture, pixels
from onefold.data import AutoAugment, RandAugment
from onefold.data.autoaugment import (
    IMAGENET_POLICY,
    OPERATIONS,
    OPERATIONS_WITHOUT_LEVEL,
    apply_operation,
    level_to_argument,
)
from onefold.data.sampler import sample_generator

GREY = (128, 128, 128)


# ------------------------------------------------------------------- operations, written again in numpy


def equalized(x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each value becomes the share of pixels below it, in steps of (count - last bin) // 255."""
    out = np.empty_like(x)
    for c in range(3):
        histogram = np.bincount(x[:, :, c].ravel(), minlength=256)
        used = histogram[histogram > 0]
        step = (used.sum() - used[-1]) // 255
        table = (step // 2 + np.concatenate(([0], np.cumsum(histogram)[:-1]))) // max(step, 1)
        out[:, :, c] = np.minimum(table, 255)[x[:, :, c]]
    return out


def stretched(x: NDArray[np.int64]) -> NDArray[np.int64]:
    low, high = x.min((0, 1)), x.max((0, 1))
    return np.clip(np.floor((x - low) * (255.0 / (high - low)) + 1e-9), 0, 255).astype(np.int64)


def luma(x: NDArray[np.int64]) -> NDArray[np.int64]:
    return (x @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


def blended(towards: NDArray[np.int64], x: NDArray[np.int64], factor: float) -> NDArray[np.float64]:
    return np.clip(towards + factor * (x - towards), 0, 255)


EXACT: dict[str, tuple[float, Callable[[NDArray[np.int64]], NDArray[np.int64]]]] = {
    "invert": (0.0, lambda x: 255 - x),
    "equalize": (0.0, equalized),
    "posterize": (3, lambda x: x // 32 * 32),
    "solarize": (100, lambda x: np.where(x < 100, x, 255 - x)),
    "solarize_add": (60, lambda x: np.where(x < 128, np.minimum(x + 60, 255), x)),
}
NEAR: dict[str, Callable[[NDArray[np.int64]], NDArray[np.float64]]] = {  # Pillow rounds or floors: one step of 255
    "autocontrast": lambda x: stretched(x).astype(float),
    "brightness": lambda x: blended(np.zeros_like(x), x, 1.7),
    "contrast": lambda x: blended(np.full_like(x, int(luma(x).mean() + 0.5)), x, 1.7),
    "color": lambda x: blended(np.repeat(luma(x)[:, :, None], 3, 2), x, 1.7),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_operation_that_looks_up_is_exact(name: str) -> None:
    value, derived = EXACT[name]
    image = picture()
    done = pixels(apply_operation(name, image, value, GREY, "bilinear"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(done, derived(pixels(image)))


@pytest.mark.parametrize("name", NEAR)
def test_an_operation_that_blends_is_exact_to_the_rounding(name: str) -> None:
    image = picture()
    done = pixels(apply_operation(name, image, 1.7, GREY, "bilinear"))  # type: ignore[arg-type]
    assert np.abs(done - NEAR[name](pixels(image))).max() <= 1


def test_sharpness_blends_with_a_smoothed_picture() -> None:
    image = picture()
    x = pixels(image)
    inner = sum(x[1 + dy : x.shape[0] - 1 + dy, 1 + dx : x.shape[1] - 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    smooth = x.astype(float)
    smooth[1:-1, 1:-1] = (inner + 4 * x[1:-1, 1:-1]) / 13
    done = pixels(apply_operation("sharpness", image, 1.7, GREY, "bilinear"))
    assert np.abs(done - np.clip(smooth + 1.7 * (x - smooth), 0, 255)).max() <= 2


def sampled(x: NDArray[np.int64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bilinear at the places that the matrix gives for the middles of the pixels; grey outside."""
    height, width, _ = x.shape
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    across = matrix[0, 0] * u + matrix[0, 1] * v + matrix[0, 2]
    along = matrix[1, 0] * u + matrix[1, 1] * v + matrix[1, 2]
    inside = (across >= 0) & (across < width) & (along >= 0) & (along < height)
    px, py = np.clip(across - 0.5, 0, width - 1), np.clip(along - 0.5, 0, height - 1)
    left, top = np.floor(px).astype(int), np.floor(py).astype(int)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    fx, fy = (px - left)[..., None], (py - top)[..., None]
    upper = x[top, left] * (1 - fx) + x[top, right] * fx
    lower = x[bottom, left] * (1 - fx) + x[bottom, right] * fx
    done: NDArray[np.float64] = np.where(inside[..., None], upper * (1 - fy) + lower * fy, 128.0)
    return done


def test_geometry_is_sampled_where_it_should_be() -> None:
    image = picture()
    w, h, t = image.width, image.height, math.radians(20.0)
    turn = np.array([[math.cos(t), -math.sin(t), 0], [math.sin(t), math.cos(t), 0]])
    turn[:, 2] = np.array([w / 2, h / 2]) - turn[:, :2] @ [w / 2, h / 2]
    maps = {
        ("rotate", 20.0): turn,
        ("shear_x", 0.3): np.array([[1, 0.3, 0], [0, 1, 0]]),
        ("shear_y", -0.2): np.array([[1, 0, 0], [-0.2, 1, 0]]),
        ("translate_x", 0.1): np.array([[1, 0, 0.1 * w], [0, 1, 0]]),
        ("translate_y", -0.4): np.array([[1, 0, 0], [0, 1, -0.4 * h]]),
    }
    for (name, value), matrix in maps.items():
        done = pixels(apply_operation(name, image, value, GREY, "bilinear"))  # type: ignore[arg-type]
        differences = np.abs(done - sampled(pixels(image), matrix)).max(2)
        assert (differences <= 1.0).mean() > 0.99, name  # but for pixels on the very border


def test_every_operation_takes_grey_pictures_and_leaves_its_argument() -> None:
    for image in (picture().convert("L"), picture()):
        before = pixels(image)
        for name in OPERATIONS:
            value = level_to_argument(name, 0.9, "increasing", np.random.default_rng(0))
            done = apply_operation(name, image, value, GREY, "bilinear")
            assert (done.mode, done.size) == (image.mode, image.size)
        np.testing.assert_array_equal(pixels(image), before)


# -------------------------------------------------------------------------------- levels and policies


@pytest.mark.usefixtures("timm")
def test_levels_mean_what_timm_reads() -> None:
    timm = importlib.import_module("timm.data.auto_augment")
    theirs = {"rotate": "Rotate", "solarize_add": "SolarizeAdd", "shear_x": "ShearX", "shear_y": "ShearY"}
    theirs |= {"translate_x": "TranslateXRel", "translate_y": "TranslateYRel"}
    scaled = ("posterize", "solarize", "color", "contrast", "brightness", "sharpness")
    for reading, ending in (("efficientnet", ""), ("increasing", "Increasing")):
        names = {**theirs, **{name: name.capitalize() + ending for name in scaled}}
        for name, level in [(name, level) for name in names for level in (0.0, 1.3, 5.0, 8.99, 10.0)]:
            both = set()
            for seed in range(20):
                random.seed(seed)
                both.add(float(timm.LEVEL_TO_ARG[names[name]](level, {})[0]))
            ours = {level_to_argument(name, level / 10, reading, np.random.default_rng(s)) for s in range(20)}  # type: ignore[arg-type]
            assert sorted(map(float, ours)) == pytest.approx(sorted(both)), (name, level, reading)


@pytest.mark.usefixtures("timm")
def test_the_policy_is_the_papers() -> None:
    timm = importlib.import_module("timm.data.auto_augment")
    names = {"PosterizeOriginal": "posterize", "AutoContrast": "autocontrast", "ShearX": "shear_x"}
    expected = [
        tuple((names.get(op.name, op.name.lower()), op.prob, op.magnitude) for op in pair)
        for pair in timm.auto_augment_policy_original({"translate_const": 100})
    ]
    expected = [tuple((n.replace("increasing", ""), p, level) for n, p, level in pair) for pair in expected]
    assert list(IMAGENET_POLICY) == expected


def test_levels_of_autoaugment_cover_the_papers_ranges() -> None:
    def ends(name: str) -> list[float]:
        drawn = [
            level_to_argument(name, level, "autoaugment", np.random.default_rng(s))
            for level in (0, 1)
            for s in range(9)
        ]  # type: ignore[arg-type]
        return [min(drawn), max(drawn)]

    assert ends("rotate") == [-30, 30]
    assert ends("shear_x") == [-0.3, 0.3]
    assert ends("posterize") == [4, 8]
    assert ends("solarize") == [0, 255]
    assert ends("color") == pytest.approx([0.1, 1.9])


def test_without_strength_nothing_happens() -> None:
    image = picture()
    for step in (AutoAugment(strength=0.0), RandAugment(num_ops=3, magnitude=10, strength=0.0, reading="increasing")):
        for i in range(60):
            done = pixels(step(image, sample_generator(0, 0, i)))
            # of 4 bits that are still posterized away at level 0, none of AutoAugment's is
            if isinstance(step, AutoAugment):
                np.testing.assert_array_equal(done, pixels(image))


def test_strength_is_how_far_a_picture_moves() -> None:
    image, moved = picture(), []
    for strength in (0.1, 0.4, 0.7, 1.0):
        step = AutoAugment(strength=strength)
        moved.append(
            np.mean([np.abs(pixels(step(image, sample_generator(0, 0, i))) - pixels(image)).mean() for i in range(200)])
        )
    assert moved == sorted(moved)
    assert moved[0] < moved[-1] / 2


def test_randaugment_draws_all_operations_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def note(name: str, image: Image.Image, *_: object) -> Image.Image:
        seen.append(name)
        return image

    monkeypatch.setattr("onefold.data.autoaugment.apply_operation", note)
    step = RandAugment(num_ops=2, magnitude=9, std=0.5, p=0.5)
    for i in range(3000):
        step(picture(side=2), sample_generator(1, 0, i))
    assert len(seen) == pytest.approx(3000, rel=0.05)
    counts = [seen.count(name) for name in OPERATIONS]
    assert min(counts) > 0.7 * 3000 / len(OPERATIONS)
    assert set(OPERATIONS_WITHOUT_LEVEL) < set(OPERATIONS)
