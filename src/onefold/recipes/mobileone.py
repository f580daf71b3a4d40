"""MobileOne's own training on ImageNet-1k (arXiv 2206.04040, section 4): give --data with train/ and val/.

What the paper states: from scratch, SGD with momentum, 300 epochs, batch 256, cross-entropy with label smoothing 0.1,
lr 0.1 on a cosine, weight decay 1e-4 annealed to 1e-5 on the same cosine, EMA 0.9995, S0 and S1 with random resized
crops and flips only. What it leaves open is chosen as in its public re-trainings: momentum 0.9, five epochs of
warm-up, no decay on norms and biases, annealing by step.
"""

from __future__ import annotations

from dataclasses import replace

from onefold.data import HorizontalFlip, Preprocessing, RandomResizedCrop
from onefold.recipes.recipe import Data, Expected, Recipe
from onefold.train import SGD, Cosine, Ema, Epochs, Plan, WeightDecay


def s0() -> Recipe:
    """MobileOne-S0, 71.4 % (Table 9)."""
    return Recipe(
        name="mobileone:s0",
        model="mobileone_s0",
        data=Data(),
        steps=(RandomResizedCrop(size=224, scale=(0.08, 1.0)), HorizontalFlip()),
        preprocessing=Preprocessing(size=224, crop_pct=0.875),
        plan=Plan(
            epochs=300,
            batch_size=256,
            optimizer=SGD(lr=0.1, momentum=0.9),
            schedule=Cosine(warmup=Epochs(5)),
            weight_decay=WeightDecay(start=1e-4, final=1e-5, skip=("norm", "bias")),
            label_smoothing=0.1,
            ema=Ema(decay=0.9995),
            channels_last=True,
            workers=8,
        ),
        expect=Expected(top1=71.4, source="arXiv 2206.04040, Table 9"),
    )


def s1() -> Recipe:
    """MobileOne-S1, 75.9 % (Table 9)."""
    expect = Expected(top1=75.9, source="arXiv 2206.04040, Table 9")
    preprocessing = Preprocessing(size=224, crop_pct=0.9)
    return replace(s0(), name="mobileone:s1", model="mobileone_s1", preprocessing=preprocessing, expect=expect)
