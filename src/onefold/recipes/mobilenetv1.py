"""MobileNetV1 on ImageNet-1k (arXiv 1704.04861, section 3.2): give --data with train/ and val/.

What the paper states: RMSprop, asynchronous descent as for Inception V3, little or no weight decay on depthwise
kernels, no label smoothing, less augmentation for small networks, the same hyper-parameters at every size. It gives no
numbers for rate or length; those here are TF-slim's (0.045, times 0.94 every 2.5 epochs, decay 4e-5). The 200 epochs
and RMSprop's own numbers are choices, not tried on ImageNet here. Asynchronous updates are replaced by synchronous
ones: docs/recipes.md says why.

Each function takes a size in pixels: 128, 160, 192 and 224 have an expected result.
"""

from __future__ import annotations

from dataclasses import replace

from onefold.data import HorizontalFlip, Preprocessing, RandAugment, RandomResizedCrop
from onefold.recipes.recipe import Data, Expected, Recipe
from onefold.train import SGD, Cosine, Ema, Epochs, Exponential, Plan, RMSprop, WeightDecay

_PAPER = "arXiv 1704.04861, Tables 6 and 7"
_SLIM = "TF-slim mobilenet_v1.md, checkpoints of 2018-02-22"

# Top-1 by width in percent, then size. The paper prints seven of the 16 as numbers, TF-slim trained all of them.
_PRINTED = {(100, 224): 70.6, (100, 192): 69.1, (100, 160): 67.2, (100, 128): 64.4}
_PRINTED |= {(75, 224): 68.4, (50, 224): 63.7, (25, 224): 50.6}
_RELEASED = {(75, 192): 67.2, (75, 160): 65.3, (75, 128): 62.1, (50, 192): 61.7, (50, 160): 59.1, (50, 128): 56.3}
_RELEASED |= {(25, 192): 47.7, (25, 160): 45.5, (25, 128): 41.5}


def w100(size: int = 224) -> Recipe:
    """MobileNetV1 of width 1.0, 70.6 % at 224 px."""
    return _paper(100, size)


def w075(size: int = 224) -> Recipe:
    """MobileNetV1 of width 0.75, 68.4 % at 224 px."""
    return _paper(75, size)


def w050(size: int = 224) -> Recipe:
    """MobileNetV1 of width 0.5, 63.7 % at 224 px."""
    return _paper(50, size)


def w025(size: int = 224) -> Recipe:
    """MobileNetV1 of width 0.25, 50.6 % at 224 px."""
    return _paper(25, size)


def modern(size: int = 224) -> Recipe:
    """MobileNetV1 of width 1.0 by MobileOne's plan and a mild RandAugment; no result of it is published.

    For another width give --model. To compare with: timm's own, much longer, recipe reaches 75.4 % in 3600 epochs.
    """
    plan = Plan(
        epochs=300,
        batch_size=256,
        optimizer=SGD(lr=0.1, momentum=0.9, nesterov=True),
        schedule=Cosine(warmup=Epochs(5)),
        weight_decay=WeightDecay(start=4e-5, final=4e-6, skip=("norm", "bias", "depthwise")),
        label_smoothing=0.1,
        ema=Ema(decay=0.9995),
        amp="auto",
        channels_last=True,
        workers=8,
    )
    crop = RandomResizedCrop(size=size, scale=(0.2, 1.0))
    steps = (crop, HorizontalFlip(), RandAugment(num_ops=2, magnitude=5, std=0.5, p=0.5, reading="increasing"))
    return replace(_paper(100, size), name="mobilenetv1:modern", steps=steps, plan=plan, expect=None)


def _paper(percent: int, size: int) -> Recipe:
    return Recipe(
        name=f"mobilenetv1:w{percent:03d}",
        model=f"mobilenetv1_{percent:03d}",
        data=Data(),
        steps=(RandomResizedCrop(size=size, scale=(0.2, 1.0)), HorizontalFlip()),
        preprocessing=Preprocessing(size=size),
        plan=Plan(
            epochs=200,
            batch_size=256,
            optimizer=RMSprop(lr=0.045, alpha=0.9, eps=1.0, momentum=0.9),
            schedule=Exponential(factor=0.94, every=Epochs(2.5)),
            weight_decay=WeightDecay(start=4e-5, skip=("norm", "bias", "depthwise")),
            amp="auto",
            channels_last=True,
            workers=8,
        ),
        expect=_expected(percent, size),
    )


def _expected(percent: int, size: int) -> Expected | None:
    if (percent, size) in _PRINTED:
        return Expected(top1=_PRINTED[percent, size], source=_PAPER)
    top1 = _RELEASED.get((percent, size))
    return None if top1 is None else Expected(top1=top1, source=_SLIM)
