"""Several processes: what the launcher gives them, when it starts them again, and how all of it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import training_kit
from onefold.cli import main
from onefold.errors import BadArgument, LostWorker, Stopped
from onefold.train import Checkpoint
from onefold.train.distributed import check_run_folder
from onefold.train.launch import launch
from training_processes import size_of


def sh(code: str) -> Callable[[], int]:
    """A program of a line: what each process does in each life."""

    def work() -> int:
        os.execvp("sh", ["sh", "-c", code])

    return work


def wait_until(what: Callable[[], object], seconds: float = 600.0) -> float:
    """How long it took until a callable gave something true."""
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, "it never came"
        time.sleep(0.01)
    return time.monotonic() - began


def test_all_end_well(tmp_path: Path) -> None:
    keys = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $TORCHELASTIC_RESTART_COUNT $OMP_NUM_THREADS"
    assert launch(sh(f"echo {keys} > {tmp_path}/$RANK"), processes=3, max_restarts=0) == 0
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 3)))
    for rank in range(3):
        assert (tmp_path / str(rank)).read_text().split() == [f"{rank}", f"{rank}", "3", "127.0.0.1", "0", threads]


@pytest.mark.parametrize("lost", ["kill -9 $$", "kill -SEGV $$", "exit 70", "exit 8"])
def test_who_is_lost_is_replaced_with_all_others(tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture) -> None:
    code = f"echo x >> {tmp_path}/$RANK; [ $RANK = 1 ] && [ $TORCHELASTIC_RESTART_COUNT -lt 2 ] && {lost}; sleep 0.7"
    assert launch(sh(code), processes=2, max_restarts=2) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["x\n" * 3] * 2
    assert "process 2 of 2" in caplog.text
    assert "all 2 start again (2 of 2)" in caplog.text


def test_not_for_ever() -> None:
    with pytest.raises(LostWorker, match=r"process 1 of 2 was ended by SIGKILL, and 2 restarts did not help") as error:
        launch(sh("[ $RANK = 0 ] && kill -9 $$; sleep 60"), processes=2, max_restarts=2)
    assert error.value.exit_status == 8


@pytest.mark.parametrize("status", [2, 3, 4, 5, 6, 7])
def test_what_a_user_must_mend_is_not_tried_again(status: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The one that knows speaks, although its neighbour ended too, for want of it."""
    code = f"[ $RANK = 1 ] && echo why >&2 && exit {status}; sleep 0.1; exit 8"
    assert launch(sh(code), processes=2, max_restarts=5) == status
    assert capfd.readouterr().err == "why\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_all_may_save(tmp_path: Path, number: signal.Signals) -> None:
    code = f"trap 'echo term >> {tmp_path}/$RANK; sleep 0.5; exit 75' TERM; touch {tmp_path}/up$RANK; sleep 60 & wait"
    up = [tmp_path / f"up{rank}" for rank in range(2)]

    waiting = " && ".join(f"[ -e {path} ]" for path in up)
    twice = f"kill -{int(number)} {os.getpid()}; " * 2  # as a terminal and a job system both do
    with subprocess.Popen(["sh", "-c", f"until {waiting}; do sleep 0.05; done; {twice}"]):
        assert launch(sh(code), processes=2, max_restarts=5) == 75
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["term\n"] * 2


def signalled(pid: int, code: str) -> subprocess.Popen[bytes]:
    """A shell that sends signals to a process: some of its own words are `$PID`."""
    return subprocess.Popen(["sh", "-c", code], env={**os.environ, "PID": str(pid)})


def test_a_hangup_is_passed_on_as_one(tmp_path: Path) -> None:
    code = f"trap 'exit 75' HUP; touch {tmp_path}/up$RANK; sleep 60 & wait"
    both = f"[ -e {tmp_path}/up0 ] && [ -e {tmp_path}/up1 ]"
    with signalled(os.getpid(), f"until {both}; do sleep 0.05; done; kill -HUP $PID"):
        assert launch(sh(code), processes=2, max_restarts=5) == 75


