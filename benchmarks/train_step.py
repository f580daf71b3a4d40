"""A training step (forward, loss, backward), ours against timm, branch-by-branch code and the plain skeleton.

    python benchmarks/train_step.py [--models mobileone_s0,...] [--dtypes float32,bfloat16] [--allocators equal,default]
                                    [--batch 32] [--size 224] [--threads 2] [--rounds 20] [--compile] [--units]
    python benchmarks/train_step.py --slower [--models ...,timm:NAME] --batch 16 --size 128 --threads 1 --rounds 9

Interleaved in one run: every round steps each contender once, in a random order. Prints medians, images a second,
their ratio to ours (median and range of the rounds), page faults a step, the peak memory of a process that does nothing
else, and the bytes that the tensors of a step pass through memory, by count. bfloat16 is autocast's. `--units` adds a
table of unit shapes: every route's time. `--slower` asks another question: is any network, of the catalogue or of ten
of timm's, slower by our routes than without them? Ours is timed, as `onefold train` and `accelerate` take it, by the
routes that were measured to be fastest. Raw samples are appended to benchmarks/results/train-step-<machine>.jsonl.

Both memory formats of every contender but ours are there: each side is to be judged by its better one. `equal` has the
C library keep the memory that it was given, for every contender alike: by default it returns large maps to the system,
which hands them out again page by page, and that costs contenders without a pool of their own up to half of their time.
`default` is what a user gets who sets nothing. Each allocator is a process of its own, for it reads its settings once.
Needs timm, whose operator schemas are declared here where torchvision lacks them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import math
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onefold import accelerate
from onefold.bench import Machine
from onefold.models import create_model, list_models
from onefold.models.mobileone import make_branches
from onefold.reparam import Chain, Sum, mixed, moments, per_branch, quickest, set_route_
from onefold.reparam.accelerate import set_measured_routes_
from onefold.reparam.branches import Unit, as_unit
from onefold.reparam.measured_routes import measure_routes
from onefold.reparam.routes import route_costs

HERE = Path(__file__).parent
CONTENDERS = (
    "ours",
    "per_branch",
    "plain",
    "plain channels_last",
    "timm",
    "timm channels_last",
    "timm accelerated",
    "timm compiled",
)
OF_TIMM = (  # of each family one that is small
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "resnet18",
    "repvit_m0_9",
    "fastvit_t8",
    "mobileone_s0",
    "starnet_s1",
    "ghostnet_100",
)
# glibc: one heap for all threads, nothing mapped apart from it, nothing returned. The threshold for mapping cannot be
# set above 32 MiB, and maps of training are larger, so mapping is switched off.
ALLOCATORS = {
    "equal": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    "default": {},
}


def timm_model(name: str) -> nn.Module:
    """timm's network, trained as it comes; its MobileOne stem picks pixels first in its 1x1 branch.

    That branch - a strided 1x1 convolution of 3 channels - makes torch 2.13 crash in channels_last on processors
    without AVX-512; the change costs nothing and keeps the numbers.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    model = timm.create_model(name, pretrained=False)
    if name.startswith("mobileone"):
        conv = model.stem.conv_scale.conv
        conv.stride, conv.__class__ = (1, 1), _Picking
    _LIBRARIES.append(library)
    return model


_MEASURED: dict[str, str] = {}  # one kind of layer has one answer in a process
_LIBRARIES: list[torch.library.Library] = []  # operators live as long as what defined them


