"""What 8 bits cost: top-1 of real networks on real photos, by method and runtime, ours beside each vendor's own tool.

    python benchmarks/int8_accuracy.py [--only s0,v1,v1-025] [--rows ours-*:onnx,fp32:*] [--work FOLDER] [--again]
                                       [--threads 1] [--list]

MobileOne-S0 with Apple's weights, MobileNetV1 1.0 and 0.25 with Google's. Calibrated on 200 photos of the training part
of Imagenette (every tenth), scored on the 1000 of imagenet-sample, one a class of ImageNet. A row is METHOD:RUNTIME:

    fp32            the folded network: PyTorch itself ("torch"), and every runtime
    ours-channel    our `quantize` with its defaults: computed on whole numbers in PyTorch ("simulation"), and on devices
    ours-tensor     one scale a kernel; equalized by activations or by weights, whichever puts less noise into the
                    answers to a quarter of the calibration photos, held out from the other three
    ours-searched   what `choose` finds by such answers
    plain-*         extremes and rounding to nearest, in the simulation: the common denominator
    vendor-*        each vendor's own tool on the same photos (int8_vendors.py)

The photos that are scored decide nothing. What a row needs - photos, methods, artifacts, logits - is kept in --work and
used again; the table is made of all rows that are there. Both go to benchmarks/results. The data are found as the tests
find them (ONEFOLD_TEST_DATA, or ../shared/data). Needs the runtimes' extras; rows of those missing say so.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from int8_table import FLOAT, SIMULATION, Answers, Floats, lines_of, scores, table
from int8_vendors import VENDORS, Given
from onefold.bench import Machine
from onefold.data import Source, open_source
from onefold.errors import OnefoldError
from onefold.files import write_text
from onefold.quantize import PLAIN, Method, Quantized, choose, quantize
from onefold.runtimes import find_runtime, load
from onefold.runtimes.vendor import first_line, versions
from onefold.stages import Network, open_network
from onefold.stages.answers import class_indices
from onefold.stages.folding import export_made
from onefold.stages.network import predictor_of
from onefold.stages.training import validation_images

HERE = Path(__file__).parent
DATA = Path(os.environ.get("ONEFOLD_TEST_DATA", HERE.parent.parent / "shared" / "data"))
CALIBRATION, SCORED, COUNT, BATCH, SEED = "imagenette-224-subset", "imagenet-sample", 200, 50, 0
DEVICES = ("onnx", "openvino", "executorch", "litert", "web")
FLOATS = ("eager", "onnx", "openvino", "executorch", "litert", "ncnn", "mnn", "web")
PACKAGES = ("onnxruntime", "openvino", "nncf", "executorch", "torchao", "ai-edge-litert", "litert-torch",
            "ai-edge-quantizer", "ncnn", "pnnx", "MNN", "onnx", "onnxscript", "torch", "numpy")  # fmt: skip
ROWS = (
    FLOAT,
    *(("fp32", runtime) for runtime in FLOATS),
    *((f"ours-{kind}", at) for kind in ("channel", "tensor", "searched") for at in (SIMULATION, *DEVICES)),
    *((f"plain-{kind}", SIMULATION) for kind in ("channel", "tensor")),
    *((f"vendor-{kind}", runtime) for kind in ("channel", "tensor") for runtime in VENDORS),
)
PER_TENSOR = (Method(weights="tensor"), Method(weights="tensor", equalize="weights"))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file of weights, the name of the network that they are of, and what to call them."""

    file: str
    name: str
    title: str


NETWORKS = {
    "s0": Weights(file="mobileone_s0_in1k_fused.npz", name="mobileone_s0", title="MobileOne-S0, Apple's weights"),
    "v1": Weights(
        file="mobilenetv1_100_224_in1k_tfquant_folded.npz",
        name="mobilenetv1_100.tf",
        title="MobileNetV1 1.0, Google's weights of its uint8 network, in float",
    ),
    "v1-025": Weights(
        file="mobilenetv1_025_224_in1k_tf_unfused.npz",
        name="mobilenetv1_025.tf",
        title="MobileNetV1 0.25, Google's weights",
    ),
}


