"""The catalogue: the networks by name, each with its training structure, its input and its published accuracy."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onefold.errors import BadArgument

if TYPE_CHECKING:
    from onefold.models.layers import Classifier

_Build = Callable[[int, int], "Classifier"]


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """A row of the catalogue.

    `build_model(num_classes, in_chans)` gives the training network; `input` says how its images are prepared (the keys
    of `Preprocessing`); `top1` is the accuracy that `source` states for ImageNet-1k in percent, None where none does.
    `weights` is the id on the Hugging Face hub of released ImageNet weights, "" where none are known.
    """

    build: _Build
    input: Mapping[str, Any]
    top1: float | None = None
    source: str = ""
    weights: str = ""

    @property
    def size(self) -> int:
        """The side of the square images that it is used on, in pixels."""
        return int(self.input["size"])


def _input(*, crop_pct: float = 0.875, interpolation: str = "bilinear", centred: bool = False) -> Mapping[str, Any]:
    """224 pixels, with ImageNet's mean and deviation, or centred: all 0.5, so that images lie in [-1, 1]."""
    mean, std = ((0.5, 0.5, 0.5),) * 2 if centred else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return {
        "size": 224,
        "crop_pct": crop_pct,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "channels": 3,
    }


_IMAGENET, _CROP_90, _CENTRED = _input(), _input(crop_pct=0.9), _input(centred=True)
_CENTRED_BICUBIC = _input(centred=True, interpolation="bicubic")


def _mobileone(variant: str) -> _Build:
    def build(num_classes: int, in_chans: int) -> Classifier:
        from onefold.models import mobileone  # the names are there before torch is imported

        return mobileone.mobileone(mobileone.VARIANTS[variant], num_classes, in_chans)

    return build


def _mobileformer(variant: str) -> _Build:
    def build(num_classes: int, in_chans: int) -> Classifier:
        from onefold.models import mobileformer

        return mobileformer.mobileformer(variant, num_classes, in_chans)

    return build


def _mobilenet(details: str = "PAPER_DETAILS", **variant: Any) -> _Build:
    def build(num_classes: int, in_chans: int) -> Classifier:
        from onefold.models import mobilenetv1 as v1

        layers = {"layers": v1.SHALLOW_LAYERS} if variant.get("layers") == "shallow" else {}
        made = v1.Variant(**{**variant, **layers, "flavour": getattr(v1, details)})
        return v1.mobilenetv1(made, num_classes, in_chans)

    return build


_APPLE = "timm/mobileone_s{}.apple_in1k"
_ONE = "arXiv 2206.04040, Table 9"
_FORMER = "arXiv 2108.05895 and its released code"
_V1 = "arXiv 1704.04861, Table 6"
_SLIM = "TF-slim mobilenet_v1.md, checkpoints of 2018-02-22"

