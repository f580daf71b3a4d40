"""Images kept in memory once they are decoded, for sets that are small enough."""

from __future__ import annotations

from threading import Lock

from PIL import Image

from onefold.data.crop import Cut, Window
from onefold.data.dataset import Source


class Cached:
    """A source whose decoded images stay in memory, the first `limit_mib` of them. A Source.

    What it gives is bit for bit what the source gives: an image so large that a crop of it might be decoded at a
    reduced scale is left to the source.
    """

    def __init__(self, source: Source, limit_mib: int = 256) -> None:
        self.source = source
        self._room = limit_mib << 20
        self._kept: dict[tuple[int, int], Image.Image] = {}
        self._large: set[int] = set()
        self._lock = Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the source."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def label(self, i: int) -> int:
        """The class index of image i."""
        return self.source.label(i)

    def name(self, i: int) -> str:
        """The name of image i."""
        return self.source.name(i)

    def image(self, i: int, *, at_least: int = 0) -> Image.Image:
        """Image i, decoded the first time it is asked for; not to be changed in place."""
        kept = self._kept.get((i, at_least))
        if kept is not None:
            return kept
        image = self.source.image(i, at_least=at_least)
        self._keep(i, at_least, image)
        return image

    def crop(self, i: int, window: Window) -> Cut:
        """A part of image i, of the whole image where that is kept."""
        in_vain = self._room < _SMALLEST or len(self._large) > _PATIENCE + len(self._kept)
        if i in self._large or (in_vain and (i, 0) not in self._kept):
            return self.source.crop(i, window)
        whole = self.image(i)
        if min(whole.size) >= 2 * window.size:
            self._large.add(i)
            return self.source.crop(i, window)
        return window.of(whole)

    def num_bytes(self, i: int) -> int:
        """The stored size of image i."""
        return self.source.num_bytes(i)

    def _keep(self, i: int, at_least: int, image: Image.Image) -> None:
        num_bytes = 4 * image.width * image.height  # Pillow holds RGB in four bytes
        with self._lock:
            if num_bytes <= self._room:
                self._room -= num_bytes
                self._kept[i, at_least] = image


_SMALLEST = 4 * 64 * 64  # with less room than this no image is decoded whole for keeping
_PATIENCE = 16  # so many more large images than kept ones, and no further one is tried