class Subject:
    """A network with its photos, and what was made of it so far: in `folder`, or when first asked for."""

    def __init__(self, key: str, work: Path, threads: int) -> None:
        self.key, self.folder, self.threads = key, work / key, threads
        self._work, self._made = work, {}
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def network(self) -> Network:
        weights = NETWORKS[self.key]
        network = open_network(DATA / "weights" / weights.file, name=weights.name)
        return network if network.is_fused else network.fused()[0]

    @cached_property
    def scored(self) -> Source:
        return validation_images(SCORED, str(DATA / SCORED))[0]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        index = class_indices(predictor_of(self.network), self.scored)
        return np.array([index[self.scored.label(i)] for i in range(len(self.scored))])

    @cached_property
    def photos(self) -> Floats:
        return self._prepared(SCORED, self.scored, list(range(len(self.scored))))

    @cached_property
    def calibration(self) -> torch.Tensor:
        source, chosen = calibration_photos()
        return torch.from_numpy(np.array(self._prepared(CALIBRATION, source, chosen)))

    def made(self, method: str) -> Quantized:
        """The network of 8 bits by a method of ours, kept while the next row may want it."""
        if method not in self._made:
            say(f"{self.key}: quantizing {method}")
            self._made = {method: quantize(self.network.model, self.calibration, self.method(method)[0])}
        return self._made[method]

    def method(self, name: str) -> tuple[Method, Mapping[str, float]]:
        """The method of ours by this name; what was tried for it, with the noise in held-out answers."""
        if name in FIXED:
            return FIXED[name], {}
        path = self.folder / f"{name}.json"
        if not path.is_file():
            say(f"{self.key}: choosing {name}")
            method, tried = CHOSEN[name](self.network.model, self.calibration)
            write_text(path, json.dumps({"method": asdict(method), "tried": tried}))
        known = json.loads(path.read_text())
        return Method(**{**known["method"], "keep": tuple(known["method"]["keep"])}), known["tried"]

    def artifact(self, method: str, runtime: str) -> Path:
        """Our export, verified by itself; made where it is missing."""
        precision = "fp32" if method == "fp32" else "int8"
        folder = self.folder / method / f"{runtime}-{precision}"
        if not (folder / "manifest.json").is_file():
            made = None if method == "fp32" else self.made(method)
            export_made(self.network, made, folder, runtime, precision)
        return folder

    def _prepared(self, name: str, source: Source, chosen: list[int]) -> Floats:
        """The photos as the network sees them (B, C, H, W); kept for all networks that see them so."""
        preprocessing = self.network.preprocessing
        told = json.dumps([preprocessing.to_dict(), chosen], sort_keys=True)
        path = self._work / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npy"
        if not path.is_file():
            say(f"{self.key}: reading {len(chosen)} photos of {name}")
            aside = path.with_suffix(".part.npy")
            np.save(aside, np.stack([preprocessing(source.image(i)) for i in chosen]))
            aside.replace(path)
        return np.load(path, mmap_mode="r")


