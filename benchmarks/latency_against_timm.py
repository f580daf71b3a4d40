"""Our networks against timm's in each runtime: latencies of one image, all networks interleaved in one run.

    python benchmarks/latency_against_timm.py [--runtimes onnx,openvino,...] [--precisions fp32,int8] [--threads 1,2]
                                     [--models mobileone_s0,timm:repvgg_a0,...] [--photos FOLDER] [--samples 300]
                                     [--folder artifacts/competitors] [--again] [--quick]

Every network is folded by our `fuse`, quantized by our `quantize` and exported by our `export`, which proves its
answer; what is exported already is not exported again, and what was refused is not tried again without `--again`. All
weights are drawn at random: latencies do not depend on them, and accuracies are not told. For each runtime, precision
and number of threads all networks are timed in the same rounds, in an order drawn anew each round, each timed call
after two of its own. Each network is used at the size of images that it is published with; the table says which.

Appends every raw sample to benchmarks/results/competitors-<machine>.jsonl and writes a dated table beside it. With
`--quick`: two networks, few samples, nothing kept. Needs timm, whose operator schemas are declared here where
torchvision lacks them. With onefold[onnx], [openvino], [litert], [executorch], [ncnn]: whichever are installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from onefold.bench import Comparison, Machine, Procedure, append_results, compare
from onefold.commands.bench import make_timed_call
from onefold.commands.calibration_cache import CalibrationOptions, calibrated_network
from onefold.commands.export import model_info
from onefold.commands.open_network import Network, open_network
from onefold.commands.predictor import Predictor, open_predictor
from onefold.commands.timm_networks import init_norm_statistics_, is_timm
from onefold.data import Preprocessing
from onefold.errors import OnefoldError
from onefold.file_io import write_text
from onefold.models import CATALOGUE, count_flops, create_model
from onefold.models.load_model import Card
from onefold.quantize import QuantizedModel
from onefold.runtimes import export as export_to

HERE = Path(__file__).parent
PACKAGES = {  # what has to be there to export to a runtime and to run it
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "executorch": ("executorch",),
    "ncnn": ("pnnx", "ncnn"),
}
PRECISIONS = {"ncnn": ("fp32", "bf16")}  # of the others: fp32 and int8
OURS = ("mobileone_s0", "mobileone_s1", "mobileone_s2", "mobileone_s3", "mobileone_s4", "mobilenetv1_100")
THEIRS = (
    *("mobileone_s0", "mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0", "fastvit_t8"),
    *("repvgg_a0", "mobilevit_s"),
)
PHOTOS = 32  # made up, to calibrate with


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is exported, where to, and with which photos int8 is calibrated."""

    names: tuple[str, ...]
    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    folder: Path
    photos: str
    again: bool


def declare_operators() -> None:
    """The schemas that torchvision registers when imported, where it is a build that does not fit this torch."""
    if find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # a library's definitions end with it


_kept: list[torch.library.Library] = []


def network_of(name: str) -> Network:
    """A network with drawn weights, folded."""
    if is_timm(name):
        return open_network(name).fused()[0]
    torch.manual_seed(0)
    model, preprocessing = create_model(name).eval(), Preprocessing.from_dict(dict(CATALOGUE[name].input))
    init_norm_statistics_(model, preprocessing)
    card = Card(
        model=name,
        num_classes=1000,
        preprocessing=preprocessing.to_dict(),
        untrained=True,
        licence="Apache-2.0",
        source="onefold, weights drawn at random: accuracy unknown",
    )
    return Network(model=model, card=card, title=name).fused()[0]


def place_of(job: Job, name: str, runtime: str, precision: str) -> Path:
    return job.folder / name.replace(":", "-") / f"{runtime}-{precision}"


