"""MobileNetV1 on ImageNet-1k (arXiv 1704.04861, section 3.2): give --data with train/ and val/.

What the paper states: RMSprop, little or no weight decay on depthwise kernels, no label smoothing, less augmentation
for small networks. It gives no numbers for rate or length; those here are TF-slim's (0.045, times 0.94 every 2.5
epochs, decay 4e-5). The 200 epochs and RMSprop's own numbers are choices, not tried on ImageNet here. Asynchronous
updates are replaced by synchronous ones.
"""

from __future__ import annotations

from dataclasses import replace

from onefold.data import HorizontalFlip, Preprocessing, RandomResizedCrop
from onefold.recipes.recipe import Data, Expected, Recipe
from onefold.train import Epochs, Exponential, Plan, RMSprop, WeightDecay

_PAPER = "arXiv 1704.04861, Table 6"


def w100() -> Recipe:
    """MobileNetV1 of width 1.0, 70.6 % (Table 6)."""
    return Recipe(
        name="mobilenetv1:w100",
        model="mobilenetv1_100",
        data=Data(),
        steps=(RandomResizedCrop(size=224, scale=(0.2, 1.0)), HorizontalFlip()),
        preprocessing=Preprocessing(size=224),
        plan=Plan(
            epochs=200,
            batch_size=256,
            optimizer=RMSprop(lr=0.045, alpha=0.9, eps=1.0, momentum=0.9),
            schedule=Exponential(factor=0.94, every=Epochs(2.5)),
            weight_decay=WeightDecay(start=4e-5, skip=("norm", "bias", "depthwise")),
            channels_last=True,
            workers=8,
        ),
        expect=Expected(top1=70.6, source=_PAPER),
    )


def w025() -> Recipe:
    """MobileNetV1 of width 0.25, 50.6 % (Table 6)."""
    return replace(w100(), name="mobilenetv1:w025", model="mobilenetv1_025", expect=Expected(top1=50.6, source=_PAPER))
