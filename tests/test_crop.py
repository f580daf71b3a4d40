"""Crops out of undecoded pictures: the same pixels as out of decoded ones, whoever decodes, however it is stored."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onefold.data import Augment, CachedDataset, HorizontalFlip, ImageLoader, Preprocessing, RandomResizedCrop
from onefold.data import crop as crops
from onefold.data import decode as decoding
from onefold.data.crop import CropBox
from onefold.data.decode import MAX_PIXELS, decode_crop, decode_image
from onefold.data.folders import ImageFiles
from onefold.data.sampler import sample_generator
from onefold.errors import BadData

RNG = np.random.default_rng(3)


def photo(width: int, height: int, grain: int = 9) -> Image.Image:
    """Something like a photo: smooth, with edges every `grain` pixels."""
    coarse = RNG.integers(0, 256, (max(2, height // grain), max(2, width // grain), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def stored(image: Image.Image, format: str = "JPEG", orientation: int = 1, **options: object) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    image.save(out, format, exif=exif, **options)
    return out.getvalue()


def crop_at(box: tuple[int, int, int, int], size: int = 24) -> CropBox:
    return CropBox(size=size, place=lambda sides: box)


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(crops, "import_simplejpeg", lambda: None)


simplejpeg = pytest.mark.skipif(crops.import_simplejpeg() is None, reason="needs simplejpeg")


@simplejpeg
@settings(max_examples=60, deadline=None)
@given(
    sides=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    orientation=st.integers(1, 8),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    kind=st.sampled_from(["plain", "progressive", "grey", "restarts"]),
)
def test_a_plain_jpeg_is_cut_to_the_same_bits_with_and_without_simplejpeg(
    sides: tuple[int, int], corner: tuple[float, ...], orientation: int, subsampling: str, kind: str
) -> None:
    image = photo(*sides).convert("L") if kind == "grey" else photo(*sides)
    options: dict[str, object] = {} if kind == "grey" else {"subsampling": subsampling}
    options |= {"progressive": True} if kind == "progressive" else {}
    options |= {"restart_marker_blocks": 3} if kind == "restarts" else {}
    data = stored(image, orientation=orientation, quality=88, **options)
    width, height = decode_image(data).size
    left, top = int(corner[0] * (width - 1)), int(corner[1] * (height - 1))
    box = (left, top, left + 1 + int(corner[2] * (width - left - 1)), top + 1 + int(corner[3] * (height - top - 1)))
    for size in (4, 24, 200):  # reduced, and not
        fast = crops.decode_jpeg_crop(data, crop_at(box, size), MAX_PIXELS)
        assert fast is not None
        by_pillow = partial(decoding._cropped, crop_at(box, size))
        slow = decoding._decode(io.BytesIO(data), len(data), "it", by_pillow)
        np.testing.assert_array_equal(fast.resized(), slow.resized())


@simplejpeg
def test_rows_below_the_crop_are_not_decoded() -> None:
    data = stored(photo(200, 400), quality=90)
    cut = crops.decode_jpeg_crop(data, crop_at((10, 20, 110, 100)), MAX_PIXELS)
    assert cut is not None
    assert cut.pixels.shape == (64, 100, 3)  # reduced by 2, of 400 rows the first 128: up to the crop, and 16 more


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_crop_is_pillows_crop_and_resize_within_one_level(
    format: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(crops, "load_resampler", lambda: None)
    elif crops.load_resampler() is None:
        pytest.skip("no compiler")
    data = stored(photo(300, 200), format, quality=95)
    for box, size in (((0, 0, 300, 200), 64), ((31, 17, 200, 91), 90), ((5, 5, 40, 60), 64), ((0, 190, 10, 200), 33)):
        expected = decode_image(data).crop(box).resize((size, size), Image.Resampling.BILINEAR)
        away = np.abs(decode_crop(data, crop_at(box, size)).resized().astype(int) - np.asarray(expected))
        if format != "JPEG" or min(box[2] - box[0], box[3] - box[1]) < 2 * size:
            assert away.max() <= 1
        assert away.mean() < 2


def test_a_reduced_crop_is_near_the_full_one() -> None:
    data = stored(photo(1600, 1200, grain=40), quality=92)
    for box in ((0, 0, 1600, 1200), (101, 203, 1300, 1007)):
        expected = decode_image(data).crop(box).resize((160, 160), Image.Resampling.BILINEAR)
        cut = decode_crop(data, crop_at(box, 160))
        assert cut.pixels.shape[1] == 400
        away = np.abs(cut.resized().astype(int) - np.asarray(expected))
        assert away.mean() < 1.5
        assert np.percentile(away, 99) <= 8


@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_other_filters_are_pillows(interpolation: str) -> None:
    data, box = stored(photo(120, 90), "PNG"), (7, 9, 100, 80)
    asked = CropBox(size=40, place=lambda sides: box, interpolation=interpolation)
    method = {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}[interpolation]
    expected = decode_image(data).crop(box).resize((40, 40), method)
    np.testing.assert_array_equal(decode_crop(data, asked).resized(), expected)


def test_mirrored_and_scaled_in_one_pass() -> None:
    cut = decode_crop(stored(photo(90, 70)), crop_at((3, 4, 80, 66), 32))
    network = Preprocessing(size=32)
    for mirror in (False, True):
        levels = cut.resized()[:, ::-1] if mirror else cut.resized()
        expected = network.normalise(Image.fromarray(np.ascontiguousarray(levels)))
        np.testing.assert_allclose(
            cut.normalised(*network.scale_and_offset(), mirror=mirror), expected, atol=2e-6, rtol=0
        )


@simplejpeg
def test_what_is_not_plain_or_not_whole_is_left_to_pillow(tmp_path: Path) -> None:
    good = stored(photo(64, 48))
    assert crops.read_jpeg_header(good) is not None
    for data in (good[:-2], good[: len(good) // 2], b"", b"\xff\xd8\xff\xd9", stored(photo(9, 9).convert("CMYK"))):
        assert crops.decode_jpeg_crop(data, crop_at((0, 0, 8, 8)), MAX_PIXELS) is None
    assert crops.decode_jpeg_crop(good, crop_at((0, 0, 8, 8)), 64 * 48 - 1) is None
    for data in (good[: len(good) // 2], b"", b"no picture at all"):
        with pytest.raises(BadData, match="it"):
            decode_crop(data, crop_at((0, 0, 8, 8)), name="it")
    path = tmp_path / "tail.jpg"
    path.write_bytes(good + b"garbage")
    np.testing.assert_array_equal(
        decode_crop(path, crop_at((0, 0, 40, 40))).resized(), decode_crop(good, crop_at((0, 0, 40, 40))).resized()
    )


def test_batches_are_the_same_whoever_decodes_and_whatever_is_cached(
    tmp_path: Path, without_simplejpeg: Callable[[], None]
) -> None:
    names = [f"{i}.jpg" for i in range(8)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(stored(photo(60 + 30 * i, 70), orientation=1 + i % 8, quality=90))
    source = ImageFiles(tmp_path, names, [0, 1] * 4, ("a", "b"))
    steps = (RandomResizedCrop(size=32, scale=(0.1, 1.0)), HorizontalFlip())
    augment = Augment(steps=steps, preprocessing=Preprocessing(size=32))

    def epochs(of: object) -> list[np.ndarray]:
        batches = ImageLoader(of, augment, batch_size=4, shuffle=True, seed=5)  # type: ignore[arg-type]
        return [images.numpy() for n in (0, 1) for images, _ in batches.epoch(n)]

    first = epochs(source)
    cached = CachedDataset(source)
    for again in (epochs(cached), epochs(CachedDataset(source, limit_mib=0))):
        np.testing.assert_array_equal(first, again)
    without_simplejpeg()
    np.testing.assert_array_equal(first, epochs(source))
    # the same steps one by one, on whole pictures: the flip is exact, the numbers drawn are the same
    for i in range(8):
        whole = augment(source.image(i), sample_generator(5, 0, i))
        cut = augment.after_crop(
            source.crop(i, augment.crop_box(sample_generator(5, 0, i))), _after_box(5, i, steps[0], source)
        )
        if min(source.image(i).size) < 64:
            np.testing.assert_allclose(whole, cut, atol=2e-6, rtol=0)


def _after_box(seed: int, i: int, crop: RandomResizedCrop, source: ImageFiles) -> np.random.Generator:
    """The sample's random numbers once the crop has drawn its own."""
    rng = sample_generator(seed, 0, i)
    crop.box(source.image(i).size, rng)
    return rng