def export_all(job: Job, name: str) -> dict[str, object]:
    """Every artifact of one network that is missing; params, macs and size of the folded network."""
    wanted = [
        (runtime, precision)
        for precision in job.precisions
        for runtime in job.runtimes
        if precision in PRECISIONS.get(runtime, ("fp32", "int8"))
    ]
    missing = [each for each in wanted if is_missing(job, place_of(job, name, *each))]
    known = place_of(job, name, "network", "cost.json")
    if not missing and known.is_file():
        return dict(json.loads(known.read_text()))
    network = network_of(name)
    size = network.preprocessing.size
    counted = count_flops(network.model, size)
    made: QuantizedModel | OnefoldError | None = None
    for runtime, precision in missing:
        if precision == "int8" and made is None:
            made = calibrated(network, job.photos)
        export_one(job, network, made if precision == "int8" else None, (runtime, precision))
    told = {"params": counted.params, "macs": counted.macs, "size": size}
    write_text(known, json.dumps(told))
    return told


def calibrated(network: Network, photos: str) -> QuantizedModel | OnefoldError:
    """The network of 8 bits, or why there is none."""
    try:
        return calibrated_network(network, CalibrationOptions(data=photos, count=PHOTOS))
    except OnefoldError as error:
        return error


def is_missing(job: Job, place: Path) -> bool:
    return not (place / "manifest.json").is_file() and (job.again or not refusal_of(place).is_file())


def refusal_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.refused")


def export_one(job: Job, network: Network, made: QuantizedModel | OnefoldError | None, to: tuple[str, str]) -> None:
    """One artifact, or a note of why it was refused beside its place."""
    name, (runtime, precision) = network.title, to
    place = place_of(job, name, runtime, precision)
    size = network.preprocessing.size
    say(f"exporting {name} to {runtime} {precision}")
    refusal_of(place).unlink(missing_ok=True)
    try:
        if isinstance(made, OnefoldError):
            raise made
        export_to(
            network.model if made is None else made,
            (network.card.in_chans, size, size),
            place,
            runtime=runtime,
            info=model_info(network, name, made),
            precision=precision,
        )
    except OnefoldError as error:
        write_text(refusal_of(place), " ".join(str(error).split()))
        say(f"  refused: {error}")


def opened(job: Job, costs: dict[str, dict[str, object]], to: tuple[str, str], threads: int) -> dict[str, Predictor]:
    """Every network that there is for a runtime and precision, by name."""
    found = {}
    for name in job.names:
        place = place_of(job, name, *to)
        if not (place / "manifest.json").is_file():
            continue
        try:
            predictor = open_predictor(place, threads=threads)
        except OnefoldError as error:
            say(f"  left out: {name}: {error}")
            continue
        facts = {**predictor.facts, "source": name, "batch": 1, **costs[name]}
        found[name] = Predictor(**{**vars(predictor), "facts": facts})
    return found


def measured(predictors: dict[str, Predictor], procedure: Procedure) -> Comparison:
    """All of them against the first, interleaved; networks of one size are given the same images."""
    calls = {name: make_timed_call(predictor) for name, predictor in predictors.items()}
    return compare(calls, procedure, {name: dict(p.facts) for name, p in predictors.items()})


