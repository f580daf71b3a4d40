"""A sheet of pictures as the network sees them, each with its class: to be looked at before hours are spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from onefold.data.decode import printable
from onefold.data.preprocessing import Preprocessing

COLUMNS = 8
TILE = (96, 176)  # the side of a picture on the sheet, at least and at most, in pixels
_GAP, _CAPTION = 8, 20
_PAPER, _INK = (255, 255, 255), (20, 24, 30)

Pixels = NDArray[np.float32]


def sheet(pictures: Sequence[tuple[Pixels, str]], preprocessing: Preprocessing) -> Image.Image:
    """Network inputs float32 (C, H, W) and what to write below them, in rows of eight; RGB.

    The normalisation is taken back, so what is seen is what training computes with, crops, flips, colours and all.
    """
    sides = pictures[0][0].shape[1:]
    scale = max(1, -(-TILE[0] // max(sides))) if max(sides) < TILE[0] else min(1.0, TILE[1] / max(sides))
    height, width = (max(1, round(side * scale)) for side in sides)
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    whole = (_GAP + columns * (width + _GAP), _GAP + rows * (height + _CAPTION + _GAP))
    paper = Image.new("RGB", whole, _PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(13)
    for number, (pixels, caption) in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _CAPTION + _GAP)
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BILINEAR
        paper.paste(picture_of(pixels, preprocessing).resize((width, height), resample), (left, top))
        pen.text((left, top + height + 2), _fitting(pen, font, caption, width), fill=_INK, font=font)
    return paper


def picture_of(pixels: Pixels, preprocessing: Preprocessing) -> Image.Image:
    """The RGB picture that a network's input (C, H, W) shows: the inverse of `Preprocessing.normalise`."""
    mean, std = (np.array(each, dtype=np.float64)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    levels = np.nan_to_num((pixels * std + mean) * 255, nan=0.0, posinf=255.0, neginf=0.0)
    planes = np.rint(np.clip(levels, 0, 255)).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(planes, (3, *planes.shape[1:])).transpose(1, 2, 0).copy())


def captions(labels: NDArray[np.generic], classes: Sequence[str]) -> Iterable[str]:
    """Of each image its class's name; of mixed ones, whose labels are shares (N, classes), the two greatest."""
    for label in labels:
        if np.ndim(label) == 0:
            yield classes[int(label)]
            continue
        shares = np.asarray(label, dtype=np.float64)
        best = [int(i) for i in np.argsort(-shares, kind="stable")[:2] if shares[i] > 0.1]
        whole = len(best) < 2
        yield " + ".join(classes[i] if whole else f"{100 * shares[i]:.0f}% {classes[i]}" for i in best) or "mixed"


def _fitting(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, room: int) -> str:
    """The text, cut at its end where it is too wide for a tile."""
    text = " ".join(printable(text).split())
    if pen.textlength(text, font=font) <= room:
        return text
    while text and pen.textlength(text + "...", font=font) > room:
        text = text[:-1]
    return text + "..."
