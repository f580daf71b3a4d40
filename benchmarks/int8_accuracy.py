"""What 8 bits cost: top-1 of real networks on real photos, by method and runtime, ours beside each vendor's own tool.

    python benchmarks/int8_accuracy.py [--only s0,v1,v1-025] [--rows ours-*:onnx,fp32:*] [--work FOLDER] [--again]
                                       [--threads 1] [--list]

MobileOne-S0 with Apple's weights, MobileNetV1 1.0 and 0.25 with Google's. Calibrated on 200 photos of the training part
of Imagenette (every tenth), scored on the 1000 of imagenet-sample, one a class of ImageNet. A row is METHOD:RUNTIME:

    fp32            the folded network: PyTorch itself ("torch"), and every runtime
    ours-channel    our `quantize` with its defaults: on whole numbers in PyTorch ("simulation"), and in runtimes
    ours-tensor     one scale a kernel; equalized by activations or by weights, whichever puts less noise into the
                    answers to a quarter of the calibration photos, held out from the other three
    ours-searched   what `search` finds by such answers
    plain-*         extremes and rounding to nearest, in the simulation: the common denominator
    vendor-*        each vendor's own tool on the same photos (int8_vendors.py)

The photos that are scored decide nothing. What a row needs - photos, methods, artifacts, logits - is kept in --work and
used again; the table is made of all rows that are there. Both go to benchmarks/results. The data are found as the tests
find them (ONEFOLD_TEST_DATA, or ../shared/data). Needs the runtimes' extras; rows of those missing say so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch

from int8_networks import (
    CALIBRATION,
    COUNT,
    DATA,
    DEVICES,
    NETWORKS,
    SCORED,
    SEED,
    Floats,
    Subject,
    asked,
    calibration_photos,
    of_torch,
    say,
)
from int8_table import FLOAT, SIMULATION, Answers, lines_of, page, scores
from int8_vendors import VENDORS, Given
from onefold.bench import Machine
from onefold.errors import GateFailed, OnefoldError
from onefold.file_io import write_text
from onefold.runtimes import import_runtime, load
from onefold.runtimes.base import first_error_line, installed_versions

HERE = Path(__file__).parent
FLOATS = ("onnx", "openvino", "executorch", "litert", "ncnn", "mnn", "web")
PACKAGES = ("onnxruntime", "openvino", "nncf", "executorch", "torchao", "ai-edge-litert", "litert-torch",
            "ai-edge-quantizer", "ncnn", "pnnx", "MNN", "onnx", "onnxscript", "torch", "numpy")  # fmt: skip
ROWS = (
    FLOAT,
    *(("fp32", runtime) for runtime in FLOATS),
    *((f"ours-{kind}", at) for kind in ("channel", "tensor", "searched") for at in (SIMULATION, *DEVICES)),
    *((f"plain-{kind}", SIMULATION) for kind in ("channel", "tensor")),
    *((f"vendor-{kind}", runtime) for kind in ("channel", "tensor") for runtime in VENDORS),
)


def answer(subject: Subject, method: str, runtime: str, threads: int) -> tuple[Floats, dict[str, Any]]:
    """The logits (N, classes) of a row, and what its method was."""
    if (method, runtime) == FLOAT:
        return asked(of_torch(subject.network.model), subject.photos), {"method": "the folded network in PyTorch"}
    if method.startswith("vendor"):
        weights, vendor = method.removeprefix("vendor-"), VENDORS[runtime]
        given = Given(
            network=subject.network.model,
            artifact=subject.floats(runtime),
            photos=subject.calibration.numpy(),
            weights=weights,
        )
        engine = import_runtime(runtime).load(vendor.make(given), precision="int8", threads=threads)
        return asked(engine, subject.photos), {"method": vendor.title, "packages": installed_versions(vendor.packages)}
    if method == "fp32":
        return _run(subject, subject.floats(runtime), threads)
    folder = subject.made(method)
    facts = json.loads((folder / "facts.json").read_text())
    if runtime == SIMULATION:
        return np.load(folder / "simulation.npy"), facts
    if (refused := folder / f"{runtime}.refused").is_file():
        raise GateFailed(refused.read_text())
    logits, packages = _run(subject, folder / runtime, threads)
    return logits, {**facts, **packages}


def _run(subject: Subject, artifact: Path, threads: int) -> tuple[Floats, dict[str, Any]]:
    with load(artifact, threads=threads) as session:
        return asked(session, subject.photos), {"packages": dict(session.artifact.made_with)}


def kept(subject: Subject, method: str, runtime: str) -> Answers | None:
    """The row as it was answered before, if it was."""
    place = subject.folder / "rows" / f"{method}-{runtime}"
    told = place.with_suffix(".json")
    if not told.is_file():
        return None
    facts = json.loads(told.read_text())
    named = {"network": subject.key, "method": method, "runtime": runtime}
    if "refused" in facts:
        return Answers(**named, refused=facts["refused"])
    return Answers(**named, logits=np.load(place.with_suffix(".npy")), facts=facts)


def make(subject: Subject, method: str, runtime: str, threads: int) -> None:
    """Answer a row and keep it; what cannot be had is kept as a sentence."""
    say(f"{subject.key}: {method}:{runtime}")
    place = subject.folder / "rows" / f"{method}-{runtime}"
    place.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    torch.manual_seed(SEED)
    try:
        logits, facts = answer(subject, method, runtime, threads)
    except Exception as error:  # a vendor's tool may raise anything: the other rows go on
        said = str(error) if isinstance(error, OnefoldError) else first_error_line(error)
        say(f"  refused: {said}")
        write_text(place.with_suffix(".json"), json.dumps({"refused": " ".join(said.split())}))
        return
    np.save(place.with_suffix(".npy"), logits)
    seconds = round(time.monotonic() - start)
    write_text(
        place.with_suffix(".json"), json.dumps({**facts, "seconds": seconds, "date": str(datetime.date.today())})
    )


def wanted(given: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    patterns = given.rows.split(",")
    for key in given.only.split(","):
        for method, runtime in ROWS:
            if any(fnmatch(f"{method}:{runtime}", pattern) for pattern in patterns):
                yield key, method, runtime


def report(subjects: Mapping[str, Subject], results: Path) -> str:
    """The page of all rows that are there, written with its JSON lines beside it; its text."""
    found = []
    for subject in subjects.values():
        rows = [row for each in ROWS if (row := kept(subject, *each)) is not None]
        if rows:
            found += scores(rows, subject.labels)
    machine, (source, chosen) = Machine.detect(PACKAGES), calibration_photos()
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.to_dict(),
        "seed": SEED,
        "networks": {key: f"{NETWORKS[key].title} ({NETWORKS[key].file})" for key in subjects},
        "scored_on": SCORED,
        "calibrated_on": f"{COUNT} of the {len(source)} training photos of {CALIBRATION}, every tenth",
        "calibration_photos": [source.name(i) for i in chosen],
    }
    text = page(found, about)
    stem = results / f"{about['date']}-int8-accuracy"
    write_text(stem.with_suffix(".txt"), text)
    write_text(stem.with_suffix(".jsonl"), lines_of(found, about))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks, by comma")
    parser.add_argument("--rows", default="*", help="patterns of METHOD:RUNTIME, by comma")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "onefold-int8-accuracy")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="answer rows again that are kept")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{method}:{runtime}" for method, runtime in ROWS))
        return
    if missing := [name for name in ("weights", CALIBRATION, SCORED) if not (DATA / name).is_dir()]:
        print(f"skipped: needs the shared data, and {DATA} has no {missing[0]}; set ONEFOLD_TEST_DATA")
        return
    torch.set_num_threads(given.threads)
    subjects = {key: Subject(key, given.work) for key in NETWORKS}
    for key, method, runtime in wanted(given):
        row = kept(subjects[key], method, runtime)
        if given.again or row is None or row.refused:
            make(subjects[key], method, runtime, given.threads)
    print(report(subjects, given.results))


if __name__ == "__main__":
    main()
