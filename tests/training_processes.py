"""Trainings in processes of their own that a test starts, kills with -9 and starts again, a few hundred times.

One server process imports torch and forks; so a life costs its steps and not the two seconds of an import. As a program
it reads orders from stdin, one JSON object a line, and answers each with one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Order:
    """A training to start: `processes` of it in `out`. `nap` seconds are slept in each step and each sync of a file.

    One that is `to_be_killed` waits for that behind its last step, so that it cannot be done before; with `sync` it
    waits at that sync of a file, counted over its checkpoints from 1. The `trouble` of the last process is a "signal"
    within the first validation, which would take the others an hour, or "data" that are not there.
    """

    out: str
    plan: dict[str, Any]
    processes: int = 1
    num_images: int = 240
    nap: float = 0.0
    to_be_killed: bool = False
    sync: int = 0
    trouble: str = ""

    @property
    def steps(self) -> Path:
        """A file that grows by a byte a step."""
        return Path(self.out + ".steps")

    @property
    def saving(self) -> Path:
        """A file that is there while a checkpoint is being written."""
        return Path(self.out + ".saving")

    @property
    def waiting(self) -> Path:
        """A file that is there once the training waits to be killed."""
        return Path(self.out + ".waiting")

    def wait(self) -> NoReturn:
        """Wait to be killed."""
        self.waiting.touch()
        while True:
            time.sleep(60)

    @property
    def samples(self) -> Path:
        """What every batch held."""
        return Path(self.out + ".samples")


class Lives:
    """The server, from outside."""

    def __init__(self) -> None:
        program = [sys.executable, "-W", "ignore", __file__]
        self._server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, order: Order) -> list[int]:
        """The processes of a new life of a training, one a rank."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids: list[int] = self._ask({"start": vars(order), "port": port})
        return pids

    def statuses(self) -> list[int]:
        """How the last life's processes ended, once they have: an exit status, or a signal as a negative number."""
        ended: list[int] = self._ask({"wait": True})
        return ended

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(question), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def to_the_end(self, order: Order) -> None:
        """A life that nobody ends."""
        self.start(order)
        assert set(self.statuses()) == {0}

    def killed(self, order: Order, rng: random.Random, longest: float) -> bool:
        """A life that is ended by -9 (all, the first or the last process) after its first step.

        That is at a random moment, or every other time at a random sync of a file of a checkpoint, which it waits at.
        Whether it was while it was saving.
        """
        order = replace(order, to_be_killed=True, sync=rng.choice((0, rng.randint(1, 9))))
        before, deadline = size_of(order.steps), time.monotonic() + 600
        pids = self.start(order)
        while not (order.waiting.exists() if order.sync else size_of(order.steps) > before):
            assert time.monotonic() < deadline, "it neither steps nor waits"
            time.sleep(0.001)
        if not order.sync:
            time.sleep(rng.random() * longest)
        for pid in rng.choice((pids, pids[:1], pids[-1:])):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)  # the others may still do what they do without it
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert -signal.SIGKILL in self.statuses(), "it was done before it was killed"
        was_saving = order.saving.exists()
        order.saving.unlink(missing_ok=True)
        order.waiting.unlink(missing_ok=True)
        return was_saving


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def samples_of(order: Order) -> dict[tuple[int, int, int], list[int]]:
    """(epoch, batch, worker) -> images; a batch that was loaded again must have held the same."""
    seen: dict[tuple[int, int, int], list[int]] = {}
    for line in order.samples.read_text().splitlines():
        epoch, at, worker, images = json.loads(line)
        assert seen.setdefault((epoch, at, worker), images) == images
    return seen


def must_hold_every_image_once(order: Order) -> None:
    """An epoch's batches, over all workers, are a permutation of the images."""
    epochs = defaultdict(list)
    for (epoch, _, _), images in samples_of(order).items():
        epochs[epoch] += images
    assert sorted(epochs) == list(range(order.plan["epochs"]))
    assert all(sorted(images) == list(range(order.num_images)) for images in epochs.values())


# ------------------------------------------------------------------------------------- the server


@contextmanager
def marking(order: Order) -> Iterator[None]:
    """A block in which saving is slow and leaves a file for as long as it lasts."""
    from onefold import file_io
    from onefold.train import Checkpoint

    sync, save, syncs = file_io._sync_entry, Checkpoint.save, itertools.count(1)

    def slowly(path: Path) -> None:
        if order.saving.exists() and next(syncs) == order.sync:
            order.wait()
        time.sleep(order.nap)
        sync(path)

    def marked(self: Checkpoint, *where: Any) -> None:
        order.saving.touch()
        save(self, *where)
        order.saving.unlink()

    file_io._sync_entry, Checkpoint.save = slowly, marked  # type: ignore[method-assign]
    yield


def live(order: Order, rank: int, port: int) -> None:
    """One process of a training."""
    import torch

    from onefold.errors import BadData
    from onefold.train import Plan, Progress, RunFolder, init_world
    from training_kit import Blobs, fresh, score

    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a kill is not a power failure
    if order.processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(order.processes), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def step(progress: Progress) -> None:
        with order.steps.open("ab") as steps:
            steps.write(b".")
        time.sleep(order.nap)
        if order.to_be_killed and progress.global_step == progress.epochs * progress.steps:
            order.wait()

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        if order.trouble == "signal" and rank == order.processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        elif order.trouble == "signal":
            time.sleep(3600)
        time.sleep(5 * order.nap)
        return score(model)

    plan = Plan.from_dict(order.plan)
    data = Blobs(num_images=order.num_images, batch_size=plan.batch_size // plan.accumulate, log=str(order.samples))
    with init_world("cpu") as world, marking(order):
        has_run = world.broadcast(RunFolder(Path(order.out)).has_run)
        with world.raise_together():
            if order.trouble == "data" and rank == order.processes - 1:
                raise BadData("there are no photos")
        fresh(Path(order.out), plan, data, resume=has_run, world=world, on_progress=step, evaluate=evaluate)


def serve() -> None:
    import torch

    from training_kit import PLAN, fresh

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:  # torch imports two seconds' worth of itself at the first step
        fresh(Path(folder) / "run", PLAN)
    pids: list[int] = []
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        else:
            order, pids = Order(**question["start"]), []
            for rank in range(order.processes):
                pid = os.fork()
                if not pid:
                    _child(order, rank, question["port"])
                pids.append(pid)
            answer = pids
        print(json.dumps(answer), flush=True)


def _child(order: Order, rank: int, port: int) -> None:
    status = 70
    try:
        os.dup2(2, 1)
        live(order, rank, port)
        status = 0
    except Exception as error:
        status = getattr(error, "exit_status", 70)
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve()
