"""A training step with the wheel's kernels and no compiler, against kernels compiled on this machine, and against none.

    python benchmarks/without_compiler.py --python ENVIRONMENT/bin/python [--rounds 12] [--batch 16] [--threads 2]

ENVIRONMENT has the wheel installed, not an editable checkout. Three processes of it step MobileOne-S0 (forward, loss,
backward; 224 px) in turns, the order reversed every other round: with an empty PATH, so that no compiler is found; with
ONEFOLD_KERNELS=compile, which passes over the wheel's kernels; with ONEFOLD_KERNELS=plain. Each has an empty cache.
Prints the median and the least step of each, and the ratios to the second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {
    "wheel, no compiler": {"PATH": "/nowhere"},
    "compiled here": {"ONEFOLD_KERNELS": "compile"},
    "no compiled code": {"ONEFOLD_KERNELS": "plain"},
}


def step_when_told(batch: int, threads: int) -> None:
    """Print the seconds of a step for each line that is read."""
    import torch
    import torch.nn.functional as F

    import onefold

    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = onefold.create_model("mobileone_s0", num_classes=10).train()
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))

    def step() -> float:
        start = time.perf_counter()
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        return time.perf_counter() - start

    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="of an environment with the wheel")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        step_when_told(given.batch, given.threads)
        return
    command = [str(given.python), __file__, *sys.argv[1:], "--step"]
    processes, seconds = {}, {name: [] for name in CASES}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for name, more in CASES.items():
        cache = {"XDG_CACHE_HOME": tempfile.mkdtemp()}
        processes[name] = subprocess.Popen(
            command, env={**environment, **cache, **more}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        while (line := processes[name].stdout.readline().strip()) != "ready":
            if not line:
                sys.exit(f"{name}: it ended with status {processes[name].wait()}")
    for number in range(given.rounds):
        for name in list(CASES)[:: 1 if number % 2 else -1]:
            processes[name].stdin.write("\n")
            processes[name].stdin.flush()
            seconds[name].append(float(processes[name].stdout.readline()))
    base = seconds["compiled here"]
    print(f"MobileOne-S0, batch {given.batch}, 224 px, {given.threads} threads, {given.rounds} rounds; seconds a step")
    for name, found in seconds.items():
        ratios = sorted(a / b for a, b in zip(found, base, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{name:20} median {statistics.median(found):.3f}  least {min(found):.3f}  of compiled here {ratio}")


if __name__ == "__main__":
    main()
