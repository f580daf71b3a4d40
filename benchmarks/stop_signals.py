"""Stop a training of several processes by signals, at random moments of a step, a validation or a checkpoint.

    python benchmarks/stop_signals.py --processes 4 --busy 12 --times 20 --minutes 8 [--command]

A run is stopped again and again, and resumed: by SIGINT, SIGTERM or SIGHUP to the launcher or to one of
its processes, or by SIGTERM while one of them is held by SIGSTOP. After each stop the exit status must be 75, the
checkpoint must have every step that was taken, and no process may be left. With `exact` the last checkpoint is compared
with that of one process that was not stopped before. `--busy` processes compute beside it. It ends after `--minutes`,
and says how many stops there were. With `--command` it is `onefold train` on the digits, in place of a tiny network in
the same launcher; its bits are not compared. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import datasets
from torch import nn

from onefold.cli import main as cli
from onefold.commands import train as commands_train
from onefold.commands.validation_loop import Evaluator, PredictionShard
from onefold.errors import Stopped
from onefold.train import (
    Checkpoint,
    Plan,
    Progress,
    RunFolder,
    Steps,
    World,
    import_training_modules,
    init_world,
    open_loggers,
)
from onefold.train.launch import launch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from training_kit import PLAN, Blobs, fresh, score

PHASES = ("step", "validation", "checkpoint")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGSTOP")
_NAP = 0.3  # seconds that a validation and a checkpoint take


def train(out: Path, plan: Plan) -> int:
    """Train as one of several processes, marking the phases by files beside the run folder."""
    with init_world("cpu") as world:
        mark(out, f"pid{world.rank}").write_text(str(os.getpid()))
        resume = world.broadcast(RunFolder(out).has_run)
        data = Blobs(num_images=48, batch_size=plan.batch_size)
        with marked_saves(out):
            fresh(out, plan, data, resume=resume, world=world, on_progress=told(out), evaluate=slow_score(out, world))
    return 0


def train_by_command(out: Path, plan: Plan, processes: int) -> int:
    """Run `onefold train`, which starts its processes itself; they mark the phases as `train` does."""
    predict = Evaluator.__call__

    @contextmanager
    def marked_world(device: str) -> Iterator[World]:
        with init_world(device) as world:
            mark(out, f"pid{world.rank}").write_text(str(os.getpid()))
            yield world

    @contextmanager
    def marked_loggers(*arguments: Any) -> Iterator[Callable[[Progress], None]]:
        with open_loggers(*arguments) as log:
            yield lambda progress: void((log(progress), told(out)(progress)))

    def slow_predict(evaluator: Evaluator, model: nn.Module) -> PredictionShard:
        mark(out, "validation").touch()
        share = predict(evaluator, model)
        time.sleep(_NAP)
        mark(out, "validation").unlink(missing_ok=True)
        return share

    given = ["train", "--recipe", "digits:w025", "--data", "digits", "--no-check", "--epochs", str(plan.epochs)]
    given += ["--plan.logical_workers", str(processes), "--plan.reduce", plan.reduce, "--out", str(out)]
    given = ["train", "--resume", str(out)] if RunFolder(out).has_run else given
    with marked_saves(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands_train, "init_world", marked_world)
        patch.setattr(commands_train, "open_loggers", marked_loggers)
        patch.setattr(Evaluator, "__call__", slow_predict)
        return cli([*given, "--processes", str(processes)])


def mark(out: Path, name: str) -> Path:
    """Give the file beside a run folder that says how far it is."""
    return out.with_name(f"{out.name}.{name}")


def told(out: Path) -> Callable[[Progress], None]:
    """Note each step."""
    return lambda progress: void(mark(out, "step").write_text(str(progress.global_step)))


def void(_: object) -> None:
    """Give nothing."""


def slow_score(out: Path, world: World) -> Callable[[nn.Module], Mapping[str, float]]:
    """Validate, slowly."""

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        if world.is_main:
            mark(out, "validation").touch()
        end = time.monotonic() + _NAP
        while time.monotonic() < end:
            metrics = score(model)
        mark(out, "validation").unlink(missing_ok=True)
        return metrics

    return evaluate


class marked_saves:  # noqa: N801  (a block)
    """A block in which saving is slow, and marked."""

    def __init__(self, out: Path) -> None:
        self._out, self._save = out, Checkpoint.save

    def __enter__(self) -> None:
        out, save = self._out, self._save

        def slow_save(checkpoint: Checkpoint, *where: Any) -> None:
            mark(out, "checkpoint").touch()
            time.sleep(_NAP)
            save(checkpoint, *where)
            mark(out, "checkpoint").unlink(missing_ok=True)

        Checkpoint.save = slow_save  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        Checkpoint.save = self._save  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------- from outside


def start(out: Path, plan: Plan, processes: int, by_command: bool) -> int:
    """Start the launcher, in a fork of this process, which has imported torch."""
    for name in (*PHASES, *(f"pid{rank}" for rank in range(processes))):
        mark(out, name).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        quiet = os.open(f"{out}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(quiet, 2)
        if by_command:
            status = train_by_command(out, plan, processes)
        else:
            status = launch(lambda: status_of_training(out, plan), processes, 0)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        status = getattr(error, "exit_status", 70)
    finally:
        os._exit(status)


def status_of_training(out: Path, plan: Plan) -> int:
    """Give the exit status of a training, as the command line does."""
    try:
        return train(out, plan)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_status", 70)


def wait_for(what: Callable[[], object], seconds: float) -> bool:
    """Wait until something is true; whether it was in time."""
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is not only waiting to be asked for its status."""
    with suppress(OSError):
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return False


