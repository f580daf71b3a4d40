"""Images in memory, as PIL, numpy and torch hold them: pictures, or inputs that are prepared for a network already.

| given | taken as |
|---|---|
| PIL image | a picture, of any size and mode; its EXIF orientation is applied, transparency is laid over white |
| uint8 array (H, W), (H, W, C) or (C, H, W), C 1, 3 or 4 | a picture, RGB (OpenCV's are BGR: `image[..., ::-1]`) |
| uint8 tensor (C, H, W), as torchvision reads files | a picture |
| floats (C, H, W) with the channels and sides of the network | an input: resized and normalized already |
| one axis more, (B, ...); a list or tuple | each of them |
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from onefold.data.decode import pil_to_rgb
from onefold.data.preprocessing import Preprocessing
from onefold.errors import BadArgument

if TYPE_CHECKING:
    from torch import Tensor

_Floats = NDArray[np.float32]
_CHANNELS = (1, 3, 4)
_log = logging.getLogger("onefold")


def iter_images(value: object) -> Iterator[object]:
    """Give the single images of what may be one, a batch or a list of them; what is no image comes as it is."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from iter_images(item)
    elif (isinstance(value, np.ndarray) or _is_tensor(value)) and value.ndim == 4:
        yield from value
    else:
        yield value


def prepare_images(value: object, preprocessing: Preprocessing) -> _Floats:
    """Give an image, a batch or a list of them as the network's inputs, float32 (B, C, S, S).

    Raises as `prepare_image`.
    """
    inputs = [prepare_image(image, preprocessing) for image in iter_images(value)]
    if not inputs:
        raise BadArgument("there is no image: expected one, or a list with one or more")
    return np.stack(inputs)


def prepare_image(image: object, preprocessing: Preprocessing) -> _Floats:
    """Give one image as the network's input, float32 (C, S, S), contiguous.

    Raises BadArgument for what is no image, or floats of another shape; BadData for an image that cannot be used.
    """
    if isinstance(image, Image.Image):
        return preprocessing(pil_to_rgb(image, value_range=preprocessing.value_range))
    if not (isinstance(image, np.ndarray) or _is_tensor(image)):
        raise BadArgument(
            f"expected an image as PIL, a uint8 array (H, W, 3) or a tensor (3, H, W), not {type(image).__name__}"
        )
    array = image if isinstance(image, np.ndarray) else image.detach().cpu().numpy()
    if array.dtype == np.uint8:
        return preprocessing(_picture(array, channels_first=_is_tensor(image)))
    shape = (preprocessing.channels, preprocessing.size, preprocessing.size)
    if not np.issubdtype(array.dtype, np.floating) or array.shape != shape:
        raise BadArgument(
            f"expected a picture of uint8 (H, W, 3), values 0 to 255, or a normalized input of floats {shape}, got "
            f"{array.dtype} {array.shape}{_remedy(image, array)}"
        )
    if preprocessing.mean != (0.0,) * preprocessing.channels and 0 <= array.min() < array.max() <= 1:
        _log.warning(
            "an input of floats has values from %.2f to %.2f: it is taken as normalized already; give a picture as "
            "PIL or uint8 to have it normalized",
            *(float(array.min()), float(array.max())),
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _remedy(image: object, array: NDArray[np.generic]) -> str:
    """What to type where a picture came as other numbers than uint8; nothing for what has no shape of a picture."""
    if array.ndim not in (2, 3) or array.dtype.kind not in "fiu" or 0 in array.shape:
        return ""
    values = np.asarray(array, dtype=np.float64)
    is_share = array.dtype.kind == "f" and bool(np.all((values >= 0) & (values <= 1)))
    scaled = "(x * 255).round()" if is_share else "x.round()" if array.dtype.kind == "f" else "x"
    return f": give {scaled}.{'to(torch.uint8)' if _is_tensor(image) else 'astype(np.uint8)'}"


def _picture(pixels: NDArray[np.uint8], *, channels_first: bool) -> Image.Image:
    """Give an array of uint8 as an RGB picture; `channels_first` where both ends could be the channels."""
    if pixels.ndim == 3 and 0 not in pixels.shape:
        first, last = pixels.shape[0] in _CHANNELS, pixels.shape[2] in _CHANNELS
        if first and (channels_first or not last):
            pixels = pixels.transpose(1, 2, 0)
        elif not last:
            raise BadArgument(f"expected a picture with 1, 3 or 4 channels, got an array of shape {pixels.shape}")
        pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise BadArgument(f"expected a picture (H, W), (H, W, 3) or (3, H, W), got an array of shape {pixels.shape}")
    return pil_to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))
