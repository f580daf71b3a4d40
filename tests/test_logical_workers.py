"""Logical workers: one result at any number of processes, also where each life has another and none ends well."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from onefold.errors import BadArgument, BadData, LostWorker, Stopped
from onefold.train import Checkpoint, Plan, Steps, World, worker_batches
from onefold.train.gradient_reduction import _ExactReducer, create_reducer
from onefold.train.step import TrainState
from training_kit import PLAN, Blobs, fresh, network
from training_processes import Lives, Order, must_hold_every_image_once, samples_of

FOUR = replace(PLAN, epochs=2, batch_size=16, logical_workers=4, reduce="exact", checkpoint_every=Steps(3))


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    server = Lives()
    yield server
    server.close()


def run(lives: Lives, out: Path, plan: Plan, processes: int = 1, **more: Any) -> tuple[Order, Checkpoint]:
    order = Order(out=str(out), plan=plan.to_dict(), processes=processes, **more)
    lives.to_the_end(order)
    return order, Checkpoint.load(out)


def must_be_equal(a: Checkpoint, b: Checkpoint) -> None:
    """Weights, average, optimizer, metrics, sums and random states, to the last bit."""
    assert a.digest() == b.digest()
    assert (a.position, a.metrics, a.best, a.scaler) == (b.position, b.metrics, b.best, b.scaler)
    assert a.randomness.numbers == b.randomness.numbers
    for name, value in a.randomness.tensors.items():
        assert value.equal(b.randomness.tensors[name]), name


# --------------------------------------------------------------------------- one result at any number

VARIANTS = {
    "plain": FOUR,
    "pieces": replace(FOUR, accumulate=2, clip_grad_norm=None),
    "bf16": replace(FOUR, amp="bf16", channels_last=True),
    "fp16": replace(FOUR, amp="fp16", epochs=1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_two_and_four_processes_give_the_same_bits(lives: Lives, tmp_path: Path, name: str) -> None:
    plan = VARIANTS[name]
    orders, ends = zip(*(run(lives, tmp_path / str(w), plan, w, num_images=88) for w in (1, 2, 4)), strict=True)
    for order, end in zip(orders, ends, strict=True):
        must_be_equal(end, ends[0])
        assert samples_of(order) == samples_of(orders[0])  # the last batch of an epoch has 8 images
        must_hold_every_image_once(order)


def test_fast_takes_the_same_samples_and_rounds_its_own_way(lives: Lives, tmp_path: Path) -> None:
    plan = replace(FOUR, reduce="fast", amp="off", epochs=1)
    orders, ends = zip(*(run(lives, tmp_path / str(w), plan, w, num_images=88) for w in (1, 4)), strict=True)
    _, exact = run(lives, tmp_path / "exact", replace(plan, reduce="exact"), num_images=88)
    assert samples_of(orders[0]) == samples_of(orders[1])
    for end in ends:
        for name, value in exact.weights.items():
            assert torch.allclose(end.weights[name], value, rtol=1e-3, atol=1e-5), name


def test_the_number_of_workers_is_part_of_what_is_computed(tmp_path: Path) -> None:
    """One worker has one BatchNorm over the batch, four have four; but the samples are the same."""
    data = Blobs(num_images=64, batch_size=16)
    ends = [fresh(tmp_path / str(v), replace(FOUR, epochs=1, logical_workers=v), data) for v in (1, 4)]
    assert ends[0].digest() != ends[1].digest()
    assert ends[0].num_images == ends[1].num_images


# ----------------------------------------------------------------- what a step computes, derived again


class Still(nn.Module):
    """A network without norms and chance: its step is the plain one whatever the number of workers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Tanh(), nn.Linear(10, 6)).double()
        self.idle = nn.Parameter(torch.zeros(2))  # that no gradient reaches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x.double())
        return out


@pytest.mark.parametrize("reduce", ["exact", "fast"])
@pytest.mark.parametrize("missing", [0, 3])
def test_workers_take_the_step_of_the_whole_batch(reduce: str, missing: int) -> None:
    """In float64; also where images could not be read, and workers have unequal shares."""
    images, labels = torch.randn(16 - missing, 3, 8, 8), torch.arange(16 - missing) % 6
    plan = replace(FOUR, reduce=reduce, ema=None)  # type: ignore[arg-type]
    model = Still()
    state = TrainState(model, plan, World(), steps_per_epoch=4)
    pieces = [(images[v::4], labels[v::4]) for v in range(4)]
    whole = TrainState(Still(), replace(plan, logical_workers=1), World(), steps_per_epoch=4)
    for _ in range(3):
        assert state.step(pieces) == pytest.approx(whole.step([(images, labels)]), rel=1e-12)
    assert state.num_images == whole.num_images == 3 * (16 - missing)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=1e-10, atol=1e-13), name


