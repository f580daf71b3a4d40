"""Training: what a step does, what stops it, and that a resumed run ends in the bits of one that was not stopped."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import training_kit
from onefold.errors import BadArgument, BadCheckpoint, BadData, NonFiniteLoss, RunBusy, Stopped
from onefold.models.weights_file import tensors_sha256
from onefold.train import (
    SGD,
    AdamW,
    Checkpoint,
    Cosine,
    Ema,
    Plan,
    Progress,
    RMSprop,
    RunOptions,
    Steps,
    WeightDecay,
    World,
    compute_accuracy,
    train,
    worker_batches,
)
from onefold.train.stop_signals import StopSignals
from training_kit import NUM_CLASSES, PLAN, Blobs, fresh, network, score

VARIANTS = {
    "sgd": PLAN,
    "adamw": replace(PLAN, optimizer=AdamW(lr=1e-2), ema=None),
    "rmsprop": replace(PLAN, optimizer=RMSprop(lr=1e-3, momentum=0.9), clip_grad_norm=None),
    "bf16": replace(PLAN, amp="bf16", channels_last=True),
    "fp16": replace(PLAN, amp="fp16"),
    "accumulate": replace(PLAN, batch_size=8, accumulate=2),  # 3 steps an epoch
}


class Killed(Exception):
    """What stands for a kill inside of one process."""


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def after(num_steps: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """A callback that acts once, after that many steps of this process."""
    told = 0

    def on_progress(progress: Progress) -> None:
        nonlocal told
        told += 1
        if told == num_steps:
            act()

    return on_progress


def die() -> None:
    raise Killed


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def log_of(out: Path) -> list[dict[str, Any]]:
    """The epochs of the log, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines if line["kind"] == "epoch"]


def must_be_the_same_run(ours: Path, theirs: Path) -> None:
    a, b = Checkpoint.load(ours), Checkpoint.load(theirs)
    assert a.digest() == b.digest()
    assert a.position == b.position
    assert (a.metrics, a.best, a.scaler) == (b.metrics, b.best, b.scaler)
    assert a.randomness.numbers == b.randomness.numbers
    for name, value in a.randomness.tensors.items():
        assert value.equal(b.randomness.tensors[name])
    best = [(out / "best" / "model.safetensors").read_bytes() for out in (ours, theirs)]
    assert best[0] == best[1]  # the files, not only their tensors
    assert log_of(ours) == log_of(theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a variant that nothing stopped."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name) / "run"
            fresh(done[name], VARIANTS[name])
        return done[name]

    return get


# ------------------------------------------------------------------------- resume = uninterrupted


@pytest.mark.parametrize("stop", [die, ask_to_stop])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 7, 8, 14, 20])
def test_a_resumed_run_is_the_run(
    tmp_path: Path, whole: Callable[[str], Path], stop: Callable[[], None], step: int
) -> None:
    """Steps 6, 12, 18 end an epoch; callback 7 comes after its evaluation."""
    with pytest.raises((Killed, Stopped)):
        fresh(tmp_path / "run", on_progress=after(step, stop))
    fresh(tmp_path / "run", resume=True)
    must_be_the_same_run(tmp_path / "run", whole("sgd"))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "sgd"])
def test_every_kind_of_state_is_resumed(tmp_path: Path, whole: Callable[[str], Path], name: str) -> None:
    for stop, step in ((die, 2), (ask_to_stop, 3), (die, 5)):
        with pytest.raises((Killed, Stopped)):
            fresh(tmp_path / "run", VARIANTS[name], resume=stop is not die or step > 2, on_progress=after(step, stop))
    fresh(tmp_path / "run", VARIANTS[name], resume=True)
    must_be_the_same_run(tmp_path / "run", whole(name))