class _Picking(nn.Conv2d):
    """A 1x1 convolution of every second pixel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last))


def plain_(model: nn.Module) -> nn.Module:
    """One convolution and one norm in place of each tree: the branchless network of the same shape."""
    for name, child in list(model.named_children()):
        unit = as_unit(child.train()) if isinstance(child, (Chain, Sum)) else None
        if unit is not None:
            (c_in, c_out), g = unit.channels, unit.geometry
            conv = nn.Conv2d(c_in, c_out, g.kernel_size, g.stride, g.padding, groups=g.groups, bias=False)
            setattr(model, name, nn.Sequential(conv, nn.BatchNorm2d(c_out)))
        else:
            plain_(child)
    return model


def build(name: str, contender: str) -> nn.Module:
    if contender.startswith("timm"):
        model = timm_model(name)
        model = accelerate(model) if contender == "timm accelerated" else model
        return torch.compile(model) if contender == "timm compiled" else model
    model = create_model(name)
    if contender.startswith("plain"):
        return plain_(model)
    return set_route_(model, per_branch if contender == "per_branch" else quickest)


def step_of(name: str, contender: str, given: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(0)
    device = torch.device(given.device)
    model = build(name, contender).to(device).train()
    x, y = torch.randn(given.batch, 3, given.size, given.size), torch.randint(0, 1000, (given.batch,))
    x, y = x.to(device), y.to(device)
    if contender not in ("plain", "timm"):
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if contender in ("ours", "timm accelerated"):
        with torch.autocast(device.type, torch.bfloat16, enabled=given.dtype == "bfloat16"):
            set_measured_routes_(model, measure_routes(copy.deepcopy(model), x, _MEASURED))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=given.dtype == "bfloat16"):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(name: str, contender: str, given: argparse.Namespace) -> float:
    """Gigabytes over what the process held before its first step; in a process of its own on a CPU."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import train_step as t\n"
        "given = t.parser().parse_args(sys.argv[4:]); t.torch.set_num_threads(given.threads)\n"
        "print(t.memory_here(sys.argv[2], sys.argv[3], given))"
    )
    arguments = [str(HERE), name, contender, *sys.argv[1:], "--dtype", given.dtype]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def memory_here(name: str, contender: str, given: argparse.Namespace) -> float:
    step = step_of(name, contender, given)
    if given.device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**30
    before = _most_memory()
    step()
    step()
    return (_most_memory() - before) / 2**20