def test_one_that_was_stopped_is_woken_to_end(tmp_path: Path) -> None:
    """SIGSTOP is for ever to who waits for it, and it hears no SIGTERM."""
    code = f"trap 'exit 75' TERM; echo $$ > {tmp_path}/new$RANK; mv {tmp_path}/new$RANK {tmp_path}/up$RANK; " + (
        "sleep 60 & wait"
    )
    both = f"[ -e {tmp_path}/up0 ] && [ -e {tmp_path}/up1 ]"
    stop = f"kill -STOP $(cat {tmp_path}/up1); sleep 0.1; kill -TERM $PID"
    with signalled(os.getpid(), f"until {both}; do sleep 0.05; done; {stop}"):
        assert launch(sh(code), processes=2, max_restarts=5) == 75


def test_who_neither_ends_nor_computes_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("onefold.train.launch._HUNG_SECONDS", 0.3)
    monkeypatch.setattr("onefold.train.launch._HUNG_POLL_SECONDS", 0.05)
    code = f"trap '' TERM; touch {tmp_path}/up$RANK; while :; do sleep 60; done"
    both = f"[ -e {tmp_path}/up0 ] && [ -e {tmp_path}/up1 ]"
    with (
        signalled(os.getpid(), f"until {both}; do sleep 0.05; done; kill -TERM $PID"),
        pytest.raises(LostWorker, match="process 1 of 2 was ended by SIGKILL while it was to stop; what was saved is"),
    ):
        launch(sh(code), processes=2, max_restarts=5)
    assert "no process has computed" in caplog.text


def test_who_was_stopped_before_it_heard_of_signals_had_nothing_to_save(tmp_path: Path) -> None:
    code = f"touch {tmp_path}/up$RANK; exec sleep 60"
    both = f"[ -e {tmp_path}/up0 ] && [ -e {tmp_path}/up1 ]"
    with (
        signalled(os.getpid(), f"until {both}; do sleep 0.05; done; kill -INT $PID"),
        pytest.raises(Stopped, match="stopped by SIGINT while no step was under way"),
    ):
        launch(sh(code), processes=2, max_restarts=5)


def test_one_that_was_stopped_is_no_reason_to_start_again(capfd: pytest.CaptureFixture[str]) -> None:
    """A signal to one process, at a time when the others lose it."""
    assert (
        launch(sh("[ $RANK = 1 ] && echo stopped >&2 && exit 75; sleep 0.1; exit 8"), processes=2, max_restarts=5) == 75
    )
    assert capfd.readouterr().err == "stopped\n"


def test_the_first_may_take_its_time_when_others_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the predictions of the best network, of all validation images."""
    monkeypatch.setattr("onefold.train.launch._GRACE_SECONDS", 0.05)
    assert launch(sh("[ $RANK = 1 ] || sleep 0.5"), processes=2, max_restarts=0) == 0


HANG = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from onefold.train.distributed import process_group
torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)  # torch imports more of itself here
folder, rank = sys.argv[1], int(os.fork() > 0)

def train():
    network = DistributedDataParallel(torch.nn.Linear(4, 4))
    network(torch.ones(2, 4)).sum().backward()
    box = torch.ones(4)
    dist.all_reduce(box)  # a gloo thread lets go of it, for which it needs the GIL
    del box
    return network

for i in range(int(sys.argv[2])):
    try:
        with process_group("gloo", f"file://{folder}/{i}", rank=rank, world_size=2):
            for task in os.listdir("/proc/self/task"):  # as on a busy machine: gloo's threads come last
                if "gloo_runloop" in open(f"/proc/self/task/{task}/comm").read():
                    os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
            network = train()
            if i % 2:
                raise KeyError("an error, whose traceback holds the network too")
    except KeyError as error:
        kept = error
    network = kept = None  # only here, behind the end of its group
    if rank:
        open(f"{folder}/ended", "a").write(".")
if rank:
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it finds gloo's threads in /proc")
@pytest.mark.parametrize("rounds", [4, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_process_group_ends_while_its_network_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    """By torch's own `destroy_process_group` the first or second round of this waits for ever, with the GIL held."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-W", "ignore", "-c", HANG, str(tmp_path), str(rounds)]
    with subprocess.Popen(command, start_new_session=True) as both:
        try:
            assert both.wait(timeout=100 + 2 * rounds) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(both.pid, signal.SIGKILL)
            print(f"{size_of(tmp_path / 'ended')} of {rounds} ended, load {os.getloadavg()[0]:.1f}")


