"""The plan: what it refuses, how it is written, and what it means for each step and each parameter."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from onefold.errors import BadArgument
from onefold.train import (
    SGD,
    AdamW,
    Cosine,
    Ema,
    Epochs,
    Exponential,
    Plan,
    RMSprop,
    Steps,
    WeightDecay,
    decay_groups,
    learning_rate,
    weight_decay,
)
from onefold.train.optim import ema_decay
from training_kit import PLAN, network

share = st.floats(0, 1)
rate = st.floats(0, 1000)
duration = st.builds(Epochs, st.floats(0.001, 1) | st.integers(1, 1)) | st.builds(Steps, st.integers(1, 10**9))
plans = st.builds(
    Plan,
    epochs=st.integers(1, 1000),
    batch_size=st.integers(1, 1000).map(lambda n: n * 4),
    accumulate=st.sampled_from([1, 2, 4]),
    optimizer=st.builds(SGD, lr=rate, momentum=share)
    | st.builds(AdamW, lr=rate, betas=st.tuples(share, share), eps=share)
    | st.builds(RMSprop, lr=rate, alpha=share, momentum=share),
    schedule=st.builds(Cosine, final=rate, warmup=duration, warmup_from=rate)
    | st.builds(Exponential, factor=share, every=duration),
    weight_decay=st.builds(
        WeightDecay,
        start=rate,
        final=st.none() | rate,
        skip=st.lists(st.sampled_from(["norm", "bias", "vector", "depthwise"])).map(tuple),
    ),
    label_smoothing=share,
    ema=st.none() | st.builds(Ema, decay=share, warmup=st.booleans()),
    clip_grad_norm=st.none() | st.floats(1e-3, 1e3),
    amp=st.sampled_from(["off", "auto", "bf16", "fp16"]),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    workers=st.integers(0, 64),
    checkpoint_every=st.none() | duration,
)


@given(plans)
@settings(max_examples=150, deadline=None)
def test_a_plan_comes_back_from_json_as_it_was(plan: Plan) -> None:
    back = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert back == plan
    assert back.to_dict() == plan.to_dict()
    assert not plan.differences(back)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, r"plan\.epochs must be a whole number from 0 to 1e\+06, not -1"),
        ({"epochs": 2.5}, r"plan\.epochs must be a whole number.*not 2\.5"),
        ({"epochs": True}, r"plan\.epochs .*not True"),
        ({"epochs": "٣"}, r"plan\.epochs .*not '٣'"),
        ({"batch_size": 2**63}, r"plan\.batch_size .*not 9223372036854775808"),
        ({"label_smoothing": math.nan}, r"plan\.label_smoothing must be a number from 0 to 1, not nan"),
        ({"label_smoothing": -0.1}, r"plan\.label_smoothing .*not -0\.1"),
        ({"clip_grad_norm": 0}, r"plan\.clip_grad_norm must be a number from 1e-12 to 1e\+12 or none, not 0"),
        ({"clip_grad_norm": math.inf}, r"plan\.clip_grad_norm .*not inf"),
        ({"amp": "half"}, r"plan\.amp must be one of 'off', 'auto', 'bf16', 'fp16', not 'half'"),
        ({"seed": -1}, r"plan\.seed .*from 0 to .*not -1"),
        ({"channels_last": 1}, r"plan\.channels_last must be true or false, not 1"),
        (
            {"optimizer": {"kind": "SGD", "lr": "0.1"}},
            r"plan\.optimizer\.lr must be a number from 0 to 1000, not '0\.1'",
        ),
        ({"optimizer": {"kind": "SGD", "lr": 1e309}}, r"plan\.optimizer\.lr .*not inf"),
        ({"optimizer": {"kind": "Lion", "lr": 1}}, r"plan\.optimizer\.kind must be one of 'SGD', 'AdamW', 'RMSprop'"),
        ({"optimizer": {"lr": 1}}, r"plan\.optimizer\.kind must be one of .*not None"),
        ({"optimizer": {"kind": "SGD"}}, r"plan\.optimizer needs 'lr'"),
        ({"optimizer": {"kind": "SGD", "lr": 1, "momentun": 0.9}}, r"'momentun': did you mean 'momentum'\?"),
        ({"optimizer": {"kind": "SGD", "lr": 1, "nesterov": True}}, r"plan\.optimizer\.nesterov needs"),
        ({"optimizer": {"kind": "AdamW", "lr": 1, "betas": [0.9]}}, r"plan\.optimizer\.betas must be \(a number"),
        ({"weight_decay": {"skip": ["norms"]}}, r"plan\.weight_decay\.skip must be any number of one of 'norm'"),
        ({"weight_decay": {"skip": "norm"}}, r"plan\.weight_decay\.skip"),
        ({"ema": {"decay": 1.5}}, r"plan\.ema\.decay must be a number from 0 to 1, not 1\.5"),
        ({"ema": 0.9}, r"plan\.ema must be Ema or none, not 0\.9"),
        ({"epochs": {}}, r"plan\.epochs must be a whole number"),
        ({"schedule": {"kind": "Cosine", "warmup": "5 parsecs"}}, r"plan\.schedule\.warmup must be like '5 epochs'"),
        ({"schedule": {"kind": "Cosine", "warmup": "x epochs"}}, r"plan\.schedule\.warmup must be like '5 epochs'"),
        ({"schedule": {"kind": "Cosine", "warmup": "4 epochs"}}, r"plan\.schedule\.warmup must be within plan\.epochs"),
        ({"schedule": {"kind": "Exponential", "factor": 0.9, "every": "0 steps"}}, r"plan\.schedule\.every"),
        ({"checkpoint_every": "0 steps"}, r"plan\.checkpoint_every"),
        ({"accumulate": 3}, r"plan\.accumulate must divide plan\.batch_size, but 3 does not divide 4"),
        ({"epocs": 3}, r"plan has no field 'epocs': did you mean 'epochs'\?"),
        ({"xyz": 3}, r"plan has no field 'xyz'; it has epochs, batch_size"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name_range_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        Plan.from_dict({**PLAN.to_dict(), **change})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BadArgument, match=r"plan needs 'batch_size', 'optimizer': give it as plan\.batch_size"):
        Plan.from_dict({"epochs": 3})


def test_durations_are_written_as_they_are_read() -> None:
    plan = replace(PLAN, schedule=Exponential(factor=0.94, every=Epochs(2.5)), checkpoint_every=Steps(7))
    assert plan.to_dict()["schedule"]["every"] == "2.5 epochs"
    assert plan.to_dict()["checkpoint_every"] == "7 steps"
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Epochs(2.5).steps(10) == 25


def test_mechanics_are_no_difference() -> None:
    other = replace(PLAN, workers=4, checkpoint_every=None, seed=9, optimizer=AdamW(lr=1e-3))
    assert [d.split(":")[0] for d in PLAN.differences(other)] == ["optimizer", "seed"]


def test_a_batch_is_a_share_of_a_step() -> None:
    plan = replace(PLAN, batch_size=256, accumulate=4)
    assert plan.images_per_batch() == 64
    assert replace(plan, logical_workers=8).images_per_batch() == 8
    with pytest.raises(BadArgument, match="choose a multiple of 12"):
        replace(plan, logical_workers=3).images_per_batch()


# ------------------------------------------------------------------- closed forms, written again


@pytest.mark.parametrize(
    ("warmup", "warm"), [(Steps(0), 0), (Steps(7), 7), (Epochs(1), 10), (Epochs(0.5), 5), (Epochs(4), 40)]
)
def test_cosine_at_every_step(warmup: Steps | Epochs, warm: int) -> None:
    per_epoch, num_epochs, peak, final, first = 10, 4, 0.4, 2e-4, 0.05
    schedule = Cosine(final=final, warmup=warmup, warmup_from=first)
    plan = replace(PLAN, epochs=num_epochs, optimizer=SGD(lr=peak), schedule=schedule)
    for t in range(40):
        if t < warm:
            expected = first * (1 - t / warm) + peak * t / warm
        else:
            turn = torch.tensor(math.pi * (t - warm) / (40 - warm), dtype=torch.float64)
            expected = float(final + (peak - final) * torch.cos(turn / 2) ** 2)  # (1 + cos x) / 2 = cos^2 (x / 2)
        assert learning_rate(plan, t, per_epoch) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_exponential_at_every_step() -> None:
    plan = replace(PLAN, epochs=10, optimizer=SGD(lr=0.045), schedule=Exponential(factor=0.94, every=Epochs(2.5)))
    rate, expected = 0.045, []
    for t in range(40):  # 4 steps an epoch, so a stair every 10
        rate = rate * 0.94 if t in (10, 20, 30) else rate
        expected.append(rate)
    assert [learning_rate(plan, t, 4) for t in range(40)] == pytest.approx(expected, rel=1e-12)


def test_weight_decay_goes_down_as_mobileone_states() -> None:
    plan = replace(PLAN, epochs=5, weight_decay=WeightDecay(start=1e-4, final=1e-5))
    for t in range(50):
        expected = 1e-5 + (9e-5) / 2 * (1 + math.cos(math.pi * t / 50))
        assert weight_decay(plan, t, 10) == pytest.approx(expected, rel=1e-12)
    constant = replace(plan, weight_decay=WeightDecay(start=4e-5))
    assert {weight_decay(constant, t, 10) for t in range(50)} == {4e-5}


def test_ema_decay_warms_up() -> None:
    assert [ema_decay(Ema(decay=0.5, warmup=True), t) for t in (0, 1, 5, 8, 9, 100)] == [
        1 / 10,
        2 / 11,
        6 / 15,
        0.5,
        0.5,
        0.5,
    ]
    assert ema_decay(Ema(decay=0.9995), 0) == 0.9995


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    plan = replace(PLAN, schedule=Cosine(warmup=Steps(100)))
    with pytest.raises(BadArgument, match="within the run's 18 steps, not 100 steps"):
        learning_rate(plan, 0, 6)


# ----------------------------------------------------------------------------- who is decayed


def test_decay_groups_by_kind() -> None:
    model = nn.Sequential(*network().children(), nn.LayerNorm(6), nn.Conv1d(4, 8, 1, groups=4))
    model.token = nn.Parameter(torch.zeros(6))
    model[0].weight.requires_grad_(False)
    everything = [n for n, p in model.named_parameters() if p.requires_grad]
    spared = {
        (): [],
        ("norm",): ["1.weight", "1.bias", "4.weight", "4.bias", "10.weight", "10.bias"],
        ("bias",): ["3.bias", "9.bias", "11.bias"],
        ("depthwise",): ["3.weight", "11.weight"],
        ("norm", "bias", "depthwise"): [
            *("1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias"),
            *("9.bias", "10.weight", "10.bias", "11.weight", "11.bias"),
        ],
        ("vector",): [
            *("token", "1.weight", "1.bias", "3.bias", "4.weight", "4.bias"),
            *("9.bias", "10.weight", "10.bias", "11.bias"),
        ],
    }
    for skip, names in spared.items():
        groups = decay_groups(model, skip)  # type: ignore[arg-type]
        assert groups["skip"] == names
        assert groups["decay"] == [name for name in everything if name not in names]
