"""Augmentation against independent derivations: numpy for what has numbers, timm for readings and geometry, laws."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from onefold.data import (
    Augment,
    AutoAugment,
    CachedDataset,
    ColorJitter,
    Curriculum,
    HorizontalFlip,
    ImageLoader,
    Mixing,
    MixupLoader,
    Preprocessing,
    ProgressiveAugment,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    Stage,
)
from onefold.data.autoaugment import IMAGENET_POLICY, OPERATIONS, WITHOUT_LEVEL, apply, parameter_of
from onefold.data.crop import Crop, CropBox
from onefold.data.sampler import batch_generator, sample_generator
from onefold.errors import BadArgument
from onefold.train import cross_entropy

Pixels = NDArray[np.uint8]
GREY = (128, 128, 128)


def picture(seed: int = 0, side: int = 37) -> Image.Image:
    """A smooth gradient with noise, so that histograms and neighbourhoods matter."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 220, side * (side + 6)).reshape(side, side + 6, 1)
    return Image.fromarray((ramp + rng.integers(-20, 35, (side, side + 6, 3))).astype(np.uint8))


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


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
    done = pixels(apply(name, image, value, GREY, "bilinear"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(done, derived(pixels(image)))


@pytest.mark.parametrize("name", NEAR)
def test_an_operation_that_blends_is_exact_to_the_rounding(name: str) -> None:
    image = picture()
    done = pixels(apply(name, image, 1.7, GREY, "bilinear"))  # type: ignore[arg-type]
    assert np.abs(done - NEAR[name](pixels(image))).max() <= 1


def test_sharpness_blends_with_a_smoothed_picture() -> None:
    image = picture()
    x = pixels(image)
    inner = sum(x[1 + dy : x.shape[0] - 1 + dy, 1 + dx : x.shape[1] - 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    smooth = x.astype(float)
    smooth[1:-1, 1:-1] = (inner + 4 * x[1:-1, 1:-1]) / 13
    done = pixels(apply("sharpness", image, 1.7, GREY, "bilinear"))
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
        done = pixels(apply(name, image, value, GREY, "bilinear"))  # type: ignore[arg-type]
        differences = np.abs(done - sampled(pixels(image), matrix)).max(2)
        assert (differences <= 1.0).mean() > 0.99, name  # but for pixels on the very border


def test_every_operation_takes_grey_pictures_and_leaves_its_argument() -> None:
    for image in (picture().convert("L"), picture()):
        before = pixels(image)
        for name in OPERATIONS:
            value = parameter_of(name, 0.9, "increasing", np.random.default_rng(0))
            done = apply(name, image, value, GREY, "bilinear")
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
            ours = {parameter_of(name, level / 10, reading, np.random.default_rng(s)) for s in range(20)}  # type: ignore[arg-type]
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
            parameter_of(name, level, "autoaugment", np.random.default_rng(s)) for level in (0, 1) for s in range(9)
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

    monkeypatch.setattr("onefold.data.autoaugment.apply", note)
    step = RandAugment(num_ops=2, magnitude=9, std=0.5, p=0.5)
    for i in range(3000):
        step(picture(side=2), sample_generator(1, 0, i))
    assert len(seen) == pytest.approx(3000, rel=0.05)
    counts = [seen.count(name) for name in OPERATIONS]
    assert min(counts) > 0.7 * 3000 / len(OPERATIONS)
    assert set(WITHOUT_LEVEL) < set(OPERATIONS)


def test_colour_jitter_is_within_its_factors() -> None:
    flat = Image.new("RGB", (8, 8), (100, 150, 50))
    values = {int(pixels(ColorJitter(brightness=0.4)(flat, sample_generator(0, 0, i)))[0, 0, 0]) for i in range(200)}
    assert min(values) >= 60
    assert max(values) <= 140
    assert max(values) - min(values) > 60
    turned = ColorJitter(hue=0.5)(Image.new("RGB", (2, 2), (255, 0, 0)), sample_generator(0, 0, 3))
    assert pixels(turned).max() >= 250  # another hue, as bright and as full
    assert pixels(turned).min() <= 5
    assert np.array_equal(pixels(ColorJitter()(flat, sample_generator(0, 0, 0))), pixels(flat))


# ------------------------------------------------------------------------------------------- erasing


def test_erasing_puts_out_one_rectangle_of_the_stated_area() -> None:
    full = np.full((3, 40, 50), 7.0, np.float32)
    erase, areas, hits = RandomErasing(p=0.5, fill="mean"), [], 0
    for i in range(400):
        done = erase(full, sample_generator(0, 0, i))
        rows, columns = np.nonzero(done[0] != 7.0)
        if len(rows):
            hits += 1
            box = done[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (box == 0).all()
            areas.append(len(rows) / 2000)
            assert box[0].size == len(rows)
    assert (full == 7.0).all()
    assert 160 < hits < 240
    assert min(areas) > 0.015
    assert max(areas) < 0.36


def test_erased_pixels_are_normal_numbers() -> None:
    full = np.full((3, 224, 224), 9.0, np.float32)
    erase = RandomErasing(p=1.0, area=(0.3, 0.3))
    done = np.concatenate([d[d != 9.0] for d in (erase(full, sample_generator(0, 0, i)) for i in range(5))])
    assert done.mean() == pytest.approx(0, abs=0.01)
    assert done.std() == pytest.approx(1, abs=0.01)


# -------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.2), Mixing(cutmix=1.0), Mixing(mixup=0.8, cutmix=1.0, p=0.7)])
def test_shares_sum_to_one_and_tell_what_is_in_the_images(mixing: Mixing) -> None:
    """Image i is one-hot in channel i: what is left of each channel is what its label must say."""
    labels = torch.tensor([2, 0, 4, 1])
    images = F.one_hot(labels, 5).float()[:, :, None, None].expand(-1, -1, 32, 24).contiguous()
    kept = []
    for step in range(60):
        mixed, shares = mixing(images, labels, 5, batch_generator(0, 0, step, 0))
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((2, 3)), shares)
        kept.append(float(shares[0, 2]))
    assert len(set(kept)) > 20


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.2), Mixing(cutmix=1.0)])
def test_mixing_equal_images_changes_nothing(mixing: Mixing) -> None:
    images, labels = torch.randn(1, 3, 16, 16).expand(6, -1, -1, -1).contiguous(), torch.full((6,), 3)
    for step in range(10):
        mixed, shares = mixing(images, labels, 5, batch_generator(0, 1, step, 0))
        assert torch.equal(mixed, images)
        assert torch.equal(shares, F.one_hot(labels, 5).float())


def test_cutmix_pastes_one_rectangle() -> None:
    images = torch.stack([torch.zeros(1, 20, 30), torch.ones(1, 20, 30)])
    for step in range(40):
        mixed, shares = Mixing(cutmix=1.0)(images, torch.tensor([0, 1]), 2, batch_generator(0, 0, step, 0))
        where = mixed[0, 0].nonzero()
        if len(where):
            (top, left), (bottom, right) = where.min(0).values, where.max(0).values
            assert mixed[0, 0, top : bottom + 1, left : right + 1].all()
            assert len(where) == (bottom - top + 1) * (right - left + 1)
        assert float(shares[0, 1]) == pytest.approx(len(where) / 600, abs=1e-6)
        assert torch.equal(mixed[1], 1 - mixed[0])


def test_the_share_is_beta_distributed() -> None:
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    mixing = Mixing(mixup=0.2)
    drawn = [float(mixing(images, labels, 2, batch_generator(5, 0, i, 0))[1][0, 0]) for i in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.03)
    assert np.var(drawn) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.05)  # of Beta(a, a): 1 / (4 (2 a + 1))