def test_the_command_line_starts_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def note(*arguments: object) -> int:
        asked.append(arguments)
        return 75

    monkeypatch.setattr("onefold.train.launch.launch", note)
    given = ["train", "--processes", "2", "--data", "digits", "--max-restarts", "9"]
    assert main(given) == 75
    [(work, *numbers)] = asked
    assert numbers == [2, 9]
    monkeypatch.setenv("RANK", "0")  # what a process does is the same command, as one of several
    assert work() == 2
    assert "WORLD_SIZE must be a whole number" in capsys.readouterr().err


def test_the_first_process_has_to_be_where_the_run_is() -> None:
    """A launcher of several machines numbers them anew when it starts again: another one must not begin another run."""
    for hosts in ([None, None], ["a", None], ["a", "a"]):
        check_run_folder(Path("runs/x"), hosts)
    with pytest.raises(BadArgument, match=r"runs/x is on b, and not on .*: put it where all machines see it"):
        check_run_folder(Path("runs/x"), [None, "b"])


@pytest.mark.slow
def test_its_processes_speak_with_one_voice(tmp_path: Path) -> None:
    """They find out by themselves that there are no data, and the launcher ends as they did.

    In a process of its own, as a user's is: this one may hold threads of a library, and a fork of it could hang.
    """
    given = ["train", "--processes", "2", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "onefold.cli", *given], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("error: ")) == (3, 1), done.stderr


@pytest.mark.slow
def test_the_digits_come_out_the_same_from_one_process_and_from_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own network, loader, augmentation and recipe, by the command line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = ["--epochs", "1", "--plan.logical_workers", "4", "--plan.reduce", "exact"]
    for processes in ("1", "2"):
        out = str(tmp_path / processes)
        given = ["train", "--recipe", "digits:w025", "--data", "digits", "--no-check", "--out", out, *plan]
        command = [sys.executable, "-W", "ignore", "-m", "onefold.cli", *given, "--processes", processes]
        subprocess.run(command, check=True, capture_output=True)
    one, two = (Checkpoint.load(tmp_path / processes) for processes in ("1", "2"))
    assert (one.made_with["processes"], two.made_with["processes"]) == ("1", "2")
    assert one.digest() == two.digest()
    assert (one.metrics, one.position) == (two.metrics, two.position)


# ------------------------------------------------------------------------------- real trainings

PROGRAM = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from onefold.train.launch import launch
from onefold.train import RunFolder, Steps, import_training_modules, init_world
from training_kit import PLAN, Blobs, fresh
max_restarts, out, epochs, nap = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
plan = replace(PLAN, epochs=epochs, batch_size=8, logical_workers=2, reduce="exact", checkpoint_every=Steps(5))

def work():
    with init_world("cpu") as world:
        out.with_name(f"pid{{world.rank}}").write_text(str(os.getpid()))
        def step(progress):
            with open(str(out) + ".steps", "ab") as steps:
                steps.write(b".")
            time.sleep(nap)
        resume = world.broadcast(RunFolder(out).has_run)
        data = Blobs(num_images=400, batch_size=8)
        done = fresh(out, plan, data, resume=resume, world=world, on_progress=step)
        if world.is_main:
            print("digest", done.digest(), flush=True)
    return 0

if max_restarts < 0:  # by torchrun, or alone
    sys.exit(work())
import_training_modules()
sys.exit(launch(work, 2, max_restarts))
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM.format(tests=str(Path(training_kit.__file__).parent)))
    return [sys.executable, "-W", "ignore", str(tmp_path / "program.py")]


@pytest.fixture
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pid_of(rank: int, folder: Path) -> int:
    return int((folder / f"pid{rank}").read_text() or 0)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def until_it_trains_again(steps: Path) -> float:
    """Seconds from a kill, which was just now, to the next step."""
    time.sleep(0.4)  # whatever the other process still did is in the file by then
    before = size_of(steps)
    return 0.4 + wait_until(lambda: size_of(steps) > before)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [20])