def test_a_signal_during_evaluation_stops_at_once(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    def slow(model: nn.Module) -> Mapping[str, float]:
        torch.rand(7)
        np.random.rand(7)
        ask_to_stop()
        time.sleep(60)
        return {"top1": 0.0}

    began = time.monotonic()
    with pytest.raises(Stopped, match=r"SIGTERM at epoch 1, step 6 of 6"):
        fresh(tmp_path / "run", evaluate=slow)
    assert time.monotonic() - began < 30
    assert not (tmp_path / "run" / "best").exists()
    fresh(tmp_path / "run", resume=True)
    must_be_the_same_run(tmp_path / "run", whole("sgd"))


def test_killed_within_an_evaluation_no_step_is_lost(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    def killed(model: nn.Module) -> Mapping[str, float]:
        raise Killed

    with pytest.raises(Killed):
        fresh(tmp_path / "run", evaluate=killed)
    position = Checkpoint.load(tmp_path / "run").position
    assert (position.epoch, position.step) == (0, 6)
    fresh(tmp_path / "run", resume=True)
    must_be_the_same_run(tmp_path / "run", whole("sgd"))


def test_killed_between_the_log_and_the_checkpoint_no_epoch_stands_twice(
    tmp_path: Path, whole: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoint.save

    def fail_at_the_end_of_an_epoch(self: Checkpoint, *args: Any) -> None:
        if self.position.step == 0 and self.position.epoch == 2:
            raise Killed
        save(self, *args)

    monkeypatch.setattr(Checkpoint, "save", fail_at_the_end_of_an_epoch)
    with pytest.raises(Killed):
        fresh(tmp_path / "run")
    assert [line["epoch"] for line in log_of(tmp_path / "run")] == [1, 2]
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"kind": "epo')  # torn by the kill
    monkeypatch.setattr(Checkpoint, "save", save)
    fresh(tmp_path / "run", resume=True)
    must_be_the_same_run(tmp_path / "run", whole("sgd"))


def wait_for_signal_in_terminal(name: str) -> tuple[int, int]:
    """Start a process in a terminal that says ready, waits for a signal, and then saved; its pid and the terminal.

    It ends with 0 where the signal was `name`.
    """
    pid, terminal = pty.fork()
    if not pid:
        with StopSignals() as signals:
            os.write(1, b"ready")
            while not signals.received:
                time.sleep(0.01)
            os.write(1, b"saved")
            os._exit(0 if signals.received == name else 1)
    return pid, terminal


def test_a_terminal_that_closes_is_a_signal_and_no_error() -> None:
    """The terminal is gone for good: writing there would be an error, and the run would end before it has saved."""
    pid, terminal = wait_for_signal_in_terminal("SIGHUP")
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_ctrl_c_in_a_terminal_is_acknowledged_at_once() -> None:
    pid, terminal = wait_for_signal_in_terminal("SIGINT")
    said = b""
    while not said.endswith(b"saved"):
        if said == b"ready":
            os.write(terminal, b"\x03")
        said += os.read(terminal, 100)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert said.index(b"stopping: what is under way is saved first") < said.index(b"saved", said.index(b"first"))


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.received
    finally:
        signal.signal(signal.SIGHUP, before)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == "SIGHUP"


def test_a_hangup_saves_as_sigterm_does(tmp_path: Path) -> None:
    with pytest.raises(
        Stopped, match=r"stopped by SIGHUP at epoch 1, step 4 .*: go on with `onefold train --resume \S+`$"
    ):
        fresh(tmp_path, on_progress=lambda p: os.kill(os.getpid(), signal.SIGHUP) if p.step == 4 else None)
    assert Checkpoint.load(tmp_path).position.step == 4


@dataclass(frozen=True)
class Holes(Blobs):
    """Blobs, some of whose images cannot be read: of epoch n the batches are as long as `lengths` says."""

    lengths: tuple[int, ...] = ()

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for length, (images, labels) in zip(self.lengths[start:], super().epoch(n, start), strict=False):
            yield images[:length], labels[:length]


def pixels() -> nn.Module:
    """A network whose last norm sees one value a channel of a single image."""
    torch.manual_seed(0)
    last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, NUM_CLASSES))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), last)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("lengths", [(1,) * 6, (4, 0, 4, 1, 4, 4), (0, 0, 4, 4, 4, 4), (4, 4, 4, 4, 1, 0)])