def test_buffers_become_the_mean_over_workers_and_counters_count_steps() -> None:
    plan = replace(FOUR, ema=None, clip_grad_norm=None)
    model = network()
    state = TrainState(model.train(), plan, World(), steps_per_epoch=4)
    pieces = list(Blobs(num_images=16).epoch(0))
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    conv.load_state_dict({"weight": model[0].weight})
    state.step(pieces)
    means = torch.stack([conv(images).mean((0, 2, 3)) for images, _ in pieces]).mean(0)
    assert torch.allclose(model[1].running_mean, 0.1 * means, rtol=1e-4, atol=1e-6)
    assert model[1].num_batches_tracked == 1


def test_the_tree_is_the_tree() -> None:
    """The order of additions, on numbers for which every order has another sum."""
    plan = replace(FOUR, logical_workers=8, batch_size=8)
    model = nn.Linear(1, 1, bias=False)
    values = torch.tensor([1e8, 1.0, -1e8, 3.0, 7.0, 1e7, -1e7, 0.1])
    reducer = create_reducer(model, plan, World())
    assert isinstance(reducer, _ExactReducer)
    reducer.begin_step()
    for value in values:
        model.weight.grad = value.reshape(1, 1).clone()
        reducer.add_worker(torch.zeros(()), 1)
    reducer.finish_step()
    while len(values) > 1:
        values = values[::2] + values[1::2]
    assert model.weight.grad is not None
    assert model.weight.grad.item() == values.item() != 11.1


