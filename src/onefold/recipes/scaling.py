"""What changes in a recipe with the number of images in a step: one rule a hyper-parameter, each with its source.

k = the new batch size over the recipe's own. Lengths in epochs, warm-up included, stay; lengths in steps are divided by
k, so that they see as many images.
"""

from __future__ import annotations

import math
from dataclasses import replace

from onefold.errors import BadArgument
from onefold.recipes.recipe import Recipe
from onefold.train import SGD, Cosine, Exponential, Plan, Steps

LINEAR = "lr x {factor:.6g}, linear (arXiv 1706.02677)"
ROOT = "lr x {factor:.6g}, square root (arXiv 2205.10343)"
POWER = "EMA decay ^ {power:.6g} (arXiv 2307.13813)"


def scaled(recipe: Recipe, *, batch_size: int, devices: int = 1) -> Recipe:
    """The recipe on `devices` devices with `batch_size` images of a step on each, and a note that says what changed.

    The learning rate goes with k under SGD (Goyal et al., 2017) and with the root of k under AdamW and RMSprop
    (Malladi et al., 2022); the EMA's decay becomes its k-th power (Busbridge et al., 2023). All else stays.
    The expected result stays too, as what to compare with: nobody promises it at another batch size.

    Raises BadArgument where the plan cannot take the batch size.
    """
    plan, total = recipe.plan, batch_size * devices
    if batch_size < 1 or devices < 1:
        raise BadArgument(f"{batch_size} images on each of {devices} devices: expected 1 or more of both")
    if total == plan.batch_size:
        return recipe
    k = total / plan.batch_size
    rule = LINEAR if isinstance(plan.optimizer, SGD) else ROOT
    factor = k if isinstance(plan.optimizer, SGD) else math.sqrt(k)
    changed = replace(
        plan,
        batch_size=total,
        optimizer=replace(plan.optimizer, lr=plan.optimizer.lr * factor),
        schedule=_schedule(plan, factor, k),
        ema=None if plan.ema is None else replace(plan.ema, decay=plan.ema.decay**k),
    )
    rules = [rule.format(factor=factor)] + ([POWER.format(power=k)] if plan.ema else [])
    note = f"scaled from {plan.batch_size} to {total} images a step: {'; '.join(rules)}"
    return replace(recipe, plan=changed, notes=(*recipe.notes, note))


def _schedule(plan: Plan, factor: float, k: float) -> Cosine | Exponential:
    schedule = plan.schedule
    if isinstance(schedule, Exponential):
        every = schedule.every
        return replace(schedule, every=_fewer(every, k) if isinstance(every, Steps) else every)
    warmup = _fewer(schedule.warmup, k) if isinstance(schedule.warmup, Steps) else schedule.warmup
    return replace(schedule, final=schedule.final * factor, warmup=warmup, warmup_from=schedule.warmup_from * factor)


def _fewer(steps: Steps, k: float) -> Steps:
    return Steps(max(1, round(steps.count / k))) if steps.count else steps
