"""A folder of the user's own photos: from scratch, or from weights."""

from __future__ import annotations

from dataclasses import replace

from onefold.data import HorizontalFlip, Preprocessing, RandomResizedCrop
from onefold.recipes.recipe import Data, Int8, Recipe
from onefold.train import SGD, Cosine, Distill, Ema, Epochs, Plan, WeightDecay


def scratch() -> Recipe:
    """From scratch on a few thousand photos: MobileOne-S0 at 128 px. Give --data, and --model for another network.

    A MobileOne starts at its skips: on 2,000 photos ten epochs came to 45 %, and 26 without them to 34 %.
    """
    return Recipe(
        name="photos:scratch",
        model="mobileone_s0",
        data=Data(),
        steps=(RandomResizedCrop(size=128, scale=(0.25, 1.0)), HorizontalFlip()),
        preprocessing=Preprocessing(size=128),
        plan=Plan(
            epochs=60,
            batch_size=64,
            optimizer=SGD(lr=0.05, momentum=0.9, nesterov=True),
            schedule=Cosine(warmup=Epochs(3)),
            weight_decay=WeightDecay(start=1e-4, final=1e-5, skip=("norm", "bias")),
            label_smoothing=0.1,
            ema=Ema(decay=0.999, warmup=True),
            channels_last=True,
            workers=2,
        ),
        start="skips",
    )


def finetune() -> Recipe:
    """From ImageNet weights, fused ones too: give --data and --weights; a fitted head, then a low rate, 224 px.

    The head is first fitted to the photos, so that the first steps do not spoil the features for it (arXiv 2202.10054).
    The rate is for a fused network, which has no norms to forgive a large one: at ten times this it diverged here.
    """
    base = scratch()
    plan = replace(
        base.plan,
        epochs=3,
        batch_size=32,
        optimizer=SGD(lr=3e-4, momentum=0.9),
        schedule=Cosine(warmup=Epochs(0.5)),
        weight_decay=WeightDecay(start=1e-4, skip=("norm", "bias")),
        label_smoothing=0.0,
        layer_decay=0.7,
        ema=Ema(decay=0.98, warmup=True),
        clip_grad_norm=1.0,
    )
    return replace(
        base,
        name="photos:finetune",
        steps=(RandomResizedCrop(size=224, scale=(0.5, 1.0)), HorizontalFlip()),
        preprocessing=Preprocessing(size=224),
        plan=plan,
        head="probe",
        start="plain",
    )


def int8() -> Recipe:
    """photos:finetune for 8 bits: give --data and --weights, such as the run that photos:finetune made.

    Kernels and activations are rounded in every step as the device will round them, so what is trained is what ships.
    """
    base = finetune()
    plan = replace(base.plan, epochs=2, optimizer=SGD(lr=1e-4, momentum=0.9), layer_decay=1.0)
    return replace(base, name="photos:int8", plan=plan, head="kept", int8=Int8())


def probe() -> Recipe:
    """The quickest of all: give --data and --weights; only the last layer is fitted, at once and without steps."""
    base = finetune()
    plan = replace(base.plan, epochs=0, schedule=Cosine(), layer_decay=1.0, freeze=("stem", "stages"), ema=None)
    return replace(base, name="photos:probe", plan=plan)


def distill() -> Recipe:
    """From a teacher's answers alone: give --data and --teacher RUN, WEIGHTS, ARTIFACT or timm:NAME.

    Soft targets at temperature 1 and no labels, as MEAL V2 (arXiv 2009.08453) trains; several teachers as a list,
    --plan.distill.teacher '["a", "b"]'. With --weights it starts from those.
    """
    base = scratch()
    taught = Distill(targets="soft", temperature=1.0, weight=1.0)
    return replace(base, name="photos:distill", plan=replace(base.plan, distill=taught))
