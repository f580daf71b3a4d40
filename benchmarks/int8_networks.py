"""The networks of int8_accuracy.py with their photos, and our methods: made when asked for, and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from onefold.commands.calibration_cache import Int8Network
from onefold.commands.evaluate import class_indices
from onefold.commands.export import export_artifact
from onefold.commands.held_out_images import validation_images
from onefold.commands.open_network import Network, make_predictor, open_network
from onefold.data import Dataset, open_dataset
from onefold.errors import OnefoldError
from onefold.file_io import atomic_replace, write_text
from onefold.quantize import MINMAX_METHOD, QuantizationMethod, QuantizedModel, quantize
from onefold.quantize.method_search import quantize_with_search

Floats = NDArray[np.float32]

DATA = Path(os.environ.get("ONEFOLD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
CALIBRATION, SCORED, COUNT, SEED = "imagenette-224-subset", "imagenet-sample", 200, 0
BATCH = 50
DEVICES = ("onnx", "openvino", "executorch", "litert", "web")  # those that run 8 bits
PER_TENSOR = tuple(QuantizationMethod(weights="tensor", equalize=by) for by in ("activations", "weights"))


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

    def __init__(self, key: str, work: Path) -> None:
        self.key, self.folder = key, work / key
        self._work = work
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def network(self) -> Network:
        weights = NETWORKS[self.key]
        network = open_network(DATA / "weights" / weights.file, name=weights.name)
        return network if network.is_fused else network.fused()[0]

    @cached_property
    def scored(self) -> Dataset:
        return validation_images(SCORED, str(DATA / SCORED))[0]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        index = class_indices(make_predictor(self.network), self.scored)
        return np.array([index[self.scored.label(i)] for i in range(len(self.scored))])

    @cached_property
    def photos(self) -> Floats:
        return self._prepared(SCORED, self.scored, list(range(len(self.scored))))

    @cached_property
    def calibration(self) -> torch.Tensor:
        source, chosen = calibration_photos()
        return torch.from_numpy(np.array(self._prepared(CALIBRATION, source, chosen)))

    def made(self, method: str) -> Path:
        """The folder of a method of ours: the logits of its simulation, and its artifact for each runtime.

        All are of one call of `quantize`, so that they can be compared: on another number of threads, or another
        processor, sums round otherwise, and some ranges and weights with them.
        """
        folder = self.folder / method
        if folder.is_dir():
            return folder
        value, tried = self.method(method)
        say(f"{self.key}: quantizing {method}")
        made = quantize(self.network.model, self.calibration, value)
        with atomic_replace(folder) as aside:
            aside.mkdir()
            facts = {"method": value.title, "threads": torch.get_num_threads(), "held_out_noise": dict(tried)}
            write_text(aside / "facts.json", json.dumps(facts))
            np.save(aside / "simulation.npy", asked(of_torch(made.model), self.photos))
            for runtime in DEVICES if method.startswith("ours") else ():
                self._export(made, aside, runtime)
        return folder

    def _export(self, made: QuantizedModel, folder: Path, runtime: str) -> None:
        """Our artifact, or beside its place the reason why there is none."""
        try:
            export_artifact(self.network, Int8Network(made=made), folder / runtime, runtime, "int8")
        except OnefoldError as error:
            write_text(folder / f"{runtime}.refused", str(error))

    def floats(self, runtime: str) -> Path:
        """Our artifact of the float network."""
        folder = self.folder / "fp32" / runtime
        if not (folder / "manifest.json").is_file():
            export_artifact(self.network, None, folder, runtime, "fp32")
        return folder

    def method(self, name: str) -> tuple[QuantizationMethod, Mapping[str, float]]:
        """The method of ours by this name; what was tried for it, with the noise in held-out answers."""
        if name in FIXED:
            return FIXED[name], {}
        path = self.folder / f"{name}.json"
        if not path.is_file():
            say(f"{self.key}: choosing {name}")
            method, tried = CHOSEN[name](self.network.model, self.calibration)
            write_text(path, json.dumps({"method": asdict(method), "tried": tried}))
        known = json.loads(path.read_text())
        return QuantizationMethod(**{**known["method"], "keep": tuple(known["method"]["keep"])}), known["tried"]

    def _prepared(self, name: str, source: Dataset, chosen: list[int]) -> Floats:
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


def calibration_photos() -> tuple[Dataset, list[int]]:
    """Imagenette's training part, and which of it: every tenth."""
    source = open_dataset(DATA / CALIBRATION, "train", seed=SEED, val_fraction=0.2)
    return source, [i * len(source) // COUNT for i in range(COUNT)]


def by_held_out(model: torch.nn.Module, photos: torch.Tensor) -> tuple[QuantizationMethod, dict[str, float]]:
    """Of the two methods per tensor the one with less noise in its answers to every fourth photo, held out from it."""
    judged = torch.arange(len(photos)) % 4 == 3
    with torch.inference_mode():
        true = model(photos[judged])
        tried = {}
        for method in PER_TENSOR:
            found = quantize(model, photos[~judged], method).model(photos[judged])
            tried[method] = float((found - true).norm() / (true - true.mean(0)).norm())
    return min(tried, key=tried.__getitem__), {method.title: noise for method, noise in tried.items()}


def by_search(model: torch.nn.Module, photos: torch.Tensor) -> tuple[QuantizationMethod, dict[str, float]]:
    """What `quantize_with_search` finds from the defaults; it tells a method's title and its noise in percent."""
    told: list[str] = []
    method = quantize_with_search(model, photos, QuantizationMethod(), told.append).method
    return method, {title: float(rest.split(" %")[0]) / 100 for title, _, rest in (t.rpartition(": ") for t in told)}


FIXED = {
    "ours-channel": QuantizationMethod(),
    "plain-channel": MINMAX_METHOD,
    "plain-tensor": QuantizationMethod(**{**asdict(MINMAX_METHOD), "weights": "tensor"}),
}
CHOSEN: dict[str, Callable[[torch.nn.Module, torch.Tensor], tuple[QuantizationMethod, dict[str, float]]]] = {
    "ours-tensor": by_held_out,
    "ours-searched": by_search,
}


def of_torch(model: torch.nn.Module) -> Callable[[Floats], Floats]:
    """A network in PyTorch behind numpy's face."""

    def call(images: Floats) -> Floats:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return call


def asked(call: Callable[[Floats], Floats], photos: Floats) -> Floats:
    """The logits (N, classes) of photos (N, C, H, W) that may lie on the disk, asked for in batches."""
    return np.concatenate([call(np.array(photos[i : i + BATCH])) for i in range(0, len(photos), BATCH)])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