def calibration_photos() -> tuple[Source, list[int]]:
    """Imagenette's training part, and which of it: every tenth."""
    source = open_source(DATA / CALIBRATION, "train", seed=SEED, val_fraction=0.2)
    return source, [i * len(source) // COUNT for i in range(COUNT)]


def by_held_out(model: torch.nn.Module, photos: torch.Tensor) -> tuple[Method, dict[str, float]]:
    """Of the two methods per tensor the one with less noise in its answers to every fourth photo, which it has not seen."""
    judged = torch.arange(len(photos)) % 4 == 3
    with torch.inference_mode():
        true = model(photos[judged])
        tried = {}
        for method in PER_TENSOR:
            found = quantize(model, photos[~judged], method).model(photos[judged])
            tried[method] = float((found - true).norm() / (true - true.mean(0)).norm())
    return min(tried, key=tried.__getitem__), {method.title: noise for method, noise in tried.items()}


def by_search(model: torch.nn.Module, photos: torch.Tensor) -> tuple[Method, dict[str, float]]:
    """What `choose` finds from the defaults; it tells a method's title and its noise in percent."""
    told: list[str] = []
    method = choose(model, photos, Method(), told.append).method
    return method, {title: float(rest.split(" %")[0]) / 100 for title, _, rest in (t.rpartition(": ") for t in told)}


FIXED = {
    "ours-channel": Method(),
    "plain-channel": PLAIN,
    "plain-tensor": Method(**{**asdict(PLAIN), "weights": "tensor"}),
}
CHOSEN: dict[str, Callable[[torch.nn.Module, torch.Tensor], tuple[Method, dict[str, float]]]] = {
    "ours-tensor": by_held_out,
    "ours-searched": by_search,
}


def answer(subject: Subject, method: str, runtime: str) -> tuple[Floats, dict[str, Any]]:
    """The logits (N, classes) of a row, and what its method was."""
    if (method, runtime) == FLOAT:
        return _asked(_torch(subject.network.model), subject.photos), {"method": "the folded network in PyTorch"}
    if method.startswith("vendor"):
        weights, vendor = method.removeprefix("vendor-"), VENDORS[runtime]
        artifact, network = subject.artifact("fp32", runtime), subject.network.model
        photos = subject.calibration.numpy()
        content = vendor.make(Given(network=network, artifact=artifact, photos=photos, weights=weights))
        engine = find_runtime(runtime).load(content, precision="int8", threads=subject.threads)
        return _asked(engine, subject.photos), {"method": vendor.title, "packages": versions(vendor.packages)}
    facts = {"method": "our export, no 8 bits"}
    if method != "fp32":
        value, tried = subject.method(method)
        facts = {"method": value.title, **({"held_out_noise": dict(tried)} if tried else {})}
    if runtime == SIMULATION:
        return _asked(_torch(subject.made(method).model), subject.photos), facts
    with load(subject.artifact(method, runtime), threads=subject.threads) as session:
        return _asked(session, subject.photos), {**facts, "packages": dict(session.artifact.made_with)}


def _torch(model: torch.nn.Module) -> Callable[[Floats], Floats]:
    def call(images: Floats) -> Floats:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return call


def _asked(call: Callable[[Floats], Floats], photos: Floats) -> Floats:
    return np.concatenate([call(np.array(photos[i : i + BATCH])) for i in range(0, len(photos), BATCH)])


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


def make(subject: Subject, method: str, runtime: str) -> None:
    """Answer a row and keep it; what cannot be had is kept as a sentence."""
    say(f"{subject.key}: {method}:{runtime}")
    place = subject.folder / "rows" / f"{method}-{runtime}"
    place.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    torch.manual_seed(SEED)
    try:
        logits, facts = answer(subject, method, runtime)
    except Exception as error:  # a vendor's tool may raise anything: the other rows go on
        said = str(error) if isinstance(error, OnefoldError) else first_line(error)
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
    """The table of all rows that are there, written with its JSON lines beside it; the text."""
    found = []
    for subject in subjects.values():
        rows = [row for each in ROWS if (row := kept(subject, *each)) is not None]
        if rows:
            found += scores(rows, subject.labels)
    machine, (source, chosen) = Machine.this(PACKAGES), calibration_photos()
    names = [source.name(i) for i in chosen]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    parts = [
        "What 8 bits cost. drop: points of top-1 against PyTorch's float network; differ: photos of 1000 answered otherwise",
        "(right before: lost, right now: won); device: photos not answered as in our simulation; noise: of the logits.",
        f"{machine.chip}, {machine.cores} cores, {machine.system}, Python {machine.python}; "
        f"{datetime.date.today().isoformat()}; {', '.join(f'{k} {v}' for k, v in machine.versions.items())}",
        f"Scored on all {found[0].photos if found else 0} photos of {SCORED}. Calibrated on {COUNT} of {len(source)} "
        f"training photos of {CALIBRATION}, every tenth: {names[0]}, {names[1]}, ... {names[-1]}",
        f"(SHA-256 of the names {digest[:16]}; all are in the .jsonl). Seed {SEED}; nothing here draws at random.",
        *(f"{key}: {NETWORKS[key].title} ({NETWORKS[key].file})" for key in subjects),
        "",
        table(found),
        "",
        *methods(found),
    ]
    text = "\n".join(parts) + "\n"
    about = {"machine": machine.to_dict(), "seed": SEED, "scored": SCORED, "calibration": CALIBRATION, "photos": names}
    stem = results / f"{datetime.date.today().isoformat()}-int8-accuracy"
    write_text(stem.with_suffix(".txt"), text)
    write_text(stem.with_suffix(".jsonl"), lines_of(found, about))
    return text


def methods(found) -> list[str]:
    """What each method was, once; and the noise of those that were tried, on calibration photos held out."""
    lines = {}
    for row in found:
        if "method" in row.facts and row.method != "fp32":
            vendor = row.method.startswith("vendor")
            name = f"vendor {row.runtime}" if vendor else f"{row.network} {row.method}"
            tried = row.facts.get("held_out_noise", {})
            noises = "".join(f"\n    {100 * noise:5.1f} % held-out noise: {title}" for title, noise in tried.items())
            lines[name] = f"{name}: {row.facts['method']}{noises}"
    return list(lines.values())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    subjects = {key: Subject(key, given.work, given.threads) for key in NETWORKS}
    for key, method, runtime in wanted(given):
        row = kept(subjects[key], method, runtime)
        if given.again or row is None or row.refused:
            make(subjects[key], method, runtime)
    print(report(subjects, given.results))


if __name__ == "__main__":
    main()