def stop(
    out: Path, plan: Plan, given: argparse.Namespace, how: str, phase: str, rng: random.Random
) -> tuple[float, str]:
    """Start a run or go on with it, stop it in a phase, and give the seconds that it took, and what was wrong."""
    processes = given.processes
    launcher = start(out, plan, processes, given.command)
    ranks = [mark(out, f"pid{rank}") for rank in range(processes)]
    if not wait_for(lambda: all(r.exists() and r.read_text() for r in ranks) and mark(out, "step").exists(), 240):
        return 0.0, "it did not start"
    pids = [int(rank.read_text()) for rank in ranks]
    if phase != "step":
        wait_for(mark(out, phase).exists, 60)
    time.sleep(rng.random() * (0.1 if phase == "step" else _NAP))
    began = time.monotonic()
    if how == "SIGSTOP":
        os.kill(rng.choice(pids), signal.SIGSTOP)
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(launcher, signal.SIGTERM)
    else:
        os.kill(rng.choice((launcher, launcher, *pids)), getattr(signal, how))
    ended: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(launcher, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] if pid else [])
        return bool(pid)

    if not wait_for(has_ended, 90):
        for pid in (*pids, launcher):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(launcher, 0)
        return 90.0, "it hung"
    took = time.monotonic() - began
    if ended[0] != 75:
        return took, f"exit {ended[0]}: {Path(f'{out}.stderr').read_text().strip()[-300:]}"
    left = [pid for pid in pids if is_alive(pid)]
    if left:
        return took, f"{len(left)} processes are left"
    saved, steps = Checkpoint.load(out).position.global_step, int(mark(out, "step").read_text())
    return took, "" if saved == steps else f"saved step {saved} of {steps}"


def has_bits_of_undisturbed(out: Path, plan: Plan) -> bool:
    """Whether the checkpoint of a run that was stopped often is that of one process that nobody stopped before."""
    stopped, alone = Checkpoint.load(out), out.with_name("undisturbed")

    def stop_there(progress: Progress) -> None:
        if progress.global_step == stopped.position.global_step and not progress.is_evaluation:
            os.kill(os.getpid(), signal.SIGTERM)

    if stopped.position.step == 0:
        return True  # it was stopped before its first step, or between two epochs, which `stop_there` cannot do
    with suppress(Stopped):
        fresh(alone, plan, Blobs(num_images=48, batch_size=plan.batch_size), on_progress=stop_there)
    same = Checkpoint.load(alone)
    return (same.digest(), same.position) == (stopped.digest(), stopped.position)


def burn() -> None:
    """Compute until the end of the process that asked for it."""
    parent = os.getpid()
    if not os.fork():
        os.setsid()  # where the kernel shares processors out among sessions, twelve in one session count as one
        x = 0.1
        while os.getppid() == parent:
            for _ in range(100_000):
                x = x * 1.0000001
        os._exit(0)


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it")
    parser.add_argument("--times", type=int, default=20, help="of each signal in each phase")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--reduce", nargs="*", default=["fast", "exact"])
    parser.add_argument("--signals", nargs="*", default=SIGNALS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", action="store_true", help="stop `onefold train` itself")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    import_training_modules()
    datasets.load_digits()
    end = time.monotonic() + 60 * given.minutes
    rng = random.Random(given.seed)
    plan = replace(PLAN, epochs=100_000, batch_size=8, logical_workers=given.processes, checkpoint_every=Steps(3))
    rows: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        fresh(Path(folder) / "warm", replace(PLAN, epochs=1))  # torch imports more of itself at the first step
        for _ in range(given.busy):
            burn()
        whole = [(how, phase, reduce) for how in given.signals for phase in PHASES for reduce in given.reduce]
        for turn in range(given.times):
            rng.shuffle(whole)
            for key in whole:
                if time.monotonic() > end:
                    break
                how, phase, reduce = key
                out = Path(folder) / reduce
                got = stop(out, replace(plan, reduce=reduce), given, how, phase, rng)
                rows.setdefault(key, []).append(got)
                if got[1]:
                    print(f"turn {turn} {key}: {got[0]:.1f} s: {got[1]}", file=sys.stderr, flush=True)
                    with suppress(OSError):  # the next one starts anew
                        out.rename(out.with_name(f"{reduce}-failed-{turn}"))
        exact = Path(folder) / "exact"
        bits = given.command or not exact.exists() or has_bits_of_undisturbed(exact, replace(plan, reduce="exact"))
        summary(rows, given, bits)


def summary(
    rows: Mapping[tuple[str, str, str], list[tuple[float, str]]], given: argparse.Namespace, bits: bool
) -> None:
    """Print a line for each signal, phase and reduction, and one for all."""
    what = "onefold train on the digits" if given.command else "a tiny network"
    print(f"{what}, {given.processes} processes, {given.busy} busy ones beside them, load {os.getloadavg()[0]:.1f}")
    for key in sorted(rows):
        took = sorted(seconds for seconds, _ in rows[key])
        wrong = sum(bool(fault) for _, fault in rows[key])
        middle, last = took[len(took) // 2], took[-1]
        row = f"{key[0]:8} {key[1]:10} {key[2]:6}"
        print(f"{row} {len(took):3} stops, {wrong} wrong, {middle:.1f} s in the middle, {last:.1f} s at most")
    every = [each for values in rows.values() for each in values]
    wrong = sum(bool(fault) for _, fault in every)
    most = round(max(seconds for seconds, _ in every), 1)
    compared = {} if given.command else {"bits": bits}
    print(json.dumps({"stops": len(every), "wrong": wrong, "most_s": most, **compared}))
    sys.exit(bool(wrong) or not bits)


if __name__ == "__main__":
    main()