class Faulty(torch.autograd.Function):
    """The identity, whose backward raises what is in `error`."""

    error = ""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(Faulty.error)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("the skip connection expects 8 channels", RuntimeError),
        ("recv: Broken pipe in our own Socket layer", RuntimeError),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [::1]:7", LostWorker),
        ("NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited", LostWorker),
    ],
)
@pytest.mark.parametrize("within", ["forward", "backward"])
def test_an_error_of_the_model_is_no_lost_process(
    text: str, error: type[Exception], within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it speaks of: only what a communication back end has signed is."""

    class Failing(Still):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if within == "forward":
                raise RuntimeError(text)
            out: torch.Tensor = Faulty.apply(super().forward(x))
            return out

    monkeypatch.setattr(Faulty, "error", text)
    state = TrainState(Failing(), replace(FOUR, ema=None), World(), steps_per_epoch=4)
    with pytest.raises(error, match=re.escape(text[:30])) as raised:
        state.step(list(Blobs(num_images=16).epoch(0)))
    assert isinstance(raised.value, LostWorker) == (error is LostWorker)


def test_each_worker_has_its_own_random_numbers(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Drawing(Still):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            drawn.append(torch.rand(1).item())
            return super().forward(x)

    plan = replace(FOUR, ema=None)
    state = TrainState(Drawing(), plan, World(), steps_per_epoch=4)
    for _ in range(2):
        state.step(list(Blobs(num_images=16).epoch(0)))
    assert len(set(drawn)) == 8


# ------------------------------------------------------------------------ batches, and what is refused


def test_batches_come_a_worker_at_a_time_and_from_any_step() -> None:
    plan = replace(FOUR, accumulate=2)
    data = Blobs(num_images=80, batch_size=8)  # 10 batches, 5 steps

    def of(world: World) -> Any:
        return worker_batches(lambda v: replace(data, worker=v, num_workers=4), plan, world)

    one, last = of(World()), of(World(rank=1, size=2))
    assert (len(one), len(last)) == (40, 20)
    whole = [labels.tolist() for _, labels in one.epoch(3)]
    assert len(whole) == 40
    assert [labels.tolist() for _, labels in one.epoch(3, 16)] == whole[16:]
    second = [labels.tolist() for _, labels in last.epoch(3)]
    assert second == [x for step in range(5) for x in whole[8 * step + 4 : 8 * step + 8]]
    assert one.fingerprint() == data.fingerprint()
    with pytest.raises(BadArgument, match="batch 6 is within one"):
        one.epoch(3, 6)
    stream = one.epoch(3)
    list(islice(stream, 3))
    stream.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(PLAN, logical_workers=3, reduce="exact"), r"must be a power of two .* not 3"),
        (lambda: replace(PLAN, logical_workers=0), r"plan\.logical_workers must be a whole number from 1"),
        (lambda: replace(PLAN, reduce="tree"), r"plan\.reduce must be one of 'fast', 'exact', not 'tree'"),
        (
            lambda: replace(FOUR, batch_size=18).images_per_batch(),
            r"18 is not a multiple of 1 micro-batches for each of 4",
        ),
        (lambda: TrainState(network(), FOUR, World(rank=2, size=3), 4), r"3 processes cannot share 4 logical workers"),
        (lambda: TrainState(network(), FOUR, World(rank=0, size=8), 4), r"8 processes cannot share 4 logical workers"),
        (
            lambda: TrainState(nn.SyncBatchNorm.convert_sync_batchnorm(network()), FOUR, World(), 4),
            r"'exact' cannot have SyncBatchNorm",
        ),
    ],
)
def test_what_cannot_be_shared_is_said(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        make()


def test_threads_are_pinned_where_bits_are_promised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Blobs(num_images=64, batch_size=16)
    fresh(tmp_path / "run", replace(FOUR, epochs=1), data)
    assert Checkpoint.load(tmp_path / "run").made_with["threads"] == "1"
    torch.set_num_threads(2)
    fresh(tmp_path / "run", replace(FOUR, epochs=1), data, resume=True)
    assert torch.get_num_threads() == 1
    assert "last bits" not in caplog.text


# ------------------------------------------------------------------------------ stopped by one, and in trouble by one


@pytest.mark.parametrize("reduce", ["exact", "fast"])
def test_a_signal_to_one_within_a_validation_stops_all_and_loses_no_step(
    lives: Lives, tmp_path: Path, reduce: Literal["exact", "fast"]
) -> None:
    plan = replace(FOUR, reduce=reduce, epochs=1, checkpoint_every=None)
    order = Order(out=str(tmp_path / "run"), plan=plan.to_dict(), processes=2, num_images=88, trouble="signal")
    lives.start(order)
    assert lives.statuses() == [Stopped.exit_status] * 2
    position = Checkpoint.load(tmp_path / "run").position
    assert position.step == position.steps_per_epoch == 6
    _, end = run(lives, tmp_path / "run", plan, 2, num_images=88)
    _, whole = run(lives, tmp_path / "whole", plan, 2, num_images=88)
    must_be_equal(end, whole)
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == (
        tmp_path / "whole/best/model.safetensors"
    ).read_bytes()


def test_an_error_of_one_is_told_by_all(lives: Lives, tmp_path: Path) -> None:
    """None waits for another that has left."""
    order = Order(out=str(tmp_path / "run"), plan=FOUR.to_dict(), processes=4, trouble="data")
    lives.start(order)
    assert lives.statuses() == [BadData.exit_status] * 4


# ------------------------------------------------------------------------------ killed, and another number


def epochs_of(log: Path) -> list[dict[str, Any]]:
    """The epochs of a log, without what depends on the clock."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines if line["kind"] == "epoch"]


def killed_often(
    lives: Lives, out: Path, plan: Plan, kills: int, processes: tuple[int, ...]
) -> tuple[int, Counter[int]]:
    """Kill a run that often, each life with another number of processes; how often that was within saving."""
    rng, saving, used = random.Random(kills), 0, Counter[int]()
    for _ in range(kills):
        width = rng.choice(processes)
        order = Order(out=str(out), plan=plan.to_dict(), processes=width, nap=0.002)
        saving += lives.killed(order, rng, longest=0.12)
        used[width] += 1
    lives.to_the_end(replace(order, processes=rng.choice(processes), nap=0.0))
    return saving, used


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("kills", "epochs", "processes"),
    [
        pytest.param(3, 2, (1,), id="3 kills-one process"),
        pytest.param(3, 2, (1, 2, 4), id="3 kills-1, 2 or 4 processes"),
        pytest.param(50, 40, (1,), id="50 kills-one process", marks=pytest.mark.slow),
        pytest.param(300, 240, (1, 2, 4), id="300 kills-1, 2 or 4 processes", marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_moment_the_run_ends_as_if_nothing_had_happened(
    lives: Lives, tmp_path: Path, kills: int, epochs: int, processes: tuple[int, ...]
) -> None:
    workers = max(processes)
    plan = replace(PLAN, epochs=epochs, batch_size=4 * workers, logical_workers=workers, reduce="exact")
    plan = replace(plan, checkpoint_every=Steps(2))
    whole, end = run(lives, tmp_path / "whole", plan)
    saving, used = killed_often(lives, tmp_path / "run", plan, kills, processes)
    order = replace(whole, out=str(tmp_path / "run"))
    print(f"{kills} kills, {saving} of them within saving; lives by number of processes: {dict(used)}")
    must_be_equal(Checkpoint.load(tmp_path / "run"), end)
    best = [(tmp_path / name / "best/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert best[0] == best[1]
    assert epochs_of(tmp_path / "run/log.jsonl") == epochs_of(tmp_path / "whole/log.jsonl")
    assert samples_of(order) == samples_of(whole)
    must_hold_every_image_once(order)
    if kills >= 50:
        assert saving >= 15
