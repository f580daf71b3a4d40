"""Where labels go in a crowded figure: none over another, over a point or over the edge. All lengths are in points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Spot = tuple[float, float]

_ANGLES = tuple(
    math.radians(angle) for angle in (135, 112, 158, 90, 180, 68, 202, 45, 225, 0, 22, 248, 270, 315, 292, 338)
)
_RADII = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0, 94.0)
_DOT = 4.5  # half of the side of a point's own place
_GAP = 1.5  # between two labels
_SWEEPS = 3
_LEAST_LEADER = 9.0


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        """Whether the two have a place in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def is_inside(self, other: Box) -> bool:
        """Whether it lies in the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.bottom <= self.bottom and self.top <= other.top

    def nearest(self, spot: Spot) -> Spot:
        """The place in it that is nearest to a spot."""
        return min(max(spot[0], self.left), self.right), min(max(spot[1], self.bottom), self.top)

    def grown(self, by: float) -> Box:
        """Larger by so much on every side."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)


@dataclass(frozen=True)
class Tag:
    """A text of so many points by so many that belongs to a spot."""

    spot: Spot
    width: float
    height: float


def placed(tags: Sequence[Tag], dots: Sequence[Spot], lines: Sequence[Sequence[Spot]], area: Box) -> list[Box | None]:
    """A box for each tag, or None where there is no room for it; best above to the left, near, and off the lines.

    Greedy, then better: each tag in turn is placed anew among all the others, a few times.
    """
    segments = [pair for line in lines for pair in pairwise(line)]
    own = [Box(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
    chosen: list[Box | None] = [None] * len(tags)
    for _ in range(_SWEEPS):
        for index, tag in enumerate(tags):
            others = [box for at, box in enumerate(chosen) if box is not None and at != index]
            leaders = [
                (other.spot, box.nearest(other.spot))
                for at, (other, box) in enumerate(zip(tags, chosen, strict=True))
                if box is not None and at != index
            ]
            chosen[index] = _best(tag, own, others, [*segments, *leaders], area)
    return chosen


def leader(tag: Tag, box: Box) -> tuple[Spot, Spot] | None:
    """The line that ties a label to its point, where it stands too far off to be understood without."""
    end = box.nearest(tag.spot)
    distance = math.dist(end, tag.spot)
    if distance < _LEAST_LEADER:
        return None
    share = _DOT / distance
    start = tag.spot[0] + share * (end[0] - tag.spot[0]), tag.spot[1] + share * (end[1] - tag.spot[1])
    return start, end


def _best(
    tag: Tag, dots: Sequence[Box], others: Sequence[Box], segments: Sequence[tuple[Spot, Spot]], area: Box
) -> Box | None:
    best, least = None, math.inf
    for radius in _RADII:
        for preference, angle in enumerate(_ANGLES):
            box = _box(tag, radius, angle)
            cost = radius + 0.8 * preference
            if cost >= least or not box.is_inside(area):
                continue
            if any(map(box.overlaps, dots)) or any(map(box.grown(_GAP).overlaps, others)):
                continue
            way = tag.spot, box.nearest(tag.spot)
            cost += 8.0 * sum(_crosses(segment, box) for segment in segments)
            cost += 15.0 * sum(_crosses(way, other) for other in others)
            cost += 6.0 * (sum(_crosses(way, dot) for dot in dots) - 1)
            cost += 12.0 * (sum(_is_nearer(dot, tag.spot, box) for dot in dots) - 1)
            if cost < least:
                best, least = box, cost
    return best


def _is_nearer(dot: Box, spot: Spot, box: Box) -> bool:
    """Whether a reader could take the box to belong to this point: it lies no farther from it than from its own."""
    middle = (dot.left + dot.right) / 2, (dot.bottom + dot.top) / 2
    return math.dist(middle, box.nearest(middle)) < math.dist(spot, box.nearest(spot)) + 3.0


def _box(tag: Tag, radius: float, angle: float) -> Box:
    """The tag's box in this direction: the side or the corner that faces the spot is `radius` away from it."""
    across, up = math.cos(angle), math.sin(angle)
    x, y = tag.spot[0] + radius * across, tag.spot[1] + radius * up
    left = x - tag.width if across < -0.3 else x if across > 0.3 else x - tag.width / 2
    bottom = y - tag.height if up < -0.3 else y if up > 0.3 else y - tag.height / 2
    return Box(left, bottom, left + tag.width, bottom + tag.height)


def _crosses(segment: tuple[Spot, Spot], box: Box) -> bool:
    """Whether a line from spot to spot passes through the box (Liang and Barsky)."""
    (x, y), (x_end, y_end) = segment
    enter, leave = 0.0, 1.0
    for start, step, low, high in ((x, x_end - x, box.left, box.right), (y, y_end - y, box.bottom, box.top)):
        if step == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / step, (high - start) / step))
        enter, leave = max(enter, near), min(leave, far)
    return enter < leave
