"""Decoding: what each kind of image becomes, what is refused, and that damaged bytes give BadData or a picture."""

from __future__ import annotations

import io
import os
import random
import re
import resource
import socket
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import onefold.data.decode as decoding
from onefold.commands.predict import warn_unusual_images
from onefold.data.crop import CropBox, count_jpeg_scans
from onefold.data.decode import (
    MASK_KIND,
    MAX_PIXELS,
    UNUSUAL_ALPHA,
    decode_crop,
    decode_image,
    left_out_kind,
    left_out_reason,
    printable_name,
)
from onefold.data.duplicates import thumbnail_stats
from onefold.data.folders import ImageFiles, list_folder
from onefold.data.photo_copies import find_masks
from onefold.data.preprocessing import Preprocessing
from onefold.errors import BadData
from onefold.system_resources import free_memory

RNG = np.random.default_rng(0)
SCENE = np.kron(RNG.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # 48 x 64 px, blocks of 8


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixels(image: bytes | Path) -> np.ndarray:
    decoded = decode_image(image)
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG put together by hand, so that its header can claim anything."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # not an orientation
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(Image.fromarray(SCENE), format, exif=exif, **options)
    np.testing.assert_array_equal(pixels(data), UPRIGHT[orientation](SCENE))


def test_a_jpeg_of_a_phone_is_turned_upright_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(saved(Image.fromarray(SCENE), "JPEG", exif=exif, quality=95, subsampling=0))
    assert image.size == (48, 64)
    assert np.abs(np.asarray(image).astype(int) - np.rot90(SCENE, -1)).mean() < 3
    assert not image.info
    assert 0x0112 not in image.getexif()


def test_an_exif_block_that_cannot_be_read_counts_as_none() -> None:
    data = saved(Image.fromarray(SCENE), "PNG", exif=b"Exif\0\0not a TIFF header at all")
    np.testing.assert_array_equal(pixels(data), SCENE)


WIDE = np.array([[0, 128, 129, 257, 40000, 65535]], np.uint16)
SCALED = [0, 0, 1, 1, 156, 255]  # round(v / 257)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    image = Image.fromarray(WIDE)
    pgm = b"P5 6 1 65535\n" + WIDE.astype(">u2").tobytes()
    for data in (saved(image, "PNG"), saved(image, "TIFF"), saved(image, "TIFF", compression="tiff_lzw"), pgm):
        np.testing.assert_array_equal(pixels(data), np.repeat(SCALED, 3).reshape(1, 6, 3))


def test_16_bit_colour_keeps_its_high_byte() -> None:
    rows = b"\0" + struct.pack(">6H", 0, 0x80FF, 0xFFFF, 0x1234, 0x00FF, 0xFF00)
    np.testing.assert_array_equal(pixels(png(2, 1, rows, depth=16)), [[[0, 0x80, 0xFF], [0x12, 0, 0xFF]]])


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_is_not_a_negative(format: str) -> None:
    cyan, black, paper = ((255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0))
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, :16], inks[:, 16:32], inks[:, 32:] = cyan, black, paper
    data = saved(Image.frombytes("CMYK", (48, 16), inks.tobytes()), format)
    if format == "JPEG":
        assert b"Adobe" in data  # the marker of inverted inks
    seen = pixels(data)[8, [8, 24, 40]].astype(int)
    assert np.abs(seen - [[0, 255, 255], [0, 0, 0], [255, 255, 255]]).max() <= 6


def test_transparency_is_laid_over_white() -> None:
    black_half = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    for data in (saved(black_half, "PNG"), saved(black_half, "TIFF"), saved(Image.new("LA", (2, 2), (0, 51)), "PNG")):
        np.testing.assert_array_equal(pixels(data), np.full((2, 2, 3), 204))  # 255 * (1 - 51 / 255)


@pytest.mark.parametrize(
    ("alpha", "is_odd"),
    [
        (RNG.integers(1, 255, (48, 64)), True),  # infrared, depth
        (np.full((48, 64), 128), False),
        (np.tile(np.r_[np.zeros(28), np.linspace(0, 255, 8), np.full(28, 255)], (48, 1)), False),  # a soft edge
        (np.full((48, 64), 255), False),
    ],
)
def test_a_fourth_channel_that_is_no_transparency_is_seen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, alpha: np.ndarray, is_odd: bool
) -> None:
    picture = Image.fromarray(np.dstack([SCENE, alpha.astype(np.uint8)]), "RGBA")
    assert (UNUSUAL_ALPHA in decode_image(saved(picture, "PNG")).info) == is_odd
    picture.save(tmp_path / "0.png")
    images = ImageFiles(tmp_path, ["0.png"], [0], ("a",))
    warn_unusual_images(images, Preprocessing())
    assert ("1 of 1 images looked at have a fourth channel that does not look like" in caplog.text) == is_odd
    assert thumbnail_stats(images, 9).has_odd_alpha.tolist() == [is_odd]


