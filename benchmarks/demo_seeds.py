"""Does the demo's int8 gate stand on an edge? Its training, fusing and int8 for many seeds, threads and processors.

    python benchmarks/demo_seeds.py [--seeds 0-19] [--threads 1,2] [--like native,avx2,default] [--jobs 2]
                                    [--work FOLDER] [--again]

A case is a seed of the training, a number of threads for everything, and instructions: "native", all that the
processor has, or "avx2" and "default" (SSE), to which PyTorch and OpenVINO are kept by ATEN_CPU_CAPABILITY and
ONEDNN_MAX_CPU_ISA. Each of these rounds its sums in another order, so each trains another network; on the last two
OpenVINO's int8 sums saturate, and the demo takes 7-bit weights. Every case runs in a process of its own by the demo's
own functions; left out are the measurement of latency and the demo's report. Accuracy does not depend on what else the
machine does.

Then other ways to calibrate the networks of one thread and seeds 0 to 9, each as the simulation in PyTorch: how many
answers it changes of those of the network in float, and its noise, |q - f| / |f - mean of f| of the logits.

What is trained and scored is kept in --work, and a later call goes on there. The table and the rows (JSON lines) of all
cases that are there go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onefold.bench import Machine, Procedure
from onefold.commands.calibration_cache import CalibrationOptions, calibrated_network
from onefold.commands.demo import demo_recipe, deploy_options
from onefold.commands.deploy import build_deployment
from onefold.commands.fuse import fuse
from onefold.commands.held_out_images import validation_images
from onefold.commands.open_network import open_network
from onefold.commands.train import start_run
from onefold.file_io import write_text
from onefold.quantize import QuantizationMethod

HERE = Path(__file__).parent
INSTRUCTIONS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
PACKAGES = ("torch", "onnxruntime", "openvino")
OTHERS = {
    "64 images, 7 bits": (64, QuantizationMethod(weight_qmax=63)),
    "200 images, 7 bits": (200, QuantizationMethod(weight_qmax=63)),
    "200 images, 7 bits, corrected": (200, QuantizationMethod(weight_qmax=63, correct_weights=True)),
    "200 images, 8 bits": (200, QuantizationMethod()),
    "200 images, 8 bits, corrected": (200, QuantizationMethod(correct_weights=True)),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What makes one network of the demo differ from another."""

    like: str
    threads: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.like}-t{self.threads}-s{self.seed:02d}"


def run(case: Case, work: Path) -> dict[str, Any]:
    """Train, fuse and deploy as the demo does, in this process; what came of it, as plain values."""
    torch.set_num_threads(case.threads)
    folder, began = work / case.name, time.monotonic()
    fused = folder / "fused.safetensors"
    if not fused.is_file():
        start_run(demo_recipe(case.seed), folder / "runs" / "digits-s0")
        fuse(folder / "runs" / "digits-s0", fused)
    order = replace(deploy_options(), timed=False, procedure=Procedure(samples=16, threads=case.threads))
    with tempfile.TemporaryDirectory() as place:
        done = build_deployment(fused, Path(place) / "artifacts", order, say=lambda line: print(f"  {line}"))
    scores = {each.name: {"top1": each.top1, "drop": each.drop, "changed": each.changed} for each in done.verdicts}
    return {
        **vars(case),
        "fp32": done.top1,
        "count": done.verdicts[0].count,
        "weight_qmax": order.calibration.method.weight_qmax,
        "artifacts": scores,
        "failed": [gate.sentence for gate in done.gates if not gate.holds],
        "others": others(fused) if case.threads == 1 and case.seed < 10 else {},
        "seconds": round(time.monotonic() - began),
    }