def table(job: Job, costs: dict[str, dict[str, object]], outcomes: dict[tuple[str, str], Comparison]) -> str:
    """Medians in milliseconds: a row a network, a column a runtime and precision; noisy ones are marked."""
    columns = list(outcomes)
    head = ["", "px", "M params", "M MACs", *(" ".join(each) for each in columns)]
    lines = [head]
    for name in job.names:
        known = costs[name]
        counts = [str(known["size"]), *(f"{int(known[key]) / 1e6:.2f}" for key in ("params", "macs"))]
        cells = []
        for column in columns:
            found = outcomes[column].measurements.get(name)
            noisy = "~" if found is not None and found.verdict == "noisy" else ""
            cells.append("-" if found is None else f"{noisy}{found.median_ns / 1e6:.2f}")
        lines.append([name, *counts, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def refusals(job: Job) -> list[str]:
    notes = []
    for name in job.names:
        places = sorted((job.folder / name.replace(":", "-")).glob("*.refused"))
        notes += [f"{name} {place.stem}: {place.read_text()}" for place in places]
    return notes


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(job: Job, procedures: list[Procedure], results: Path) -> str:
    """Export, measure, append; the table as text."""
    costs = {name: export_all(job, name) for name in job.names}
    machine = Machine.detect()
    started = datetime.datetime.now(datetime.timezone.utc)
    parts = [
        f"{machine.chip}, {machine.cores} cores, {machine.system}; {started:%Y-%m-%d %H:%M} UTC; load {machine.load}"
    ]
    parts += [", ".join(f"{name} {version}" for name, version in machine.versions.items())]
    for procedure in procedures:
        outcomes: dict[tuple[str, str], Comparison] = {}
        for runtime in job.runtimes:
            for precision in [p for p in job.precisions if p in PRECISIONS.get(runtime, ("fp32", "int8"))]:
                say(f"measuring {runtime} {precision} on {procedure.threads} thread(s)")
                with ExitStack() as stack:
                    found = opened(job, costs, (runtime, precision), procedure.threads)
                    for predictor in found.values():
                        stack.enter_context(predictor)
                    if len(found) < 2:
                        continue
                    outcome = outcomes[runtime, precision] = measured(found, procedure)
                append_results(results / f"competitors-{machine.slug}.jsonl", [outcome])
        parts += ["", f"Median ms of one image, {procedure.threads} thread(s), {procedure.samples} rounds; ~ is noisy"]
        parts += [table(job, costs, outcomes)]
        for (runtime, precision), outcome in outcomes.items():
            floor = f"{100 * outcome.floor.floor:.1f} %"
            parts += ["", f"{runtime} {precision}, {procedure.threads} thread(s) (A/A band {floor}):"]
            parts += outcome.sentences()
    notes = refusals(job)
    parts += ["", "Not measured, and why:", *notes] if notes else []
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join((*OURS, *(f"timm:{name}" for name in THEIRS))))
    parser.add_argument(
        "--runtimes", default=",".join(r for r, needs in PACKAGES.items() if all(map(find_spec, needs)))
    )
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--photos", help="a folder to calibrate int8 with; by default pictures are made up")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/competitors"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--again", action="store_true", help="try again what was refused")
    parser.add_argument("--quick", action="store_true", help="two networks, few samples, nothing kept")
    given = parser.parse_args()
    declare_operators()
    with tempfile.TemporaryDirectory() as aside:
        if given.quick:
            given.models, given.samples, given.folder = "mobilenetv1_100,timm:repvgg_a0", 16, Path(aside) / "artifacts"
            given.results, given.threads = Path(aside) / "results", "1"
        job = Job(
            names=tuple(given.models.split(",")),
            runtimes=tuple(given.runtimes.split(",")),
            precisions=tuple(given.precisions.split(",")),
            folder=given.folder,
            photos=given.photos or make_photos(Path(aside) / "photos"),
            again=given.again,
        )
        warmup = {"warmup_calls": 2, "warmup_seconds": 0.0} if given.quick else {}
        counts = [int(count) for count in given.threads.split(",")]
        procedures = [Procedure(samples=given.samples, threads=count, **warmup) for count in counts]
        text = run(job, procedures, given.results)
        print(text)
        if not given.quick:
            write_text(given.results / f"{datetime.date.today().isoformat()}-competitors.txt", text)


def make_photos(folder: Path) -> str:
    """Pictures of coarse patches with fine noise, to calibrate with."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(PHOTOS):
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        patches = np.asarray(Image.fromarray(coarse).resize((320, 320), Image.Resampling.BICUBIC), dtype=np.float64)
        noisy = np.clip(patches + draw.normal(0, 12, patches.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.png")
    return str(folder)


if __name__ == "__main__":
    main()