def test_a_palette_is_looked_up_and_its_transparent_entry_is_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    opaque = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    np.testing.assert_array_equal(pixels(saved(image, "PNG")), opaque)
    through = [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    for data in (saved(image, "PNG", transparency=1), saved(image, "GIF", transparency=1)):
        np.testing.assert_array_equal(pixels(data), through)
    half = saved(image, "PNG", transparency=bytes([255, 0, 255]))
    np.testing.assert_array_equal(pixels(half), through)


def test_a_colour_key_is_transparent() -> None:
    data = saved(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(pixels(data), [[[255, 255, 255], [4, 5, 6]]])


def test_one_bit() -> None:
    data = saved(Image.fromarray(np.array([[True, False, True]])), "PNG")
    np.testing.assert_array_equal(pixels(data)[0, :, 0], [255, 0, 255])
    np.testing.assert_array_equal(pixels(b"P4 3 1\n\x40")[0, :, 0], [255, 0, 255])  # in PBM a 1 is black


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(pixels(data), np.broadcast_to([255, 0, 0], (8, 8, 3)))


@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("integer", np.int32)])
def test_samples_of_unknown_range_are_refused(kind: str, dtype: type) -> None:
    data = saved(Image.fromarray(np.full((4, 4), 0.5, np.float32).astype(dtype)), "TIFF")
    with pytest.raises(BadData, match=rf"x\.tif has {kind} samples whose range is not known"):
        decode_image(data, name="x.tif")


@pytest.mark.parametrize(("width", "height"), [(7100, 7100), (9800, 9800), (30000, 30000), (MAX_PIXELS + 1, 1)])
def test_a_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch, width: int, height: int) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    monkeypatch.setattr(decoding, "free_memory", lambda: 1 << 50)  # however much memory there is
    bomb = png(width, height, b"\0" * 100)
    with pytest.raises(BadData, match=r"^bomb\.png has .*more than"):
        decode_image(bomb, name="bomb.png")  # here Pillow's own warning is an error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadData, match=r"^bomb\.png has .*more than"):
            decode_image(bomb, name="bomb.png")


def test_a_jpeg_of_a_thousand_scans_is_refused_before_it_is_decoded() -> None:
    whole = Image.fromarray(SCENE)
    progressive, plain = saved(whole, "JPEG", progressive=True), saved(whole, "JPEG")
    last = progressive.rindex(b"\xff\xda")
    trap = progressive[:-2] + progressive[last:-2] * 1000 + progressive[-2:]
    assert [count_jpeg_scans(io.BytesIO(data)) for data in (plain, progressive, trap)] == [1, 10, 1010]
    box = CropBox(size=6, place=lambda sides: (0, 0, 6, 6))
    for use in (decode_image, partial(decode_image, min_side=8), lambda data: decode_crop(data, box)):
        use(progressive)
        with pytest.raises(BadData, match="has 1010 scans, and no photo has more than 100"):
            use(trap)
    apart = bytearray(plain)  # a sequential one whose first scan has one of its three components
    apart[plain.index(b"\xff\xda") + 4] = 1
    assert count_jpeg_scans(io.BytesIO(bytes(apart[:-2]) + b"\xff\xda\0\x08" * 300)) == 301
    assert count_jpeg_scans(io.BytesIO(plain + b"\xff\xda\0\x08" * 300)) == 1  # the decoder does not come there