def others(fused: Path) -> dict[str, dict[str, float]]:
    """Of each other way to calibrate: points of top-1 lost, answers changed, and noise as a share."""
    network, (source, _) = open_network(fused), validation_images("", "digits")
    images = torch.from_numpy(np.stack([network.preprocessing(source.image(i)) for i in range(len(source))]))
    labels = torch.tensor([source.label(i) for i in range(len(source))])

    @torch.inference_mode()
    def logits(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat([model(batch) for batch in images.split(32)])

    true, found = logits(network.model), {}
    for name, (count, method) in OTHERS.items():
        answers = logits(
            calibrated_network(network, CalibrationOptions(data="digits", count=count, method=method)).made.model
        )
        right = [(each.argmax(1) == labels).double().mean() for each in (true, answers)]
        found[name] = {
            "drop": 100 * float(right[0] - right[1]),
            "changed": int((answers.argmax(1) != true.argmax(1)).sum()),
            "noise": float((answers - true).norm() / (true - true.mean(0)).norm()),
        }
    return found


def start(case: Case, work: Path) -> None:
    """Run a case in a process of its own, where it is not kept already."""
    print(case.name, flush=True)
    command = [sys.executable, __file__, "--work", str(work), "--case", json.dumps(vars(case))]
    environment = {
        **os.environ,
        **INSTRUCTIONS[case.like],
        "OMP_NUM_THREADS": str(case.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case.name} FAILED: {done.stderr.strip().splitlines()[-1]}", flush=True)


def kept(work: Path) -> list[dict[str, Any]]:
    """The rows of all cases that are there."""
    rows = [json.loads(path.read_text()) for path in work.glob("*/row.json")]
    return sorted(rows, key=lambda row: (list(INSTRUCTIONS).index(row["like"]), row["threads"], row["seed"]))


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The page, line by line."""
    machine = Machine.detect(PACKAGES)
    yield __doc__.splitlines()[0]
    yield ""
    features = ", ".join(sorted(machine.features))
    yield f"{datetime.date.today()}; {machine.chip} ({features}); " + ", ".join(
        f"{name} {machine.versions[name]}" for name in PACKAGES if name in machine.versions
    )
    yield f"{rows[0]['count']} held-out digits: one is {100 / rows[0]['count']:.2f} points. int8 may lose 1 point."
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["like"], row["threads"]), []).append(row)
    for (like, threads), members in groups.items():
        yield from ("", f"instructions {like}, threads {threads}, {_bits(members[0])}-bit weights")
        yield "            ONNX Runtime int8          OpenVINO int8"
        yield "seed  fp32  top-1  lost  changed       top-1  lost  changed     fp32 changed  gates"
        yield from map(_line, members)
        passed = sum(not row["failed"] for row in members)
        int8 = [each for row in members for name, each in row["artifacts"].items() if name.endswith("int8")]
        most, worst = max(each["changed"] for each in int8), max(each["drop"] for each in int8)
        yield f"{passed} of {len(members)} passed; at most {most} answers changed and {worst:.2f} points lost"
    yield from (
        "",
        "Other ways to calibrate the networks of one thread (answers changed: most, mean; points lost: most)",
    )
    for name in OTHERS:
        found = [row["others"][name] for row in rows if name in row["others"]]
        changed, lost, noise = ([each[key] for each in found] for key in ("changed", "drop", "noise"))
        failed = sum(each > 1.0 for each in lost)
        yield (
            f"{name:30} changed {max(changed):2} {np.mean(changed):5.2f}   lost {max(lost):5.2f}   "
            f"noise {100 * np.mean(noise):4.1f} %   gate failed {failed} of {len(found)}"
        )


def _bits(row: dict[str, Any]) -> int:
    return int(row["weight_qmax"] + 1).bit_length()


def _line(row: dict[str, Any]) -> str:
    cells = [f"{row['seed']:4}  {row['fp32']:5.2f}"]
    for runtime in ("onnx", "openvino"):
        each = row["artifacts"].get(f"{runtime}-int8")
        cells.append(f"{each['top1']:5.2f} {each['drop']:5.2f}  {each['changed']:7}" if each else f"{'refused':20}")
    fp32 = sum(each["changed"] for name, each in row["artifacts"].items() if name.endswith("fp32"))
    return "    ".join([*cells, f"{fp32:12}", "; ".join(row["failed"]) or "passed"])


def seeds_of(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-19"), help="FIRST-LAST")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by comma")
    parser.add_argument("--like", default="native", help=f"instructions, by comma: {', '.join(INSTRUCTIONS)}")
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side, where one thread is enough for each")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "onefold-demo-seeds")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--again", action="store_true", help="score networks again that are kept")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        case = Case(**given.case)
        write_text(given.work / case.name / "row.json", json.dumps(run(case, given.work)))
        return
    for threads in map(int, given.threads.split(",")):
        cases = [Case(like=like, threads=threads, seed=seed) for like in given.like.split(",") for seed in given.seeds]
        missing = [case for case in cases if given.again or not (given.work / case.name / "row.json").is_file()]
        with ThreadPoolExecutor(max(1, given.jobs // threads)) as pool:
            list(pool.map(lambda case: start(case, given.work), missing))
    rows = kept(given.work)
    text = "\n".join(table(rows)) + "\n"
    stem = given.results / f"{datetime.date.today()}-demo-seeds"
    write_text(stem.with_suffix(".txt"), text)
    write_text(stem.with_suffix(".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    print(text)


if __name__ == "__main__":
    main()
