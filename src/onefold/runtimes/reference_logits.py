"""The reference inside an artifact: a few images and the PyTorch model's logits for them.

    B  number of images    C, H, W  the input shape of the model

The file is a plain, uncompressed .npz of two float32 arrays; anything else in it is refused before it is decoded,
so no array can be larger than the file and nothing is unpickled.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from onefold.errors import BadArgument, BadArtifact

if TYPE_CHECKING:
    from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float32]
Example: TypeAlias = "Floats | Tensor | tuple[int, int, int]"


@dataclass(frozen=True, kw_only=True)
class ReferenceLogits:
    """Images (B, C, H, W) and the PyTorch model's logits (B, classes), float32."""

    images: Floats
    logits: Floats


def make_reference_images(shape: tuple[int, int, int], *, num_images: int = 2, seed: int = 0) -> Floats:
    """Make images (B, C, H, W) like real, normalized ones: coarse patches with fine noise, mean 0, deviation 1."""
    channels, height, width = shape
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((num_images, channels, 8, 8))
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    images = coarse[:, :, rows[:, None], columns] + 0.25 * rng.standard_normal((num_images, channels, height, width))
    return ((images - images.mean()) / max(images.std(), 1e-6)).astype(np.float32)


def example_images(example: Example) -> Floats:
    """Make at least two images of the example: a single image is joined by its mirror image."""
    if isinstance(example, tuple):
        if len(example) != 3 or not all(type(size) is int and size > 0 for size in example):
            raise BadArgument(f"expected a shape of three sizes (channels, height, width), got {example!r}")
        return make_reference_images(example)
    images = example if isinstance(example, np.ndarray) else example.detach().cpu().numpy()
    if images.dtype != np.float32 or images.ndim != 4 or len(images) == 0 or not np.isfinite(images).all():
        raise BadArgument(f"expected finite float32 images (B, C, H, W), got {images.dtype} of shape {images.shape}")
    return np.ascontiguousarray(images if len(images) > 1 else np.concatenate([images, images[..., ::-1]]))


def relative_difference(answer: Floats, logits: Floats) -> float:
    """Divide the largest difference by the largest of `logits`; infinite where an answer is not finite."""
    if answer.shape != logits.shape or not np.isfinite(answer).all():
        return float("inf")
    scale = float(np.abs(logits).max())
    return float(np.abs(answer.astype(np.float64) - logits).max()) / max(scale, float(np.finfo(np.float32).tiny))


def top1_agreement(answer: Floats, logits: Floats) -> float:
    """Compute the share of images for which both have the same top class."""
    return float((answer.argmax(axis=1) == logits.argmax(axis=1)).mean())


def write_reference(path: Path, reference: ReferenceLogits) -> None:
    """Write the reference as an uncompressed .npz."""
    np.savez(path, images=reference.images, logits=reference.logits)


def read_reference(data: bytes, shape: tuple[int, int, int], num_classes: int) -> ReferenceLogits:
    """Read the bytes of reference.npz. Raises BadArtifact where they do not fit this shape and number of classes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            images, logits = _read_array(archive, "images.npy"), _read_array(archive, "logits.npy")
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise BadArtifact(f"reference.npz cannot be read: {error}; export the model again") from error
    num_images = len(images) if images.ndim else 0
    if num_images == 0 or images.shape != (num_images, *shape) or logits.shape != (num_images, num_classes):
        raise BadArtifact(
            f"reference.npz does not fit the model: expected images (B, {', '.join(map(str, shape))}) and logits "
            f"(B, {num_classes}), found {images.shape} and {logits.shape}; export the model again"
        )
    if not (np.isfinite(images).all() and np.isfinite(logits).all() and logits.any()):
        raise BadArtifact("reference.npz is of no use: its numbers are not finite or all zero; export again")
    return ReferenceLogits(images=images, logits=logits)


def _read_array(archive: zipfile.ZipFile, name: str) -> Floats:
    """Read a float32 array of the archive; its header must fit the entry's size before memory is allocated."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"{name} is compressed")
    stream = io.BytesIO(archive.read(entry))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is not a plain array")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    flat = np.frombuffer(stream.read(), dtype="<f4")
    if dtype != np.dtype("<f4") or fortran_order or flat.size != np.prod(shape, dtype=np.float64):
        raise ValueError(f"{name} is not a float32 array of shape {shape}")
    return flat.reshape(shape).astype(np.float32)