def test_a_photo_of_more_than_50_megapixels_comes_at_half_its_scale() -> None:
    photo = saved(Image.new("L", (8192, 6144), 90), "JPEG", quality=50)
    half = decode_image(photo)
    assert half.size == (4096, 3072)
    assert half.getpixel((2000, 2000)) == (90, 90, 90)
    assert decode_image(photo, min_side=100).size == (1024, 768)
    box = CropBox(size=512, place=lambda sides: (0, 0, sides[0] // 8, sides[1] // 8))
    assert decode_crop(photo, box).box == (0, 0, 512, 384)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("most", "scale"), [(48 * 64, 1), (48 * 64 - 1, 2), (48 * 64 // 4 - 1, 4), (48, 8)])
def test_a_picture_with_too_many_pixels_comes_smaller(
    monkeypatch: pytest.MonkeyPatch, format: str, most: int, scale: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scene, more = Image.fromarray(SCENE), {"lossless": True} if format == "WEBP" else {}
    data = saved(scene, format, exif=exif, **more)
    monkeypatch.setattr(decoding, "MAX_PIXELS", most)
    image = decode_image(data)
    assert image.size == (48 // scale, 64 // scale)
    whole = np.asarray(scene.rotate(270, expand=True).resize(image.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(image) - whole).mean() < (12 if format in ("JPEG", "MPO") else 1)
    crop = decode_crop(data, CropBox(size=4, place=lambda sides: (0, 0, *sides))).resized().astype(int)
    assert np.abs(crop - np.asarray(image.resize((4, 4), Image.Resampling.BILINEAR))).mean() < 12


def test_the_limit_of_pixels_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    data, photo = (saved(Image.new("L", (4000, 3000), 90), kind) for kind in ("PNG", "JPEG"))
    turned = saved(Image.new("L", (4000, 3000), 90), "JPEG", progressive=True)
    monkeypatch.setattr(decoding, "free_memory", lambda: 12 * 4000 * 3000)
    assert decode_image(data).size == decode_image(photo).size == (4000, 3000)
    with pytest.raises(BadData, match=r"0\.2 GB of memory, and 0\.1 GB are free"):
        decode_image(turned)  # a progressive JPEG is held whole as coefficients
    monkeypatch.setattr(decoding, "free_memory", lambda: 12 * 4000 * 3000 - 1)
    with pytest.raises(BadData, match="4000 x 3000 pixels, more than fit: "):
        decode_image(data)


def test_free_memory_is_the_machines_or_what_a_container_leaves(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert free_memory(tmp_path) == 4 << 30  # nothing is known
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    2000 kB\n")
    assert free_memory(tmp_path) == 2_048_000
    write("sys/fs/cgroup/memory.max", "max\n")
    write("sys/fs/cgroup/memory.current", "700000\n")
    assert free_memory(tmp_path) == 2_048_000
    write("proc/self/cgroup", "0::/job\n")
    write("sys/fs/cgroup/job/memory.max", "1000000\n")
    write("sys/fs/cgroup/job/memory.current", "700000\n")
    write("sys/fs/cgroup/job/memory.stat", "anon 5\ninactive_file 40000\n")
    assert free_memory(tmp_path) == 340_000
    assert 0 < free_memory() < 1 << 60


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("a.JPG", b"", None),
        ("a.jpg ", b"", None),
        ("photo.jpeg", b"whatever is inside is for decode to say", None),
        ("photo", b"\xff\xd8\xff\xe0", None),
        ("photo.jpg_large", b"\xff\xd8\xff\xe0", None),
        ("photo.jpg?w=640", b"\x89PNG\r\n\x1a\n", None),
        ("IMG_2024.05.12", b"RIFF\0\0\0\0WEBPVP8 ", None),
        ("n01440764.10026", b"GIF89a", None),
        ("scan", b"II*\0", None),
        ("bitmap", b"BM\x36\0\1\0\0\0\0\0", None),
        ("phone", b"\0\0\0\x20ftypavif", None),
        ("photo.jpg~", b"\xff\xd8\xff\xe0", "without a suffix"),
        ("README", b"These are photos", "without a suffix"),
        ("Icon\r", b"", "without a suffix"),
        ("BMW", b"BMW cars", "without a suffix"),
        ("x.DNG", b"II*\0", ".dng"),
        ("x.jp2", b"\x89PNG\r\n\x1a\n", ".jp2"),
        ("list.txt", b"", ".txt"),
        ("weights.safetensors", b"", ".safetensors"),
    ],
)
def test_the_suffix_says_what_is_an_image_and_without_one_the_first_bytes(
    name: str, head: bytes, kind: str | None
) -> None:
    assert left_out_kind(name, lambda: head) == kind


def test_the_page_says_which_files_are_images() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| (used|left out as .+) \|$", page, re.MULTILINE)
    assert len(rows) == 12
    heads = {
        "JPEG": b"\xff\xd8\xff\xe0",
        "PNG": b"\x89PNG\r\n\x1a\n",
        "TIFF": b"II*\0",
        "pickle": b"\x80\x04\x95\n",
        "idx": b"\0\0\x08\x03\0\0\xea\x60",
        "text": b"text",
        "anything": b"?",
    }
    for begins, name, outcome in rows:
        kind = left_out_kind(name, partial(heads.__getitem__, begins))
        assert outcome == ("used" if kind is None else f"left out as {kind}")


@pytest.mark.parametrize("installed", [True, False])
def test_heic_is_an_image_where_it_can_be_read(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(decoding, "_heif_opener", lambda: object if installed else None)
    heic = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"
    for name in ("IMG_1.HEIC", "IMG_1.heif", "IMG_1.hif", "IMG_1"):
        kind = left_out_kind(name, lambda: heic)
        assert (kind is None) == installed
        assert installed or 'pip install "onefold[heic]"' in left_out_reason(kind)
    with pytest.raises(BadData, match="damaged HEIC" if installed else r'HEIC photo: pip install "onefold\[heic\]"'):
        decode_image(heic, name="IMG_1.jpg")  # phones send such files on under another suffix


def test_a_heic_photo_is_decoded_upright() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = pillow_heif.from_pillow(Image.fromarray(SCENE))
    image.save(out, quality=95, exif=exif.tobytes())
    photo = decode_image(out.getvalue())
    assert photo.mode == "RGB"
    assert photo.size == (48, 64)
    assert np.abs(np.asarray(photo).astype(int) - np.rot90(SCENE, -1)).mean() < 12
    for length in (20, 200, len(out.getvalue()) // 2):
        with pytest.raises(BadData, match="half"):
            decode_image(out.getvalue()[:length], name="half")


def test_masks_beside_their_photos_are_no_photos(tmp_path: Path) -> None:
    names = [
        "a (1).png",
        "a (1)_mask.png",
        "a (1)_mask_1.png",
        "b.jpg",
        "b_seg.png",
        "c_mask.png",
        "d/b_mask.png",
        "gt.png",
    ]
    assert find_masks(names) == ["a (1)_mask.png", "a (1)_mask_1.png", "b_seg.png"]
    (tmp_path / "d").mkdir()
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    listing = list_folder(tmp_path)
    assert listing.images == ["a (1).png", "b.jpg", "c_mask.png", "d/b_mask.png", "gt.png"]
    assert listing.others == {MASK_KIND: ["a (1)_mask.png", "a (1)_mask_1.png", "b_seg.png"]}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty (0 bytes)"),
        (b"hello, this is\nplain text", "is text, not an image"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "is an HTML page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"PK\x03\x04" + bytes(40), "is a zip archive"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "HEIC photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # EPS: Pillow would run Ghostscript
        (bytes(range(256)), "is not an image that can be read"),
        (b"\xff\xd8\xff", "is not an image that can be read"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, sentence: str) -> None:
    with pytest.raises(BadData) as caught:
        decode_image(data, name="it.jpg")
    assert str(caught.value).startswith("it.jpg ")
    assert sentence in str(caught.value)


def seeds() -> dict[str, bytes]:
    """One small image in each way of storing images."""
    scene = Image.fromarray(SCENE)
    grey = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21)
    turned = scene.rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 8
    return {
        "jpeg": saved(scene, "JPEG", exif=exif, comment=b"a comment"),
        "progressive": saved(scene, "JPEG", progressive=True, subsampling=0),
        "cmyk": saved(scene.convert("CMYK"), "JPEG"),
        "mpo": saved(scene, "MPO", save_all=True, append_images=[turned]),
        "png": saved(scene, "PNG", exif=exif),
        "palette": saved(scene.convert("P"), "PNG", transparency=3),
        "png16": saved(grey, "PNG"),
        "gif": saved(scene, "GIF", save_all=True, append_images=[turned], transparency=0),
        "webp": saved(scene, "WEBP", exif=exif),
        "webp animated": saved(scene.convert("RGBA"), "WEBP", lossless=True, save_all=True, append_images=[turned]),
        "bmp": saved(scene, "BMP"),
        "tiff": saved(scene, "TIFF"),
        "tiff lzw": saved(scene.convert("RGBA"), "TIFF", compression="tiff_lzw"),
        "tiff jpeg": saved(scene, "TIFF", compression="jpeg"),
        "ppm": saved(scene, "PPM"),
        "plain ppm": b"P3 4 2 255\n" + b"1 22 133 " * 8,
        "avif": saved(scene, "AVIF"),
    }


SEEDS = seeds()


@pytest.mark.parametrize("kind", SEEDS)
def test_a_file_cut_in_half_is_refused_and_a_tail_of_garbage_is_not(kind: str) -> None:
    data = SEEDS[kind]
    whole = pixels(data)
    with pytest.raises(BadData, match="half"):
        decode_image(data[: len(data) // 2], name="half")
    if kind not in ("tiff", "tiff lzw", "tiff jpeg", "plain ppm"):  # a TIFF may keep its directory anywhere
        np.testing.assert_array_equal(pixels(data + b"garbage" * 9), whole)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[place] ^= 1 << rng.randrange(8)
            case 1:
                out[place : place + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\1\0")
                )
            case 2:
                del out[place : place + rng.randrange(1, 64)]
            case 3:
                start = rng.randrange(len(other))
                out[place:place] = other[start : start + rng.randrange(1, 64)]
            case 4:
                out[place : place + 16] = rng.randbytes(16)
            case 5:
                del out[rng.randrange(max(1, place)) :]
        out = out or bytearray(b"\0")
    return bytes(out)


def decoded_or_refused(data: bytes, min_side: int) -> Image.Image | str:
    try:
        return decode_image(data, name="fuzzed", min_side=min_side)
    except BadData as error:
        return str(error)


def fuzz(count: int) -> None:
    """`count` damaged files; each is a picture or BadData with a fit message, soon and in bounded memory."""
    rng = random.Random(20)
    kinds = list(SEEDS.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for i in range(count):
        data = mutated(kinds[i % len(kinds)], rng.choice(kinds), rng)
        started = time.process_time()
        outcome = decoded_or_refused(data, rng.choice((0, 0, 16)))
        assert time.process_time() - started < 5, f"mutation {i} took long"
        if isinstance(outcome, str):
            refused += 1
            assert outcome.startswith(("fuzzed is ", "fuzzed has ", "fuzzed needs "))
        else:
            assert outcome.mode == "RGB"
            assert outcome.width * outcome.height <= MAX_PIXELS
    assert 0.2 < refused / count < 0.98  # the mutations reach the decoders, and some of them hurt
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: 1 GiB


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_bad_data() -> None:
    fuzz(600)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_bad_data_at_length() -> None:
    fuzz(5000)


def test_damaged_bytes_where_warnings_are_errors() -> None:
    fuzz(150)


@pytest.mark.timeout(20)
def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nothing.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "linked-pipe.jpg").symlink_to("pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.jpg"))  # a socket's absolute path may be too long
    sentences = {
        "pipe.jpg": "is a named pipe",
        "linked-pipe.jpg": "is a named pipe",
        "folder.jpg": "is a folder",
        "socket.jpg": "is a socket",
        "zero.jpg": "is a device",
        "loop.jpg": "cannot read",
        "dangling.jpg": "No such file",
        "missing.jpg": "No such file",
        "null\0.jpg": "cannot read",
    }
    for name, sentence in sentences.items():
        with pytest.raises(BadData, match=sentence):
            decode_image(tmp_path / name)


def test_a_name_that_is_not_utf8_can_be_read_and_printed(tmp_path: Path) -> None:
    good = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Path(good).write_bytes(SEEDS["png16"])
    assert decode_image(good).size == (64, 48)
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff<script>\n.png"))
    bad.write_bytes(b"")
    with pytest.raises(BadData) as caught:
        decode_image(bad)
    assert "\\udcff<script>\\n.png is empty" in str(caught.value).encode("utf-8").decode()
    assert printable_name("plain näme.jpg") == "plain näme.jpg"


def test_a_large_jpeg_comes_smaller_where_that_is_allowed(tmp_path: Path) -> None:
    photo = Image.fromarray(SCENE).resize((1600, 1200), Image.Resampling.BICUBIC)
    path = tmp_path / "photo.jpg"
    photo.save(path, quality=95)
    assert decode_image(path).size == (1600, 1200)
    for min_side, size in (
        (1201, (1600, 1200)),
        (601, (1600, 1200)),
        (600, (800, 600)),
        (151, (400, 300)),
        (1, (200, 150)),
    ):
        small = decode_image(path, min_side=min_side)
        assert small.size == size
        if size != photo.size:
            away = np.asarray(small).astype(int) - np.asarray(photo.resize(size, Image.Resampling.BOX))
            assert np.abs(away).mean() < 1
    np.testing.assert_array_equal(decode_image(path, min_side=1200), decode_image(path))
