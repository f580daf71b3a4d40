"""Turning a picture upright (EXIF 2.3, table 4, tag 0x0112), and crops through that turn.

A turn is written as the way from the upright picture to the stored one: swap the axes, then mirror columns, then rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.crop import Box, Cut, Window

ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURN = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_NONE = (False, False, False)


def stored_box(window: Window, sides: tuple[int, int], orientation: int) -> tuple[Box, int]:
    """Where the crop lies in the picture as stored, of `sides` (width, height), and by how much it may be reduced."""
    swap, mirror_x, mirror_y = _TURN.get(orientation, _NONE)
    width, height = sides
    left, top, right, bottom = window.place((height, width) if swap else sides)
    if swap:
        left, top, right, bottom = top, left, bottom, right
    if mirror_x:
        left, right = width - right, width - left
    if mirror_y:
        top, bottom = height - bottom, height - top
    box = (left, top, right, bottom)
    return box, window.reduction(box)


def upright_cut(window: Window, pixels: NDArray[np.uint8], box: Box, by: int, orientation: int) -> Cut:
    """The crop out of pixels as stored (h, w, 3), reduced by `by`; rows and columns after the crop may be missing."""
    swap, mirror_x, mirror_y = _TURN.get(orientation, _NONE)
    left, top, right, bottom = (side / by for side in box)
    height, width = pixels.shape[:2]
    if mirror_x:
        pixels, left, right = pixels[:, ::-1], width - right, width - left
    if mirror_y:
        pixels, top, bottom = pixels[::-1], height - bottom, height - top
    if swap:
        pixels, left, top, right, bottom = pixels.transpose(1, 0, 2), top, left, bottom, right
    return window.cut(pixels, (left, top, right, bottom))
