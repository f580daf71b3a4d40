"""Fine-tuning: frozen parts, rates by level, heads that are fitted, and fused networks that are expanded again."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import onefold
from onefold.commands.train import Callbacks, start_run
from onefold.errors import BadArgument, BadData
from onefold.models import create_model
from onefold.recipes import find_recipe
from onefold.train import SGD, Plan, decay_groups
from onefold.train.optim import (
    create_optimizer,
    freeze_,
    frozen_modules,
    layer_levels,
    layer_lr_scales,
    set_lr_and_decay_,
    train_mode_,
)
from training_kit import PLAN, StoppedError, fresh, network, stop_at

# ---------------------------------------------------------------------------------- levels and rates


def test_levels_are_the_stem_each_stage_and_the_head():
    assert layer_levels(create_model("mobileone_s1")) == ["stem", *(f"stages.{i}" for i in range(4)), "head"]
    assert layer_levels(create_model("mobileformer_26m", num_classes=2))[0::5] == ["stem", "head"]


def test_rates_fall_by_one_factor_a_level_in_closed_form():
    model = create_model("mobilenetv1_025", num_classes=3)
    plan = Plan(epochs=1, batch_size=2, optimizer=SGD(lr=0.4), layer_decay=0.5)
    optimizer = create_optimizer(model, plan)
    set_lr_and_decay_(optimizer, 0.2, 0.01)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert len(rate) == len(named)
    depth = {"stem": 6, **{f"stages.{i}": 5 - i for i in range(5)}, "head": 0}
    for name, parameter in named.items():
        level = next(path for path in depth if name.startswith(f"{path}."))
        assert rate[id(parameter)] == 0.2 * 0.5 ** depth[level]


def test_groups_that_decay_are_the_same_with_and_without_a_layer_decay():
    model = network()
    for decay in (1.0, 0.7):
        optimizer = create_optimizer(model, replace(PLAN, layer_decay=decay))
        set_lr_and_decay_(optimizer, 0.1, 0.02)
        names = {id(p): name for name, p in model.named_parameters()}
        decaying = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
        assert decaying == set(decay_groups(model, PLAN.weight_decay.skip)["decay"])


def test_a_network_that_is_no_sequence_of_levels_has_rates_too():
    scales = layer_lr_scales(nn.Linear(2, 2), 0.5)
    assert set(scales) == {"weight", "bias"}


# ------------------------------------------------------------------------------------- frozen parts


def test_what_is_frozen_does_not_move_by_a_bit_statistics_included(tmp_path: Path):
    before = network().state_dict()
    done = fresh(tmp_path, replace(PLAN, epochs=1, freeze=("0", "1")))
    for name, value in done.weights.items():
        frozen = name.split(".")[0] in ("0", "1")
        if value.is_floating_point() and value.ndim:
            assert torch.equal(value, before[name]) == frozen, name
        assert torch.equal(done.average[name], before[name]) or not frozen, name


def test_frozen_norms_keep_their_statistics_while_convolutions_learn(tmp_path: Path):
    before = network().state_dict()
    done = fresh(tmp_path, replace(PLAN, epochs=1, freeze=("norms",)))
    moved = {name for name, value in done.weights.items() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "3.weight", "3.bias", "9.weight", "9.bias"}


def test_a_run_with_frozen_parts_resumes_to_the_bit(tmp_path: Path):
    plan = replace(PLAN, epochs=2, freeze=("0", "1"), layer_decay=0.8)
    whole = fresh(tmp_path / "whole", plan)

    with pytest.raises(StoppedError):
        fresh(tmp_path / "cut", plan, on_progress=stop_at(2, 3))
    assert fresh(tmp_path / "cut", plan, resume=True).digest() == whole.digest()


def test_a_frozen_stage_of_a_real_network_gives_the_same_answer_in_training_as_in_use(seeded):
    model = create_model("mobileone_s0", num_classes=5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2.0)
    images = torch.randn(4, 3, 32, 32)
    frozen = ("stem", "stages.0")
    freeze_(model, frozen)
    train_mode_(model, frozen)
    in_training = model.stages[0](model.stem(images))
    used = copy.deepcopy(model).eval()
    torch.testing.assert_close(in_training, used.stages[0](used.stem(images)), rtol=1e-4, atol=1e-5)
    model(images).sum().backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None} == {"stem", "stages"}
    assert model.stages[1][0].conv[0][1].num_batches_tracked == 1
    assert model.stages[0][0].conv[0][1].num_batches_tracked == 0


def test_a_part_that_is_not_there_is_named_with_what_is():
    with pytest.raises(BadArgument, match=r"'stages\.9'.*did you mean stages\."):
        frozen_modules(create_model("mobilenetv1_025", num_classes=2), ("stages.9",))
    with pytest.raises(BadArgument, match="there are 0, 1"):
        frozen_modules(network(), ("backbone",))
    with pytest.raises(BadArgument, match=r"does plan\.freeze name all of it"):
        model = network()
        freeze_(model, [str(i) for i in range(10)])
        create_optimizer(model, PLAN)


def test_photos_that_are_not_there_are_said_before_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def asked(*_args: object, **_more: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("onefold.commands.train.with_preprocessing_of_weights", asked)
    monkeypatch.chdir(tmp_path)
    for given in ({"data": "fotos"}, {"data": "digits", "val": "fotos/val"}):
        with pytest.raises(BadData, match=r"^fotos\S* is not there: expected a folder of images"):
            onefold.train(recipe="photos:finetune", model="mobileone_s0", **given)


def test_what_the_data_are_is_said_before_anything_that_takes_long(tmp_path: Path, monkeypatch) -> None:
    """A head to be fitted took half a minute before a line said which classes had been found."""
    order: list[str] = []

    def then(name: str, what: object = None):  # type: ignore[no-untyped-def]
        return lambda *_, **__: (order.append(name), what)[1]

    def make_network(*_: object) -> None:
        order.append("the network")
        raise StoppedError

    monkeypatch.setattr("onefold.commands.train.measure_value_range", then("value range"))
    monkeypatch.setattr("onefold.commands.train._check", then("check"))
    monkeypatch.setattr("onefold.commands.train._start", make_network)
    callbacks = Callbacks(on_data=then("data"), on_start=then("recipe"))
    with pytest.raises(StoppedError):
        start_run(find_recipe("digits:w025"), tmp_path / "run", callbacks=callbacks)
    assert order[0] == "data"
    assert order[-3:] == ["check", "recipe", "the network"]