CATALOGUE: dict[str, CatalogueEntry] = {
    # MobileOne. The paper states no crop; these are the ones that timm gives its weights.
    "mobileone_s0": CatalogueEntry(
        build=_mobileone("s0"), input=_IMAGENET, top1=71.4, source=_ONE, weights=_APPLE.format(0)
    ),
    "mobileone_s1": CatalogueEntry(
        build=_mobileone("s1"), input=_CROP_90, top1=75.9, source=_ONE, weights=_APPLE.format(1)
    ),
    "mobileone_s2": CatalogueEntry(
        build=_mobileone("s2"), input=_CROP_90, top1=77.4, source=_ONE, weights=_APPLE.format(2)
    ),
    "mobileone_s3": CatalogueEntry(
        build=_mobileone("s3"), input=_CROP_90, top1=78.1, source=_ONE, weights=_APPLE.format(3)
    ),
    "mobileone_s4": CatalogueEntry(
        build=_mobileone("s4"), input=_CROP_90, top1=79.4, source=_ONE, weights=_APPLE.format(4)
    ),
    # Mobile-Former, named by its published million FLOPs.
    "mobileformer_26m": CatalogueEntry(build=_mobileformer("26m"), input=_IMAGENET, top1=64.0, source=_FORMER),
    "mobileformer_52m": CatalogueEntry(build=_mobileformer("52m"), input=_IMAGENET, top1=68.7, source=_FORMER),
    "mobileformer_96m": CatalogueEntry(build=_mobileformer("96m"), input=_IMAGENET, top1=72.8, source=_FORMER),
    "mobileformer_151m": CatalogueEntry(build=_mobileformer("151m"), input=_IMAGENET, top1=75.2, source=_FORMER),
    "mobileformer_214m": CatalogueEntry(build=_mobileformer("214m"), input=_IMAGENET, top1=76.7, source=_FORMER),
    "mobileformer_294m": CatalogueEntry(build=_mobileformer("294m"), input=_IMAGENET, top1=77.9, source=_FORMER),
    "mobileformer_508m": CatalogueEntry(build=_mobileformer("508m"), input=_IMAGENET, top1=79.3, source=_FORMER),
    # MobileNetV1, named by its width in percent; after a dot the flavour of somebody's released weights.
    "mobilenetv1_100": CatalogueEntry(build=_mobilenet(width=1.0), input=_IMAGENET, top1=70.6, source=_V1),
    "mobilenetv1_075": CatalogueEntry(build=_mobilenet(width=0.75), input=_IMAGENET, top1=68.4, source=_V1),
    "mobilenetv1_050": CatalogueEntry(build=_mobilenet(width=0.5), input=_IMAGENET, top1=63.7, source=_V1),
    "mobilenetv1_025": CatalogueEntry(build=_mobilenet(width=0.25), input=_IMAGENET, top1=50.6, source=_V1),
    "mobilenetv1_100.tf": CatalogueEntry(
        build=_mobilenet("TF_SLIM_DETAILS", width=1.0), input=_CENTRED, top1=70.9, source=_SLIM
    ),
    "mobilenetv1_075.tf": CatalogueEntry(
        build=_mobilenet("TF_SLIM_DETAILS", width=0.75), input=_CENTRED, top1=68.4, source=_SLIM
    ),
    "mobilenetv1_050.tf": CatalogueEntry(
        build=_mobilenet("TF_SLIM_DETAILS", width=0.5), input=_CENTRED, top1=63.3, source=_SLIM
    ),
    "mobilenetv1_025.tf": CatalogueEntry(
        build=_mobilenet("TF_SLIM_DETAILS", width=0.25), input=_CENTRED, top1=49.8, source=_SLIM
    ),
    "mobilenetv1_100.timm": CatalogueEntry(
        build=_mobilenet("TIMM_DETAILS", width=1.0),
        input=_CENTRED_BICUBIC,
        top1=75.388,
        source="timm, ra4_e3600_r224_in1k at 224",
        weights="timm/mobilenetv1_100.ra4_e3600_r224_in1k",
    ),
    "mobilenetv1_075.timm": CatalogueEntry(build=_mobilenet("TIMM_DETAILS", width=0.75), input=_CENTRED_BICUBIC),
    "mobilenetv1_050.timm": CatalogueEntry(build=_mobilenet("TIMM_DETAILS", width=0.5), input=_CENTRED_BICUBIC),
    "mobilenetv1_025.timm": CatalogueEntry(build=_mobilenet("TIMM_DETAILS", width=0.25), input=_CENTRED_BICUBIC),
    "mobilenetv1_100.leaky": CatalogueEntry(build=_mobilenet("LEAKY_RELU_DETAILS", width=1.0), input=_IMAGENET),
    "mobilenetv1_075.leaky": CatalogueEntry(build=_mobilenet("LEAKY_RELU_DETAILS", width=0.75), input=_IMAGENET),
    "mobilenetv1_050.leaky": CatalogueEntry(build=_mobilenet("LEAKY_RELU_DETAILS", width=0.5), input=_IMAGENET),
    "mobilenetv1_025.leaky": CatalogueEntry(
        build=_mobilenet("LEAKY_RELU_DETAILS", width=0.25),
        input=_IMAGENET,
        top1=46.58,
        source="stated in the released checkpoint",
    ),
    # The two that the MobileNetV1 paper compares with.
    "conv_mobilenet_100": CatalogueEntry(
        build=_mobilenet(separable=False),
        input=_IMAGENET,
        top1=71.7,
        source="arXiv 1704.04861, Table 4",
    ),
    "mobilenetv1_shallow": CatalogueEntry(
        build=_mobilenet(layers="shallow"),
        input=_IMAGENET,
        top1=65.3,
        source="arXiv 1704.04861, Table 5; its width is not stated, its parameters and multiply-adds are those of 1.0",
    ),
}

_SPELLINGS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^mobile_(one|former|net)", r"mobile\1"),
    (r"^mobilenet_v1", "mobilenetv1"),
    (r"^mobilenetv1(?=\.[a-z]|$)", "mobilenetv1_100"),
    (r"^mobilenetv1_(\d)\.(\d+)", lambda match: f"mobilenetv1_{match[1]}{match[2]:0<2}"),
    (r"^conv_mobilenet$", "conv_mobilenet_100"),
)


_FEWEST_LETTERS = 4  # of the beginning of a name, by which it is found
_ALIKE = str.maketrans("01", "ol")  # characters that are taken for each other


def resolve_name(name: str) -> str:
    """The catalogue's name for `name`: case, dashes and a few usual spellings do not matter.

    Raises BadArgument, with the nearest names, for one that is not there.
    """
    spelled = name.strip().lower().replace("-", "_")
    for pattern, proper in _SPELLINGS:
        spelled = re.sub(pattern, proper, spelled)
    if spelled not in CATALOGUE:
        alike = [name for name in CATALOGUE if name.translate(_ALIKE) == spelled.translate(_ALIKE)]
        begun = [name for name in CATALOGUE if len(spelled) >= _FEWEST_LETTERS and name.startswith(spelled)][:3]
        near = alike or begun or difflib.get_close_matches(spelled, CATALOGUE, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() gives all names"
        raise BadArgument(f"there is no model {name!r}: {hint}")
    return spelled


def list_models(pattern: str = "*") -> list[str]:
    """The catalogue's names that match a shell pattern, such as "mobileone*"."""
    return fnmatch.filter(CATALOGUE, pattern.lower())


def build_model(name: str, num_classes: int = 1000, in_chans: int = 3) -> Classifier:
    """The training network of a name, in train mode, with random initialization. Raises BadArgument."""
    from onefold.reparam import quickest, set_route_

    known = resolve_name(name)
    if num_classes < 0 or in_chans < 1:
        raise BadArgument(f"num_classes must be 0 or more and in_chans 1 or more, not {num_classes} and {in_chans}")
    model = CATALOGUE[known].build(num_classes, in_chans)
    set_route_(model, quickest)
    return model