def test_batches_of_one_image_and_of_none_are_trained_around(
    tmp_path: Path, lengths: tuple[int, ...], accumulate: int, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(PLAN, epochs=2, batch_size=4 * accumulate * workers, accumulate=accumulate, logical_workers=workers)
    data = worker_batches(lambda v: Holes(seed=v, lengths=lengths), plan, World())
    model = pixels()
    done = train(model, data, plan, RunOptions(out=tmp_path, evaluate=score))
    assert done.is_complete
    assert done.position.steps_per_epoch == math.ceil(6 / accumulate)
    assert all(value.isfinite().all() for value in done.weights.values())
    told = [r.getMessage() for r in caplog.records if "has one image" in r.getMessage()]
    assert len(told) == (1 in lengths)
    assert all("4.1" in text for text in told)
    if lengths == (1,) * 6:  # then no batch says anything of its statistics
        assert done.weights["4.1.running_var"].equal(torch.ones(8))
        assert not done.weights["1.running_var"].equal(torch.ones(8))
    assert all(module.training for module in model.modules())


def test_an_epoch_without_an_image_ends_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="not one image of epoch 1 could be read"):
        train(network(), Holes(lengths=(0,) * 6), PLAN, RunOptions(out=tmp_path, evaluate=score))


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from onefold.train.stop_signals import StopSignals\n"
        "with StopSignals() as signals:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # at once: a launcher that passes on what came to all
        "    assert signals.received == 'SIGINT'\n"
        "    time.sleep(0.6)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -signal.SIGTERM


# ---------------------------------------------------------------------------- refusals of a resume


def test_a_changed_run_is_refused_with_its_differences(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fresh(tmp_path / "run", on_progress=after(3, ask_to_stop))
    before = Checkpoint.load(tmp_path / "run").digest()
    changed = replace(PLAN, epochs=5, optimizer=SGD(lr=0.2, momentum=0.9))
    with pytest.raises(BadCheckpoint, match=r"plan\.epochs: 3 -> 5; plan\.optimizer: SGD\(lr=0\.1.*SGD\(lr=0\.2"):
        fresh(tmp_path / "run", changed, resume=True)
    with pytest.raises(BadCheckpoint, match=r"data: blobs 24 0 -> blobs 24 1$"):
        fresh(tmp_path / "run", data=Blobs(seed=1), resume=True)
    with pytest.raises(BadCheckpoint, match=r"steps per epoch: 6 -> 12"):
        fresh(tmp_path / "run", data=Blobs(batch_size=2), resume=True)
    other = nn.Sequential(*network().children(), nn.Linear(6, 6))
    with pytest.raises(BadCheckpoint, match=r"another model: 10\.weight is missing; 10\.bias is missing"):
        train(other, Blobs(), PLAN, RunOptions(out=tmp_path / "run", evaluate=score, resume=True))
    wider = network()
    wider[9] = nn.Linear(8, 7)
    with pytest.raises(BadCheckpoint, match=r"9\.weight is \(6, 8\), the model has \(7, 8\)"):
        train(wider, Blobs(), PLAN, RunOptions(out=tmp_path / "run", evaluate=score, resume=True))
    assert Checkpoint.load(tmp_path / "run").digest() == before
    fresh(tmp_path / "run", replace(PLAN, workers=2, checkpoint_every=None), resume=True)  # mechanics may change


def test_what_is_there_and_what_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadCheckpoint, match=r"there is no checkpoint in .*: start the run without resume"):
        fresh(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    done = fresh(tmp_path / "run")
    assert done.is_complete
    with pytest.raises(BadArgument, match="already holds a run: resume it, or choose another folder"):
        fresh(tmp_path / "run")
    caplog.set_level("INFO")
    again = fresh(tmp_path / "run", resume=True, evaluate=lambda model: pytest.fail("nothing is left to do"))
    assert again.digest() == done.digest()
    assert "is complete: all 3 epochs are done" in caplog.text


def test_other_threads_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Stopped):
        fresh(tmp_path / "run", on_progress=after(3, ask_to_stop))
    torch.set_num_threads(2)
    fresh(tmp_path / "run", resume=True)
    assert "threads: was 1, is 2: the last bits will not be those of one run" in caplog.text


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunBusy, match=f"is in use by process {os.getpid()} on "):
            fresh(tmp_path / "run", resume=True)

    fresh(tmp_path / "run", on_progress=after(2, second))


# ------------------------------------------------------------------------- not finite, not a number


