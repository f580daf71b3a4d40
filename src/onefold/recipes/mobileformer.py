"""Mobile-Former's own training on ImageNet-1k (arXiv 2108.05895): give --data with train/ and val/.

The paper states AdamW, 450 epochs, a cosine, batch 1024, mixup, auto-augmentation and random erasing, and that rate,
decay and dropout differ with the network. The numbers are those of the command lines published with the released
weights (AAboys/MobileFormer, README); what they leave to their trainer are its defaults (timm 0.3.4): label smoothing
0.1, three epochs of warm-up from 1e-4, a last rate of 1e-5, no decay on vectors. The paper says AutoAugment and the
command lines RandAugment: the command lines are what ran. docs/recipes.md has the whole list.
"""

from __future__ import annotations

from onefold.data import HorizontalFlip, Mixing, Preprocessing, RandAugment, RandomErasing, RandomResizedCrop
from onefold.recipes.recipe import Data, Expected, Recipe, Transform
from onefold.train import AdamW, Cosine, Epochs, Plan, WeightDecay

_SOURCE = "arXiv 2108.05895; AAboys/MobileFormer"
_CROP, _FLIP = RandomResizedCrop(size=224, scale=(0.08, 1.0)), HorizontalFlip()
# rand-m9-mstd0.5; what moves in has the colour of ImageNet's mean
_RAND = RandAugment(num_ops=2, magnitude=9, std=0.5, p=0.5, reading="efficientnet", fill=(124, 116, 104))
_MIXUP = Mixing(mixup=0.2)


def m26() -> Recipe:
    """Mobile-Former-26M, 64.0 %."""
    return _recipe("26m", 64.0, _plan(8e-4, 0.08), dropout=0.1, erase=0.0)


def m52() -> Recipe:
    """Mobile-Former-52M, 68.7 %: the only one whose command line has no RandAugment."""
    return _recipe("52m", 68.7, _plan(8e-4, 0.10), dropout=0.2, erase=0.0)


def m96() -> Recipe:
    """Mobile-Former-96M, 72.8 %: the only one without mixup."""
    return _recipe("96m", 72.8, _plan(8e-4, 0.10), dropout=0.2, erase=0.0)


def m151() -> Recipe:
    """Mobile-Former-151M, 75.2 %."""
    return _recipe("151m", 75.2, _plan(9e-4, 0.10), dropout=0.2, erase=0.2)


def m214() -> Recipe:
    """Mobile-Former-214M, 76.7 %."""
    return _recipe("214m", 76.7, _plan(9e-4, 0.15), dropout=0.2, erase=0.2)


def m294() -> Recipe:
    """Mobile-Former-294M, 77.9 %."""
    return _recipe("294m", 77.9, _plan(1e-3, 0.20), dropout=0.3, erase=0.2)


def m508() -> Recipe:
    """Mobile-Former-508M, 79.3 %."""
    return _recipe("508m", 79.3, _plan(1e-3, 0.20), dropout=0.3, erase=0.2)


def _plan(lr: float, decay: float) -> Plan:
    return Plan(
        epochs=450,
        batch_size=1024,
        optimizer=AdamW(lr=lr),
        schedule=Cosine(final=1e-5, warmup=Epochs(3), warmup_from=1e-4),
        weight_decay=WeightDecay(start=decay, skip=("vector", "bias")),
        label_smoothing=0.1,
        amp="auto",
        channels_last=True,
        workers=8,
    )


def _recipe(size: str, top1: float, plan: Plan, *, dropout: float, erase: float) -> Recipe:
    steps: tuple[Transform, ...] = (_CROP, _FLIP) if size == "52m" else (_CROP, _FLIP, _RAND)
    return Recipe(
        name=f"mobileformer:{size}",
        model=f"mobileformer_{size}",
        data=Data(),
        steps=steps,
        preprocessing=Preprocessing(size=224, crop_pct=0.875),
        plan=plan,
        erase=RandomErasing(p=erase) if erase else None,
        mixing=None if size == "96m" else _MIXUP,
        dropout=dropout,
        expect=Expected(top1=top1, source=_SOURCE, cost="8 GPUs, 128 images each"),
    )