def test_a_process_killed_is_back_within_15_seconds(
    tmp_path: Path, program: list[str], quietly: None, kills: int
) -> None:
    """Twenty times in a row, at random moments of either process; and the result is that of one that nobody killed."""
    rng, steps, took = random.Random(20), tmp_path / "run.steps", []
    command = [*program, str(kills), str(tmp_path / "run"), "30", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: size_of(steps))
        for _ in range(kills):
            time.sleep(rng.random() * 0.5)
            victim = pid_of(rng.randrange(2), tmp_path)
            os.kill(victim, signal.SIGKILL)
            took.append(until_it_trains_again(steps))
        assert launcher.stdout is not None
        digest = launcher.stdout.read().split()[-1]
    assert launcher.returncode == 0
    ordered = sorted(took)
    print(f"training again after {ordered[len(took) // 2]:.1f} s (median), {ordered[-1]:.1f} s (worst of {kills})")
    whole = [*program, "-1", str(tmp_path / "whole"), "30", "0"]
    alone = subprocess.run(whole, stdout=subprocess.PIPE, text=True, check=True)
    assert alone.stdout.split()[-1] == digest
    assert ordered[-1] <= 15


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["ours", "torchrun"])
def test_no_process_outlives_its_launcher(tmp_path: Path, program: list[str], quietly: None, how: str) -> None:
    """kill -9 of the launcher: its processes save and end, and the run can be resumed at once."""
    if how == "ours":
        command = [*program, "0", str(tmp_path / "run"), "60", "0.02"]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, program[-1], "-1", str(tmp_path / "run"), "60", "0.02"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        wait_until(lambda: size_of(tmp_path / "run.steps") > 10)
        pids = [pid_of(rank, tmp_path) for rank in range(2)]
        launcher.kill()
        launcher.wait()
        took = wait_until(lambda: not any(map(is_alive, pids)), seconds=15)
    print(f"all ended {took:.1f} s after the launcher")
    assert took <= 10
    position = json.loads((tmp_path / "run" / "last" / "progress.json").read_text())["position"]
    assert position["epoch"] * 50 + position["step"] > 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_again_too(tmp_path: Path, program: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable that docs/distributed.md names."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "3", program[-1], "-1", str(tmp_path / "run"), "4", "0.02"]
    steps = tmp_path / "run.steps"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as agent:
        for _ in range(2):
            until_it_trains_again(steps)
            time.sleep(0.2)
            with suppress(ProcessLookupError):
                os.kill(pid_of(1, tmp_path), signal.SIGKILL)
            time.sleep(1.0)
        output = agent.communicate()[0]
    assert agent.returncode == 0
    assert "digest" in output


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, and that are left."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_that_is_lost_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two addresses of this machine stand for two, each with an agent of torchrun and a folder of its own.

    The second is killed, all of it at once, and started again. The run is on the first alone, and is the undisturbed.
    """
    for name, value in (
        ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"),
        ("OMP_NUM_THREADS", "1"),
        ("GLOO_SOCKET_IFNAME", "lo"),
    ):
        monkeypatch.setenv(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = ["train", "--recipe", "digits:w025", "--data", "digits", "--no-check", "--epochs", "4"]
    given += ["--plan.logical_workers", "2", "--plan.reduce", "exact"]

    def start(machine: int) -> subprocess.Popen[bytes]:
        agent = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
        ]
        agent += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        agent += ["--rdzv-conf", f"is_host={int(machine == 1)}", "--local-addr", f"127.0.0.{machine}"]
        command = [*agent, "-m", "onefold.cli", *given, "--out", str(tmp_path / f"{machine}" / "run")]
        with (tmp_path / f"{machine}.stderr").open("ab") as stderr:
            return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)

    def epochs() -> int:
        log = tmp_path / "1" / "run" / "log.jsonl"
        return log.read_text().count('"kind": "epoch"') if log.exists() else 0

    first, second = start(1), start(2)
    wait_until(lambda: epochs() >= 1, 120)
    for pid in (second.pid, *children_of(second.pid)):
        os.kill(pid, signal.SIGKILL)
    second.wait()
    done = epochs()
    second = start(2)
    took = wait_until(lambda: epochs() > done, 120)
    assert (first.wait(), second.wait()) == (0, 0), (tmp_path / "1.stderr").read_text()[-2000:]
    print(f"an epoch more {took:.1f} s after the machine was started again")
    assert not (tmp_path / "2").exists()
    assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    assert Checkpoint.load(tmp_path / "1" / "run").digest() == Checkpoint.load(tmp_path / "whole").digest()