def test_an_infinite_image_is_seen_before_the_weights_take_it_in(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(NonFiniteLoss, match=r"the loss is (nan|inf) at epoch 2, step 1 of 6, lr 0\.09") as error:
        train(model, Blobs(spoilt=1), PLAN, RunOptions(out=tmp_path / "run", evaluate=score))
    assert error.value.exit_status == 7
    last = Checkpoint.load(tmp_path / "run")
    assert last.position.global_step == 6
    for part in (last.weights, last.average, last.optimizer):
        assert all(value.isfinite().all() for value in part.values())
    for name, parameter in model.named_parameters():
        assert parameter.equal(last.weights[name])


class Spike(torch.autograd.Function):
    """The identity, with a gradient of another size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float) -> Tensor:
        ctx.size = size
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.size, None


class Spiked(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.net, self.size = network(), size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Spike.apply(self.net(x), self.size)
        return y


def test_an_infinite_gradient_is_seen_before_the_weights_take_it_in(tmp_path: Path) -> None:
    model = Spiked(1.0)

    def spoil() -> None:
        model.size = math.inf

    run = RunOptions(out=tmp_path / "run", evaluate=score, on_progress=after(4, spoil))
    with pytest.raises(NonFiniteLoss, match=r"the gradient is (inf|nan) at epoch 1, step 5 of 6"):
        train(model, Blobs(), PLAN, run)
    last = Checkpoint.load(tmp_path / "run")
    assert last.position.step == 4
    assert all(parameter.equal(last.weights[name]) for name, parameter in model.named_parameters())


def test_a_statistic_that_overflowed_is_never_saved(tmp_path: Path) -> None:
    """In training a BatchNorm does not read its running statistics, so that no loss tells."""
    model = network()
    run = RunOptions(
        out=tmp_path / "run", evaluate=score, on_progress=after(3, lambda: model[1].running_var.fill_(math.inf))
    )
    with pytest.raises(NonFiniteLoss, match=r"1\.running_var is not finite at epoch 1, step 5 of 6"):
        train(model, Blobs(), PLAN, run)
    last = Checkpoint.load(tmp_path / "run")
    assert last.position.step == 2
    assert all(value.isfinite().all() for value in last.weights.values())


# -------------------------------------------------------------------------------- what a step does


class Idle(nn.Module):
    """A linear network with parameters that no gradient reaches: they only decay."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(3 * 8 * 8, NUM_CLASSES)
        self.idle = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1)) + 0.0 * self.idle(x.new_zeros(1, 4)).sum()
        return logits


def test_rates_reach_the_weights(tmp_path: Path) -> None:
    """Without a gradient SGD multiplies by 1 - lr wd, and AdamW too: the product over the run is a closed form."""
    for rule in (SGD(lr=0.3), AdamW(lr=0.3)):
        plan = replace(PLAN, optimizer=rule, weight_decay=WeightDecay(start=0.2, final=0.05, skip=("bias",)))
        plan = replace(plan, schedule=Cosine(final=0.1, warmup=Steps(3), warmup_from=0.2), clip_grad_norm=None)
        model = Idle()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(model, Blobs(), plan, RunOptions(out=tmp_path / type(rule).__name__, evaluate=score))
        product = 1.0
        for t in range(18):
            turn = (1 + math.cos(math.pi * (t - 3) / 15)) / 2
            lr = 0.2 + 0.1 * t / 3 if t < 3 else 0.1 + 0.2 * turn
            product *= 1 - lr * (0.05 + 0.15 * (1 + math.cos(math.pi * t / 18)) / 2)
        assert torch.allclose(model.idle.weight, before["idle.weight"] * product, rtol=1e-5, atol=0)
        assert model.idle.bias.equal(before["idle.bias"])