def _most_memory() -> int:
    """KiB that this process held at most. `ru_maxrss` would tell what its parent held before, where that is more."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])


def bytes_moved(name: str, given: argparse.Namespace) -> tuple[float, float, float]:
    """GB a step of units: branch by branch, as the plain skeleton, and by moments; float32, by count.

    A convolution reads x and writes y; a norm reads y twice and writes; a sum and a ReLU read and write. Backward, a
    ReLU reads two and writes one, a norm reads y and its gradient twice and writes, a convolution reads both twice and
    writes one. Moments: the input three times, the output written; backward, input, output and gradient twice each.
    """
    totals = [0.0, 0.0, 0.0]
    for unit, x, y in units_of(name, given):
        i, o, convs, branches = x.numel(), y.numel(), len(unit.convs), len(unit.branches)
        norm, relu, conv = 8 * o, 5 * o, 3 * i + 3 * o
        totals[0] += convs * conv + branches * norm + 3 * (branches - 1) * (o + i) + relu
        totals[1] += conv + norm + relu
        totals[2] += 2 * i + o + 3 * i + 4 * o
    return tuple(4 * t * given.batch / 2 / 1e9 for t in totals)


def units_of(name: str, given: argparse.Namespace) -> list[tuple[Unit, Tensor, Tensor]]:
    """Every unit of a network with its input and output, for two images."""
    found: list[tuple[Unit, Tensor, Tensor]] = []

    def note(tree: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
        y, unit = per_branch(tree, x, act), as_unit(tree) if x.dim() == 4 else None
        found.extend([] if unit is None else [(unit, x, y)])
        return y

    with torch.no_grad():
        set_route_(create_model(name).train(), note)(torch.randn(2, 3, given.size, given.size))
    return found


def roofline(name: str, given: argparse.Namespace) -> tuple[float, float]:
    """The least seconds of a step's units, by the route that the count takes: their products, and their bytes.

    A product takes what `torch.mm` takes for it, quickest of five; of a symmetric one half is counted. Depthwise
    convolutions count by their bytes alone. Bytes go at the rate of a copy of 256 MB, read and written.
    """
    dtype = getattr(torch, given.dtype)
    known: dict[tuple[int, int, int], float] = {}

    def product(n: int, k: int, m: int) -> float:
        if (n, k, m) not in known:
            a, b, out = torch.ones(n, k, dtype=dtype), torch.ones(k, m, dtype=dtype), torch.ones(n, m, dtype=dtype)
            known[n, k, m] = quickest_of(lambda: torch.mm(a, b, out=out))
        return known[n, k, m]

    products, moved = 0.0, 0.0
    for unit, x, y in units_of(name, given):
        x, y = (t[:1].expand(given.batch, *t.shape[1:]) for t in (x, y))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            cost = route_costs(unit, x)
        i, o, convs, (_, out) = x.numel(), y.numel(), len(unit.convs), unit.channels
        k, n = math.prod(unit.geometry.kernel_size) * unit.channels[0] // unit.geometry.groups, o // out
        own = cost.moments == min(cost)
        moved += 5 * i + 5 * o if own else convs * (3 * i + 13 * o)
        if unit.geometry.groups == 1:
            thrice = product(n, k, out) + product(out, n, k) + product(n, out, k)
            square = product(k, n, k) / 2 + product(n, k, k) + 1.5 * product(convs * out, k, k)
            products += thrice + square if own else convs * thrice
    a, b = torch.ones(2, 1 << 26)
    return products, moved * dtype.itemsize / (2 * a.numel() * 4 / quickest_of(lambda: b.copy_(a)))


def quickest_of(call: Callable[[], object]) -> float:
    """Seconds of the quickest of five calls."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def interleave(calls: Mapping[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every call in every round, and its page faults a call, in an order drawn anew each round.

    One round before is not counted.

    (`onefold.bench.compare` wants sixteen rounds or more, which for steps of many seconds is too long.)
    """
    order, random_source = list(calls), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, int] = dict.fromkeys(calls, 0)
    for number in range(rounds + 1):
        random_source.shuffle(order)
        for name in order:
            gc.collect()
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            calls[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
                faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return seconds, {name: total / rounds for name, total in faults.items()}


def run_model(name: str, given: argparse.Namespace) -> None:
    chosen = given.contenders.split(",")
    contenders = ["ours", *(c for c in CONTENDERS[1:] if c in chosen and (given.compile or c != "timm compiled"))]
    memory = {c: peak_memory(name, c, given) if given.memory and c != "timm compiled" else math.nan for c in contenders}
    seconds, faults = interleave({c: step_of(name, c, given) for c in contenders}, given.rounds)
    keep({"model": name, **vars(given), "seconds": seconds, "page_faults": faults, "peak_memory_gb": memory})
    where = f"{given.size} px, {given.dtype}, {given.device}, {given.threads} threads, {given.rounds} rounds"
    print(f"\n{name}: batch {given.batch}, {where}, allocator {given.allocator}")
    heads = f"{'median':>9}{'min-max':>15}{'images/s':>10}{'time / ours':>20}{'page faults':>13}{'peak memory':>13}"
    print(f"{'':22}{heads}")
    for c in contenders:
        mid, low, high = statistics.median(seconds[c]), min(seconds[c]), max(seconds[c])
        ratios = [its / ours for its, ours in zip(seconds[c], seconds["ours"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        times = f"{mid:7.3f} s{f'{low:.2f}-{high:.2f}':>15}{given.batch / mid:10.1f}{ratio:>20}"
        print(f"{c:22}{times}{faults[c]:13,.0f}{memory[c]:10.2f} GB")
    moved = bytes_moved(name, given)
    print("moved by count, GB a step: branch by branch {:.1f}, plain {:.1f}, moments {:.1f}".format(*moved))
    products, passes = roofline(name, given)
    share = max(products, passes) / statistics.median(seconds["ours"])  # they may overlap
    print(
        f"roofline: products {products:.3f} s, bytes {passes:.3f} s; the longer is {share:.0%} of the step", flush=True
    )


def run_slower(name: str, given: argparse.Namespace) -> None:
    """A line on a network, ours or timm:NAME: its time without our routes over that with them."""
    own = name.removeprefix("timm:")
    ours, without = ("timm accelerated", "timm channels_last") if name != own else ("ours", "per_branch")
    start = time.perf_counter()
    calls = {"ours": step_of(own, ours, given), "without": step_of(own, without, given)}
    measured = time.perf_counter() - start
    seconds, _ = interleave(calls, given.rounds)
    keep({"model": name, **vars(given), "seconds": seconds})
    ratios = sorted(a / b for a, b in zip(seconds["without"], seconds["ours"], strict=True))
    median = statistics.median(ratios)
    times = "".join(f"{1e3 * statistics.median(seconds[each]):10.0f}" for each in ("ours", "without"))
    spread = f"({ratios[len(ratios) // 4]:.2f}-{ratios[-1 - len(ratios) // 4]:.2f})"
    load, mark = os.getloadavg()[0], "  SLOWER" if median < 0.98 else ""
    print(f"{name:32}{given.dtype:10}{times}{median:8.2f} {spread:13}{measured:7.1f}{load:6.1f}{mark}", flush=True)


def keep(result: dict[str, object]) -> None:
    """The raw samples, one line a run."""
    machine = Machine.detect()
    line = {
        "benchmark": "train_step",
        "date": datetime.date.today().isoformat(),
        "machine": machine.to_dict(),
        **result,
    }
    with open(HERE / "results" / f"train-step-{machine.slug}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


UNITS = (
    (3, 48, 3, 2, 1, 1, 224), (48, 48, 3, 2, 48, 4, 112), (48, 48, 3, 1, 48, 4, 56), (48, 48, 1, 1, 1, 4, 56),
    (48, 128, 1, 1, 1, 4, 28), (128, 128, 3, 1, 128, 4, 28), (128, 128, 1, 1, 1, 4, 28), (256, 256, 3, 1, 256, 4, 14),
    (256, 256, 1, 1, 1, 4, 14), (256, 1024, 1, 1, 1, 4, 7), (192, 192, 3, 1, 192, 1, 28), (192, 192, 1, 1, 1, 1, 28),
    (512, 512, 1, 1, 1, 1, 14),
)  # fmt: skip


def run_units(given: argparse.Namespace) -> None:
    """Milliseconds of a unit with its ReLU, forward and backward, by every route and as one convolution and norm.

    bfloat16 is autocast's, with an input in bfloat16, as it comes from the unit before.
    """
    title = "".join(f"{name:>11}" for name in ("per_branch", "moments", "mixed", "plain"))
    low = given.dtype == "bfloat16"
    print(f"\n{given.dtype}, allocator {given.allocator}")
    print(f"{'unit: in, out, kernel, stride, k, map':42}{title}  quickest takes")
    for c_in, c_out, kernel, stride, groups, k, size in UNITS:
        torch.manual_seed(0)
        unit, act = make_branches(c_in, c_out, kernel, stride, groups, k).train(), nn.ReLU()
        x = (
            torch.randn(given.batch, c_in, size, size)
            .relu()
            .to(torch.bfloat16 if low else torch.float32)
            .to(memory_format=torch.channels_last)
            .requires_grad_(c_in > 3)
        )
        skeleton = plain_(nn.Sequential(copy.deepcopy(unit), act)).to(memory_format=torch.channels_last)
        calls = {r.__name__: partial(_unit_step, partial(r, unit), x, act) for r in (per_branch, moments, mixed)}
        calls["plain"] = partial(_unit_step, lambda x, _, net=skeleton: net(x), x, act)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            timed, _ = interleave(calls, 9)
            cost = route_costs(as_unit(unit), x)._asdict()
        ms = {name: 1e3 * statistics.median(times) for name, times in timed.items()}
        row = "".join(f"{ms[name]:11.1f}" for name in ("per_branch", "moments", "mixed", "plain"))
        label = f"{c_in}, {c_out}, {kernel}x{kernel}, {stride}, {k}, {size}"
        print(f"{label:42}{row}  {min(cost, key=cost.get)}", flush=True)


def _unit_step(unit: Callable[[Tensor, nn.Module], Tensor], x: Tensor, act: nn.Module) -> None:
    unit(x, act).sum().backward()


def draw(path: Path) -> None:
    """Images a second of every model's newest run beside timm that has been kept on this machine."""
    from matplotlib.figure import Figure

    ledger = HERE / "results" / f"train-step-{Machine.detect().slug}.jsonl"
    kept = [json.loads(line) for line in ledger.read_text().splitlines()]
    runs = {
        run["model"]: run
        for run in kept
        if "timm channels_last" in run["seconds"] and run.get("allocator") == "equal" and run["dtype"] == "float32"
    }
    colours = {"ours": "#0d9488", "plain channels_last": "#94a3b8", "timm channels_last": "#f59e0b", "timm": "#c2410c"}
    figure = Figure(figsize=(8, 0.8 + 0.9 * len(runs)), layout="constrained")
    axes = figure.subplots()
    seen: set[str] = set()
    for row, name in enumerate(sorted(runs)):
        present = [c for c in colours if c in runs[name]["seconds"]]
        for number, c in enumerate(present):
            rate, y = runs[name]["batch"] / statistics.median(runs[name]["seconds"][c]), row + 0.2 * number
            axes.barh(y, rate, 0.18, color=colours[c], label=None if c in seen else c)
            axes.text(rate + 0.2, y, f"{rate:.1f}", va="center", fontsize=8)
            seen.add(c)
    axes.set_yticks([row + 0.3 for row in range(len(runs))], sorted(runs))
    axes.invert_yaxis()
    axes.set_xlabel("training, images a second: batch 32, 224 px, float32, two threads, equal allocator settings")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--models", help="S0-S4 and MobileNetV1; with --slower all, and ten of timm's")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--dtypes", default="float32,bfloat16")
    options.add_argument("--allocators", default="equal,default", help="each in a process of its own; glibc only")
    options.add_argument("--allocator", default="", help=argparse.SUPPRESS)  # which one this process was started with
    options.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--contenders", default=",".join(CONTENDERS), help="ours is always there")
    options.add_argument("--compile", action="store_true", help="also timm under torch.compile, which takes minutes")
    options.add_argument("--no-memory", dest="memory", action="store_false")
    options.add_argument("--units", action="store_true", help="also the table of unit shapes")
    options.add_argument("--slower", action="store_true", help="is any network slower by our routes than without?")
    options.add_argument("--figure", type=Path, help="draw what has been kept, and measure nothing")
    return options


