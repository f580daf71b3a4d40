"""Twenty steps of a new user, from `pip install` to a deployed int8 folder: seconds, silence, and what was said.

    python benchmarks/user_steps.py --photos ../shared/data/imagenette-224-subset/train.tar
        --weights ../shared/data/weights/mobileone_s0_in1k_fused.npz [--steps 2-20] [--work FOLDER]

300 of the photos are laid out as a user has them, a folder a class. Each command is run as it is typed, in a
terminal (a pty), so that what is drawn there is seen: `silent` is the longest time in which nothing came, from the
start of the command on. Before step 1 a wheel of this checkout and a new environment are made, untimed; step 1
installs the one into the other with pip, under constraints.txt, and all others use it (with `--steps 2-20` the
environment that this script runs in). `before` are the seconds that a step was complained of for, where they are known:
`BEFORE` says what they were of. The last line of each is what it said last. Exit status 1 where a step failed that
should not, or was silent for more than two seconds. The table is kept in benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUM_PHOTOS = 300
SILENCE = 2.0  # seconds
TRAIN = "onefold train --recipe photos:finetune --data photos --model mobileone_s0 --weights {weights} --img-size 96"
STEPS = (
    "pip install --constraint constraints.txt onefold[all]",  # a wheel of this checkout, see `install`
    "onefold --help",
    'onefold models "mobileone*"',
    "onefold data photos",
    TRAIN + " --epochs 2",
    "onefold eval runs/photos-finetune",
    "onefold predict runs/photos-finetune {photo}",
    "onefold predict runs/photos-finetune photos --out answers.csv",
    "onefold predict runs/photos-finetune photos --sort-into sorted",
    "onefold fuse runs/photos-finetune --out fused.safetensors",
    "onefold eval fused.safetensors --data photos",
    "onefold export fused.safetensors --to onnx",
    "onefold export fused.safetensors --to onnx,openvino --precision int8 --data photos",
    "onefold predict artifacts/onnx-int8 {photo}",
    "onefold eval artifacts/onnx-int8 --data photos",
    "onefold bench fused.safetensors artifacts/onnx-fp32 artifacts/onnx-int8",
    "onefold deploy fused.safetensors --data photos --int8 --out deploy",
    TRAIN + " --epochs 6 --out runs/stopped  # Ctrl-C in epoch 2",
    "onefold train --resume runs/stopped",
    "onefold report . --out report.html",
)
BEFORE = {  # step: seconds
    3: ("12", "each time"),
    5: ("12", "its first step, for compiling; of S0 at 224 pixels"),
    10: ("20", "of S0 at 224 pixels"),
    13: ("548", "of processor time, without a word; to three runtimes, at 224 pixels"),
    17: ("97-420", "on a quiet machine, and beside other work, when it was not done yet; to two runtimes"),
}
STOPPED = {18: (75, b"epoch 2/6")}  # step: exit status of a stop, and after what is shown Ctrl-C is typed


@dataclass(frozen=True, kw_only=True)
class Step:
    number: int
    command: str
    seconds: float
    silent: float
    status: int
    said: str

    @property
    def is_right(self) -> bool:
        return self.status == STOPPED.get(self.number, (0, b""))[0] and (self.silent <= SILENCE or self.number == 1)

    def row(self) -> str:
        before = BEFORE.get(self.number, ("-", ""))[0]
        figures = f"{self.number:2}  {before:>7}  {self.seconds:6.1f}  {self.silent:6.1f}  {self.status:4}"
        return f"{figures}  {self.command}\n      {self.said}"


def lay_out(tar: Path, folder: Path) -> Path:
    """A folder a class with every n-th photo of the tar; gives one of them."""
    with tarfile.open(tar) as archive:
        members = [m for m in archive if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))]
        for member in members[:: max(1, len(members) // NUM_PHOTOS)][:NUM_PHOTOS]:
            place = folder / Path(member.name).parent.name / Path(member.name).name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(archive.extractfile(member).read())
    return place


def run(number: int, command: str, work: Path, environment: dict[str, str]) -> Step:
    """Run a command in a terminal of its own; Ctrl-C once it shows what a step is to be stopped after."""
    ours, theirs = pty.openpty()
    start = last = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=work, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    silent, text, stop = 0.0, b"", STOPPED.get(number, (0, b""))[1]
    while True:
        readable = select.select([ours], [], [], 0.1)[0]
        now = time.monotonic()
        if readable:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # the terminal is closed
                data = b""
            if not data:
                break
            silent, last, text = max(silent, now - last), now, text + data
        if stop and stop in text:
            os.killpg(process.pid, signal.SIGINT)
            stop = b""
    status = process.wait()
    end = time.monotonic()
    left = [line.rpartition("\x1b[2K")[2] for line in text.decode(errors="replace").replace("\r\n", "\n").split("\n")]
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip("\r ") for line in left]
    lines = [line.rpartition("\r")[2] for line in plain if line]
    (work / f"step-{number:02}.txt").write_bytes(text)
    return Step(
        number=number, command=command, seconds=end - start, silent=max(silent, end - last), status=status,
        said=lines[-1][:200] if lines else "nothing",
    )  # fmt: skip


def install(work: Path) -> tuple[str, dict[str, str]]:
    """What step 1 runs, and the environment in which the others find what it installed."""
    venv, pip = work / "venv", [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(work / "wheel"), str(ROOT)], check=True)
    (wheel,) = (work / "wheel").glob("*.whl")
    command = f"python -m pip install --constraint {ROOT / 'constraints.txt'} '{wheel}[all]'"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return command, {**environment, "PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="a tar with a folder a class")
    parser.add_argument("--weights", type=Path, required=True, help="MobileOne-S0's")
    parser.add_argument("--steps", default="1-20", help="FIRST-LAST")
    parser.add_argument("--work", type=Path, help="an empty folder; by default a temporary one")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    first, last = map(int, given.steps.split("-"))
    work = given.work or Path(tempfile.mkdtemp(prefix="onefold-steps-"))
    photo = lay_out(given.photos, work / "photos").relative_to(work)
    environment, steps = dict(os.environ), list[Step]()
    page = given.results / f"{datetime.date.today()}-user-steps.txt"
    for number in range(first, last + 1):
        command = STEPS[number - 1].format(weights=given.weights.resolve(), photo=photo)
        typed = command
        if number == 1:
            typed, environment = install(work)
        steps.append(replace(run(number, typed, work, environment), command=command))
        print(steps[-1].row(), flush=True)
        text = table(steps).replace(str(given.weights.resolve()), given.weights.name)
        page.write_text(text.replace(str(ROOT), ".").replace(f"{work}/", ""))
    return 0 if all(step.is_right for step in steps) else 1


def table(steps: list[Step]) -> str:
    """The steps that were taken, and what is wrong with them."""
    machine = f"load {os.getloadavg()[0]:.1f} at the end, {len(os.sched_getaffinity(0))} cores"
    lines = [__doc__.splitlines()[0], "", f"     before    time  silent  exit  command (seconds; {machine})"]
    wrong = [step.number for step in steps if not step.is_right] or "none"
    total = f"{sum(step.seconds for step in steps):.0f} s in all; failed, or silent for over {SILENCE:.0f} s: {wrong}"
    before = [f"before {number}: {seconds} s {of}" for number, (seconds, of) in BEFORE.items()]
    return "\n".join([*lines, *(step.row() for step in steps), "", total, *before, ""])


if __name__ == "__main__":
    sys.exit(main())