def one_step(tmp_path: Path, plan: Plan, data: Any, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The weights after an epoch of one step, from the same beginning."""
    model = model or Idle()
    train(model, data, plan, RunOptions(out=tmp_path, evaluate=lambda net: {"top1": 0.0}))
    return model.state_dict()


STEP = Plan(epochs=1, batch_size=24, optimizer=SGD(lr=1.0), schedule=Cosine(final=1.0))


def test_pieces_make_the_step_of_the_whole(tmp_path: Path) -> None:
    """24 images at once, in three pieces, and in pieces of 10, 10 and 4."""
    whole = one_step(tmp_path / "1", STEP, Blobs(batch_size=24))
    even = one_step(tmp_path / "3", replace(STEP, accumulate=3), Blobs(batch_size=8))
    uneven = one_step(tmp_path / "u", replace(STEP, accumulate=3), Blobs(batch_size=10))
    for name, value in whole.items():
        assert torch.allclose(even[name], value, atol=1e-6)
        assert torch.allclose(uneven[name], value, atol=1e-6)


def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    before = Idle().state_dict()
    free, clipped = (
        one_step(tmp_path / str(limit), replace(STEP, clip_grad_norm=limit), Blobs(batch_size=24))
        for limit in (None, 0.01)
    )
    moves = [torch.cat([(new[n] - before[n]).flatten() for n in before]) for new in (free, clipped)]
    assert moves[0].norm() > 0.1
    assert moves[1].norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.allclose(moves[1] / 0.01, moves[0] / moves[0].norm(), atol=1e-3)


def test_labels_may_be_shares(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Shares(Blobs):
        def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in super().epoch(n, start):
                yield images, nn.functional.one_hot(labels, NUM_CLASSES).float()

    plan = replace(STEP, label_smoothing=0.2)
    hard = one_step(tmp_path / "hard", plan, Blobs(batch_size=24))
    soft = one_step(tmp_path / "soft", plan, Shares(batch_size=24))
    assert all(torch.allclose(hard[name], soft[name], atol=1e-6) for name in hard)


def test_the_average_is_the_average(tmp_path: Path) -> None:
    """Weights and running statistics, averaged again in float64 from what training showed after each step."""
    model = network()
    seen: list[dict[str, Tensor]] = []

    def look(progress: Progress) -> None:
        if len(seen) < (progress.epoch - 1) * 6 + progress.step + 1:
            seen.append({n: v.double().clone() for n, v in model.state_dict().items()})

    begin = {name: value.double().clone() for name, value in model.state_dict().items()}
    seen.append(begin)
    plan = replace(PLAN, ema=Ema(decay=0.6, warmup=True))
    done = train(model, Blobs(), plan, RunOptions(out=tmp_path / "run", evaluate=score, on_progress=look))
    assert len(seen) == 19
    expected = dict(begin)
    for t in range(18):
        keep = min(0.6, (1 + t) / (10 + t))
        expected = {name: keep * value + (1 - keep) * seen[t + 1][name] for name, value in expected.items()}
    for name, value in done.average.items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-7), name
        else:
            assert value.equal(done.weights[name])  # counters are copied
    assert not done.average["9.weight"].equal(done.weights["9.weight"])


def test_loading_and_evaluating_draw_from_elsewhere(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    @dataclass(frozen=True)
    class Drawing(Blobs):
        def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            torch.rand(5)
            for batch in super().epoch(n, start):
                np.random.rand(3)
                torch.rand(n + 1)
                yield batch

    done = fresh(tmp_path / "run", data=Drawing(), evaluate=lambda model: {**score(model), "x": torch.rand(9).sum()})
    assert done.digest() == Checkpoint.load(whole("sgd")).digest()


def test_the_seed_decides(tmp_path: Path) -> None:
    runs = [fresh(tmp_path / str(i), replace(PLAN, seed=seed)).digest() for i, seed in enumerate((3, 3, 4))]
    assert runs[0] == runs[1] != runs[2]


# ------------------------------------------------------------------- evaluation, best, progress, log


def test_best_is_the_averaged_weights_of_the_last_best_epoch(tmp_path: Path) -> None:
    shown: list[dict[str, Tensor]] = []

    def scripted(model: nn.Module) -> Mapping[str, float]:
        assert not model.training
        shown.append({name: value.clone() for name, value in model.state_dict().items()})
        for parameter in model.parameters():
            parameter.zero_()  # it is a copy: nothing that is done to it matters
        return {"top1": [math.nan, 30.0, 30.0, 20.0][len(shown) - 1], "loss": 1.5}

    metadata = {"model": "blob", "classes": '["a", "b"]'}
    done = fresh(tmp_path / "run", replace(PLAN, epochs=4), evaluate=scripted, metadata=metadata)
    assert done.best == {"top1": 30.0, "loss": 1.5, "epoch": 3, "step": 18}
    with safe_open(tmp_path / "run" / "best" / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata | {"sha256": tensors_sha256(shown[2])}
        assert set(file.keys()) == set(shown[2])
        assert all(file.get_tensor(name).equal(value) for name, value in shown[2].items())
    lines = log_of(tmp_path / "run")
    assert [line["top1"] for line in lines] == [None, 30.0, 30.0, 20.0]  # JSON has no NaN
    assert lines[0]["eval_loss"] == 1.5
    assert lines[0]["loss"] != 1.5


@pytest.mark.parametrize(("scores", "epoch"), [((50.0, 50.0, 50.0), 2), ((50.0, 40.0, 40.0), 0), ((0.0, 0.0, 0.0), 2)])
def test_the_start_ships_only_where_it_was_better(tmp_path: Path, scores: tuple[float, ...], epoch: int) -> None:
    given = iter(scores)
    plan = replace(PLAN, epochs=2)
    done = fresh(tmp_path, plan, evaluate=lambda model: {"top1": next(given)}, evaluate_start=True)
    assert done.best["epoch"] == epoch


def test_the_log_and_the_callback_tell_what_happened(tmp_path: Path) -> None:
    told: list[Progress] = []
    fresh(tmp_path / "run", on_progress=told.append)
    steps = [(p.epoch, p.step) for p in told]
    assert steps == [(e, s) for e in (1, 2, 3) for s in (1, 2, 3, 4, 5, 6, 6)]  # and once after the evaluation
    assert {(p.epochs, p.steps) for p in told} == {(3, 6)}
    assert all(p.images_per_s > 0 and p.eta_s >= 0 for p in told)
    assert told[-1].eta_s == 0
    assert not told[0].metrics
    assert "top1" in told[6].metrics
    assert told[0].lr == 0  # the warm-up's first step
    first, *epochs = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert first["kind"] == "start"
    assert Plan.from_dict(first["plan"]) == PLAN
    assert [(line["epoch"], line["step"]) for line in epochs] == [(1, 6), (2, 12), (3, 18)]
    mean = sum(p.loss for p in told[:6]) / 6
    assert epochs[0]["loss"] == pytest.approx(mean, rel=1e-12)
    assert epochs[2]["lr"] == told[-1].lr


def test_it_learns(tmp_path: Path) -> None:
    plan = replace(PLAN, epochs=12, batch_size=12, ema=Ema(decay=0.8, warmup=True), checkpoint_every=None)
    done = fresh(tmp_path / "run", plan, Blobs(num_images=120, batch_size=12))
    assert done.best["top1"] > 90


@pytest.mark.parametrize(
    ("data", "run", "error", "message"),
    [
        (Blobs(num_images=0), {}, BadData, "there is no batch to train on"),
        (Blobs(batch_size=6), {}, BadArgument, r"plan\.batch_size is 4, but the batches give 6 in a step"),
        (Blobs(), {"evaluate": lambda model: {"acc": 1.0}}, BadArgument, r"must give 'top1'.*it gave \['acc'\]"),
    ],
)
def test_what_cannot_be_trained_is_said(
    tmp_path: Path, data: Blobs, run: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fresh(tmp_path / "run", data=data, **run)


def test_an_epoch_that_ends_early_is_said(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Short(Blobs):
        def __len__(self) -> int:
            return 7

    with pytest.raises(BadData, match="epoch 1 ended at step 6 of 7: images are missing"):
        fresh(tmp_path / "run", data=Short())


# ------------------------------------------------------------------------------------- accuracy


def test_accuracy_against_counting_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 7)).astype(np.float32)
    logits[5] = logits[5].round()  # ties
    logits[6] = 0.0
    logits[7, 3] = np.nan
    labels = rng.integers(0, 6, 40)  # nothing is of class 6
    at = iter([logits[:25], logits[25:]])
    pairs = [(torch.zeros(25, 1), torch.tensor(labels[:25])), (torch.zeros(15, 1), torch.tensor(labels[25:]))]
    ours = compute_accuracy(lambda images: next(at), pairs, keep_logits=True)
    ranked = [sorted(range(7), key=lambda c: (-row[c], c)) for row in logits.astype(float)]
    finite = [i for i in range(40) if i != 7]
    assert ours.top1 == pytest.approx(100 * sum(ranked[i][0] == labels[i] for i in finite) / 40)
    assert ours.top5 == pytest.approx(100 * sum(labels[i] in ranked[i][:5] for i in finite) / 40)
    assert ours.confusion.sum() == 39
    assert math.isnan(ours.loss)
    assert math.isnan(ours.per_class[6])
    for c in range(6):
        own = [i for i in range(40) if labels[i] == c]
        right = [i for i in own if i != 7 and ranked[i][0] == c]
        assert ours.per_class[c] == pytest.approx(100 * len(right) / len(own))
        assert ours.confusion[c, c] == len(right)
    assert ours.logits is not None
    np.testing.assert_array_equal(ours.logits, logits)


def test_accuracy_is_one_code_for_modules_and_sessions() -> None:
    model = network().eval()

    def session(images: np.ndarray) -> np.ndarray:
        assert images.dtype == np.float32
        with torch.no_grad():
            return np.asarray(model(torch.from_numpy(images)).numpy())

    ours, theirs = (compute_accuracy(predict, Blobs().epoch(0)) for predict in (model, session))
    assert ours.metrics() == theirs.metrics()
    logits = torch.cat([model(images) for images, _ in Blobs().epoch(0)])
    labels = torch.cat([labels for _, labels in Blobs().epoch(0)])
    assert ours.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert ours.count == 24


def test_accuracy_refuses_what_has_no_meaning() -> None:
    with pytest.raises(BadArgument, match=r"eval mode: call model\.eval\(\) first"):
        compute_accuracy(network().train(), Blobs().epoch(0))
    with pytest.raises(BadData, match="no image to evaluate on"):
        compute_accuracy(network().eval(), [])
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    with pytest.raises(BadArgument, match=r"predictions of 3 classes do not fit the 4 labels .*network for these data"):
        compute_accuracy(narrow, Blobs().epoch(0))


# ------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Every process has half of each batch; without BatchNorm and dropout the gradients' mean is the whole's."""
    code = f"""
import sys
from dataclasses import dataclass
from pathlib import Path
sys.path[:0] = [{str(Path(training_kit.__file__).parent)!r}]
import torch
from test_train import STEP, Idle, Blobs
from onefold.train import *
torch.set_num_threads(1)
@dataclass(frozen=True)
class Half(Blobs):
    rank: int = 0
    def epoch(self, n, start=0):
        for images, labels in super().epoch(n, start):
            yield images[self.rank::2], labels[self.rank::2]
plan = Plan(epochs=2, batch_size=8, optimizer=SGD(lr=0.1, momentum=0.9), logical_workers=2)
with init_world("cpu") as world:
    total = torch.tensor([float(world.rank)])
    world.all_reduce_(total)
    assert total.item() == 1.0 and world.max(world.rank) == 1
    assert world.max(0) == 0 and world.broadcast(world.rank) == 0
    assert world.sendrecv(torch.tensor(world.rank), 1 - world.rank).item() == 1 - world.rank
    run = RunOptions(out=Path({str(tmp_path / "two")!r}), world=world, evaluate=lambda net: {{"top1": 1.0}})
    train(Idle(), Half(batch_size=8, rank=world.rank), plan, run)
"""
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(tmp_path / "program.py")], check=True, timeout=200, capture_output=True)
    plan = Plan(epochs=2, batch_size=8, optimizer=SGD(lr=0.1, momentum=0.9))
    run = RunOptions(out=tmp_path / "one", evaluate=lambda net: {"top1": 1.0})
    one = train(Idle(), Blobs(batch_size=8), plan, run)
    two = Checkpoint.load(tmp_path / "two")
    assert two.position == one.position
    for name, value in one.weights.items():
        assert torch.allclose(two.weights[name], value, atol=1e-6)
    assert [line["loss"] for line in log_of(tmp_path / "two")] == pytest.approx(
        [line["loss"] for line in log_of(tmp_path / "one")], rel=1e-5
    )