def main() -> None:
    given = parser().parse_args()
    if given.figure:
        draw(given.figure)
        return
    if not given.allocator:
        for allocator in given.allocators.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--allocator", allocator]
            subprocess.run(command, env={**os.environ, **ALLOCATORS[allocator]}, check=True)
        return
    torch.set_num_threads(given.threads)
    print(f"{Machine.detect().slug}; torch {torch.__version__}; allocator {given.allocator}")
    if given.slower:
        print(f"batch {given.batch}, {given.size} px, {given.threads} threads, {given.rounds} interleaved rounds")
        print(f"{'ms a step':42}{'ours':>10}{'without':>10}  median of without / ours (quartiles), s to measure, load")
        everything = [*list_models(), *(f"timm:{name}" for name in OF_TIMM)]
        for name in everything if given.models is None else given.models.split(","):
            for dtype in given.dtypes.split(","):
                given.dtype = dtype
                run_slower(name, given)
        return
    models = [*(f"mobileone_s{n}" for n in range(5)), "mobilenetv1_100"]
    for name in models if given.models is None else filter(None, given.models.split(",")):
        for dtype in given.dtypes.split(","):
            given.dtype = dtype
            run_model(name, given)
    for dtype in given.dtypes.split(",") if given.units else ():
        given.dtype = dtype
        run_units(given)


if __name__ == "__main__":
    main()
