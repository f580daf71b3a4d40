"""The schedules of every recipe against closed forms written independently, at every step of a whole run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from onefold.data import ProgressiveAugment
from onefold.recipes import Recipe, all_recipes, find_recipe, scale_to_batch_size
from onefold.train import SGD, AdamW, Cosine, Ema, Exponential, learning_rate, weight_decay
from onefold.train.optim import ModelEma, create_optimizer, ema_decay, set_lr_and_decay_

PER_EPOCH = 12
ALL = pytest.mark.parametrize("recipe", all_recipes(), ids=lambda recipe: recipe.name)
Floats = NDArray[np.float64]


def expected_rates(recipe: Recipe) -> Floats:
    """Piecewise: a line through the warm-up, then lr cos^2 of a quarter turn; or stairs as a product of steps."""
    plan = recipe.plan
    total, peak, schedule = plan.epochs * PER_EPOCH, plan.optimizer.lr, plan.schedule
    t = np.arange(total, dtype=np.float64)
    if isinstance(schedule, Exponential):
        stair = np.ones(total)
        stair[round(schedule.every.count * PER_EPOCH) :: round(schedule.every.count * PER_EPOCH)] = schedule.factor
        return peak * np.cumprod(stair)
    assert isinstance(schedule, Cosine)
    warm = round(schedule.warmup.count * PER_EPOCH)
    line = np.interp(t, [0, warm], [schedule.warmup_from, peak])
    turn = np.cos((t - warm) / (total - warm) * math.pi / 2) ** 2
    return np.where(t < warm, line, schedule.final * (1 - turn) + peak * turn)


@ALL
def test_rates_at_every_step_of_the_run(recipe: Recipe) -> None:
    plan = recipe.plan
    steps = range(plan.epochs * PER_EPOCH)
    rates = np.array([learning_rate(plan, t, PER_EPOCH) for t in steps])
    np.testing.assert_allclose(rates, expected_rates(recipe), rtol=1e-9, atol=1e-15)
    decays = np.array([weight_decay(plan, t, PER_EPOCH) for t in steps])
    start, final = plan.weight_decay.start, plan.weight_decay.final
    turn = np.cos(np.arange(len(steps)) / len(steps) * math.pi / 2) ** 2
    expected = np.full(len(steps), start) if final is None else final * (1 - turn) + start * turn
    np.testing.assert_allclose(decays, expected, rtol=1e-12)


def test_decay_and_rate_of_mobileone_fall_on_one_cosine() -> None:
    """The paper: the same cosine. So without warm-up lr / 0.1 is (decay - 1e-5) / 9e-5 at every step."""
    plan = replace(find_recipe("mobileone:s2").plan, schedule=Cosine())
    for t in range(plan.epochs * 7):
        share = (weight_decay(plan, t, 7) - 1e-5) / 9e-5
        assert learning_rate(plan, t, 7) / 0.1 == pytest.approx(share, rel=1e-9, abs=1e-12)


@ALL
def test_curriculum_at_every_epoch_of_the_run(recipe: Recipe) -> None:
    transform = recipe.transform
    if not isinstance(transform, ProgressiveAugment):
        assert recipe.curriculum is None
        return
    found = [transform.at_epoch(n) for n in range(recipe.plan.epochs)]
    sizes = np.repeat([160, 192, 224], [37, 75, 188])
    strengths = np.repeat([0.3, 0.7, 1.0], [37, 75, 188])
    assert [augment.preprocessing.size for augment in found] == sizes.tolist()
    assert [augment.steps[0].size for augment in found] == sizes.tolist()  # type: ignore[attr-defined]
    assert [augment.steps[2].strength for augment in found] == strengths.tolist()  # type: ignore[attr-defined]
    assert found[-1] == recipe.augment


def test_the_optimizer_is_given_these_rates() -> None:
    """Under gradients of 0 the weight falls by what rate and decay say, and the bias, which is spared, stays."""
    plan = find_recipe("mobileone:s0").plan
    model = nn.Conv2d(1, 1, 1).double()
    optimizer = create_optimizer(model, plan)
    weight, velocity = 1.0, 0.0
    nn.init.ones_(model.weight)
    bias = model.bias.detach().clone()
    for t in range(300):
        lr, decay = learning_rate(plan, t, 1), weight_decay(plan, t, 1)
        set_lr_and_decay_(optimizer, lr, decay)
        model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
        optimizer.step()
        velocity = 0.9 * velocity + decay * weight
        weight -= lr * velocity
    assert model.weight.item() == pytest.approx(weight, rel=1e-12)
    assert weight < 0.99
    assert torch.equal(model.bias.detach(), bias)


@pytest.mark.parametrize("ema", [Ema(decay=0.9995), Ema(decay=0.97, warmup=True)])
def test_the_average_at_every_step(ema: Ema) -> None:
    """As one weighted sum of all weights so far, the weights being products of what later steps have kept."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 5.0)
    average = ModelEma(model, ema)
    rng = np.random.default_rng(0)
    seen, kept = [5.0], [1.0]
    for t in range(600):
        value = float(rng.normal())
        nn.init.constant_(model.weight, value)
        average.update_(model, t)
        keeps = min(ema.decay, (t + 1) / (t + 10)) if ema.warmup else ema.decay
        assert ema_decay(ema, t) == keeps
        seen, kept = [*seen, value], [share * keeps for share in kept] + [1 - keeps]
        assert math.fsum(kept) == pytest.approx(1.0, abs=1e-12)
        if t % 20 == 0 or t > 590:
            weight = dict(average.module.named_parameters())["weight"]
            assert float(weight) == pytest.approx(np.dot(seen, kept), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("k", [2, 8, 64])
def test_the_rules_of_scaling_do_what_their_sources_derive(k: int) -> None:
    """k steps of the recipe and one of the scaled one: the same distance under SGD, the same memory of the average."""
    for name, kind, power in (("mobileone:s0", SGD, 1.0), ("mobileformer:26m", AdamW, 0.5)):
        recipe = find_recipe(name)
        bigger = scale_to_batch_size(recipe, batch_size=recipe.plan.batch_size * k)
        assert isinstance(bigger.plan.optimizer, kind)
        for epoch in (0, 3, 50, recipe.plan.epochs - 1):
            own = learning_rate(recipe.plan, epoch * 64, 64)  # 64 steps an epoch
            theirs = learning_rate(bigger.plan, epoch * (64 // k), 64 // k)
            assert theirs == pytest.approx(own * k**power, rel=1e-9, abs=1e-18)
        if recipe.plan.ema and bigger.plan.ema:
            assert bigger.plan.ema.decay == pytest.approx(math.exp(k * math.log(recipe.plan.ema.decay)), rel=1e-12)