def test_the_loss_of_shares_is_the_mix_of_the_losses() -> None:
    logits, labels, others = torch.randn(6, 5), torch.randint(5, (6,)), torch.randint(5, (6,))
    for smoothing in (0.0, 0.1):
        shares = 0.3 * F.one_hot(labels, 5) + 0.7 * F.one_hot(others, 5)
        mixed = cross_entropy(logits, shares, smoothing=smoothing)
        one, other = (cross_entropy(logits, t, smoothing=smoothing) for t in (labels, others))
        torch.testing.assert_close(mixed, 0.3 * one + 0.7 * other)
        smoothed = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
        derived = -(smoothed * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
        torch.testing.assert_close(one, derived)
    with pytest.raises(BadArgument, match=r"labels of shape \(6, 4\) for logits of shape \(6, 5\): expected \(6,\)"):
        cross_entropy(logits, shares[:, :4])


# ------------------------------------------------------------------------ keyed, wherever it is made


class Pictures:
    """Twenty-four pictures in memory."""

    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return 24

    def image(self, i: int, min_side: int = 0) -> Image.Image:
        return picture(i)

    def crop(self, i: int, window: CropBox) -> Crop:
        return window.of(picture(i))

    def label(self, i: int) -> int:
        return i % 3

    def name(self, i: int) -> str:
        return f"{i}.png"

    def size(self, i: int) -> int:
        return 1


def everything(size: int = 24) -> Augment:
    return Augment(
        steps=(
            RandomResizedCrop(size=size, scale=(0.2, 1.0)),
            HorizontalFlip(),
            AutoAugment(),
            RandAugment(num_ops=2, magnitude=9, std=0.5, p=0.5),
            ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        ),
        preprocessing=Preprocessing(size=size),
        erase=RandomErasing(p=0.5),
    )


CURRICULUM = Curriculum(stages=(Stage(epoch=0, size=16, strength=0.3), Stage(epoch=2, size=24)))


def batches(**given: object) -> ImageLoader:
    grows = ProgressiveAugment(augment=everything(), curriculum=CURRICULUM)
    return ImageLoader(CachedDataset(Pictures()), grows, batch_size=8, seed=4, shuffle=True, **given)  # type: ignore[arg-type]


def mixed(rank: int = 0, **given: object) -> MixupLoader:
    return MixupLoader(batches(rank=rank, **given), Mixing(mixup=0.4, cutmix=1.0), num_classes=3, seed=4, rank=rank)


def test_workers_starts_and_ranks_change_no_picture() -> None:
    for n in (1, 2):
        whole = list(batches().epoch(n))
        threaded = list(batches(num_workers=3).epoch(n, 1))
        for (a, b), (c, d) in zip(whole[1:], threaded, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
        shares = [list(batches(rank=rank, world=2).epoch(n)) for rank in (0, 1)]
        for (a, _), (even, _), (odd, _) in zip(whole, *shares, strict=True):
            assert torch.equal(a[0::2], even)
            assert torch.equal(a[1::2], odd)


def test_mixing_is_keyed_by_epoch_step_and_rank() -> None:
    whole, again, late = list(mixed().epoch(1)), list(mixed(num_workers=2).epoch(1)), list(mixed().epoch(1, 2))
    for (a, b), (c, d) in zip(whole[2:] + whole, late + again, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    draws = {
        tuple(batch_generator(seed, epoch, step, rank).random(2))
        for seed in (0, 1)
        for epoch in (0, 1)
        for step in (0, 1)
        for rank in (0, 1)
    }
    assert len(draws) == 16
    assert tuple(sample_generator(0, 0, 0).random(2)) not in draws


def test_a_curriculum_is_a_function_of_the_epoch() -> None:
    assert [CURRICULUM.at(n).size for n in range(5)] == [16, 16, 24, 24, 24]
    grows = ProgressiveAugment(augment=everything(), curriculum=CURRICULUM)
    steps = grows.at_epoch(1).steps
    assert (steps[0].size, steps[2].strength, steps[3].strength) == (16, 0.3, 0.3)  # type: ignore[attr-defined]
    assert grows.at_epoch(2) == everything()
    assert [next(iter(batches().epoch(n)))[0].shape[-1] for n in (0, 1, 2)] == [16, 16, 24]
