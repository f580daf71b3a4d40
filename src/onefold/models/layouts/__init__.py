"""The layouts that are known: tables of key names, one file a family, and `detect`."""

from __future__ import annotations

from collections.abc import Collection

from onefold.models.layouts import mobileformer as _former
from onefold.models.layouts import mobilenetv1 as _v1
from onefold.models.layouts import mobileone as _one
from onefold.models.layouts.base import Layout as Layout

OURS = Layout(
    title="onefold",
    family="",
    mark=r"stem\.conv(\.0)*\.weight",
    rename=lambda keys: {key: key for key in keys},
    variant=None,
)
LAYOUTS: tuple[Layout, ...] = (OURS, *_one.LAYOUTS, *_v1.LAYOUTS, *_former.LAYOUTS)


def detect(keys: Collection[str]) -> Layout | None:
    """The layout that these keys are of, or None."""
    return next((layout for layout in LAYOUTS if layout.is_of(keys)), None)
