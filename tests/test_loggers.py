"""Who hears of a run: TensorBoard, services by name, the terminal; and that no life of a run tells anything twice."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from onefold.cli import progress_writer
from onefold.cli.terminal_progress import progress_values, show_training_progress
from onefold.errors import BadArgument, MissingExtra
from onefold.train import Progress, open_loggers
from onefold.train.loggers import check_services, progress_scalars
from training_kit import PLAN, fresh

STEPS = 18  # of the kit's plan: three epochs of six


def at(step: int, epoch: int = 1, **more: object) -> Progress:
    given = {"epochs": 3, "steps": 6, "loss": 1.5, "lr": 0.1, "images_per_s": 80.0, "eta_s": 3700.0, "metrics": {}}
    return Progress(epoch=epoch, step=step, **{**given, **more})  # type: ignore[arg-type]


def points(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar that TensorBoard shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        shown.Reload()
        return {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_after_stops_and_resumes(tmp_path: Path):
    """Lives that end anywhere, also after steps that no checkpoint holds: the curve is that of one life."""
    pytest.importorskip("tensorboard")

    class Killed(Exception):
        pass

    def life(resume: bool, until: int) -> None:
        with open_loggers(tmp_path / "run") as hear:

            def tell(progress: Progress) -> None:
                hear(progress)
                if progress.global_step >= until:
                    raise Killed

            fresh(tmp_path / "run", resume=resume, on_progress=tell)

    for number, until in enumerate((3, 6, 11, 13)):  # every second step is saved
        with pytest.raises(Killed):
            life(number > 0, until)
    life(True, 10**9)
    shown = points(tmp_path / "run" / "tensorboard")
    assert shown["train/loss"] == list(range(1, STEPS + 1))
    assert shown["eval/top1"] == [6, 12, 18]
    assert shown["epoch"] == [6, 12, 18]


class Fake(ModuleType):
    """A service with the verbs of W&B and trackio, that remembers what it was told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.begun: list[dict[str, object]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.__spec__ = importlib_spec(name)

    def init(self, **given: object) -> Fake:
        self.begun.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def importlib_spec(name: str):
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_each_step_at_most_once_and_goes_on_with_its_run(tmp_path: Path, monkeypatch, name: str):
    service = Fake(name)
    monkeypatch.setitem(sys.modules, name, service)
    plan = {"plan": {"epochs": 3}}
    for first, last in ((1, 5), (3, 6)):  # the second life does steps 3 to 5 again
        with open_loggers(tmp_path, [name], plan) as hear:
            for step in range(first, last + 1):
                hear(at(step))
            hear(at(last, is_evaluation=True, metrics={"top1": 50.0}))
    steps = [step for step, values in service.told if "train/loss" in values]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [values["eval/top1"] for _, values in service.told if "eval/top1" in values] == [50.0, 50.0]
    assert service.finished == 2
    one, two = service.begun
    assert one == two  # the same id or name: the same run goes on
    assert one["resume"] == "allow"
    assert one["config"] == plan


def test_a_service_that_fails_does_not_take_the_training_with_it(tmp_path: Path, monkeypatch, caplog):
    service = Fake("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(service, "log", lambda values, step: 1 / 0)
    heard: list[int] = []
    with open_loggers(tmp_path, ["wandb"], on_progress=lambda progress: heard.append(progress.step)) as hear:
        for step in (1, 2, 3):
            hear(at(step))
    assert heard == [1, 2, 3]
    assert caplog.text.count("gets no more of this run: ZeroDivisionError") == 1


def test_a_service_that_is_not_installed_or_not_known_is_named():
    with pytest.raises(BadArgument, match="'wandv'"):
        check_services(["wandv"])
    with pytest.raises(MissingExtra, match=r"onefold\[trackio\]"):
        check_services(["trackio"])


def test_points_are_chosen_by_the_step_alone():
    kept = [step for step in range(1, 501) if progress_scalars(at(step, steps=500))]
    assert kept == list(range(10, 501, 10))
    assert progress_scalars(at(3)) == {"train/loss": 1.5, "train/lr": 0.1, "train/images_per_s": 80.0}
    told = progress_scalars(at(6, is_evaluation=True, metrics={"top1": 50.0}))
    assert told == {"epoch": 1.0, "train/epoch_loss": 1.5, "eval/top1": 50.0}


def test_listeners_change_no_bit_of_a_run(tmp_path: Path):
    alone = fresh(tmp_path / "a").digest()
    with open_loggers(tmp_path / "b") as hear:
        assert fresh(tmp_path / "b", on_progress=hear).digest() == alone


def test_every_step_and_every_evaluation_is_heard_of(tmp_path: Path):
    heard: list[Progress] = []
    fresh(tmp_path, on_progress=heard.append)
    assert [each.global_step for each in heard if not each.is_evaluation] == list(range(1, STEPS + 1))
    judged = [each for each in heard if each.is_evaluation]
    assert [each.global_step for each in judged] == [6, 12, 18]
    assert all("top1" in each.metrics for each in judged)
    assert all(2**20 < each.memory_bytes < 2**40 for each in heard)
    assert PLAN.epochs == judged[-1].epochs == judged[-1].epoch


# -------------------------------------------------------------------------------------- the terminal


def drawn(monkeypatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_PROGRESS", raising=False)
    with show_training_progress() as hear:
        for epoch in (1, 2):
            for step in range(1, 7):
                before = {"top1": 41.0} if epoch == 2 else {}
                hear(at(step, epoch, metrics=before, memory_bytes=512 << 20))
            hear(at(6, epoch, is_evaluation=True, metrics={"top1": 40.0 + epoch, "ece": 3.25}, memory_bytes=512 << 20))
    return stream.getvalue()


def test_away_from_a_terminal_an_epoch_is_a_plain_line(monkeypatch):
    lines = drawn(monkeypatch, io.StringIO()).splitlines()
    assert lines == [
        "epoch 1/3  loss 1.500  val top-1 41.00 %  80 images/s  512 MiB  1:01:40 left",
        "epoch 2/3  loss 1.500  val top-1 42.00 %  80 images/s  512 MiB  1:01:40 left",
    ]


def test_in_a_log_a_long_epoch_has_a_line_now_and_then(tmp_path, monkeypatch):
    """Nothing was written between two epochs, however long they are; an epoch's own line puts the next one off."""
    from onefold.cli import terminal_progress as module

    monkeypatch.setattr(module, "_LONG_EPOCH_S", 0.2)
    monkeypatch.setattr(module, "_EVERY_S", 60.0)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with show_training_progress() as hear:
            for told, wanted in ((at(2, 1), "step 2 of 6"), (at(6, 1), "validating")):
                hear(told)
                deadline = time.monotonic() + 30
                while wanted not in log.read_text() and time.monotonic() < deadline:
                    time.sleep(0.02)
            hear(at(6, 1, is_evaluation=True, metrics={"top1": 42.0}))
    lines = log.read_text().splitlines()
    assert re.fullmatch(r"epoch 1/3 step 2 of 6  loss 1.500  80 images/s: 0:00:0\d, about 1:01:(40|39) left", lines[0])
    assert any(line.startswith("epoch 1/3 validating  loss 1.500") for line in lines)
    assert lines[-1] == "epoch 1/3  loss 1.500  val top-1 42.00 %  80 images/s  1:01:40 left"


def test_the_next_line_of_a_log_is_put_off_by_one_of_the_command():
    with subprocess.Popen(
        [sys.executable, "-I", "-S", progress_writer.__file__, "log", "1.0", "60", "training"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("1.0\t0.5\tstep 1\n\n")
        process.stdin.flush()
        time.sleep(1.5)
        process.stdin.close()
        assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="has no terminals of this kind")
def test_on_a_terminal_there_is_a_bar_with_all_that_one_wants_to_know(monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_PROGRESS", raising=False)
    text = ""
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        with show_training_progress() as hear:
            hear(at(6, 1, is_evaluation=True, metrics={"top1": 42.0}, memory_bytes=512 << 20))
            while "━" not in text:  # a process draws it
                text += os.read(ours, 4096).decode(errors="replace")
    os.close(ours)
    for said in ("epoch 1/3", "loss 1.500", "val top-1 42.00 %", "80 images/s", "512 MiB", "1:01:40 left"):
        assert said in text
    assert "epoch 1/3 ━━─── loss 1.500  val top-1 42.0 % ...: 0:00:00, about 1:01:40 left" in text


def test_a_number_that_is_not_known_yet_is_not_shown():
    assert "nan" not in progress_values(at(1, images_per_s=math.nan, eta_s=math.nan))
