"""Core ML on a Mac: one model.mlpackage.zip, the ML program that an app on an iPhone loads, packed.

A package of Core ML is a folder; artifacts hold plain files, so it is one archive here, and unpacked where Core ML
reads it. The program takes one image, as an app gives it, and needs iOS 17 or macOS 14.

fp32 and int8 run on the CPU, fp16 on the neural engine where it takes it. A network of 8 bits keeps its kernels and its
grids as they are: activations and weights in 8 bits, everything between them in 32.

It can be converted on any machine, and run on a Mac only; the first load there proves the answer.
"""

from __future__ import annotations

import io
import json
import platform
import re
import sys
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from onefold.errors import BadArtifact
from onefold.runtimes.artifact import About
from onefold.runtimes.base import Engine
from onefold.runtimes.onnx import metadata
from onefold.runtimes.reference import Floats
from onefold.runtimes.vendor import quiet, require

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.mlpackage.zip",)
PACKAGES = ("torch", "coremltools")
PRECISIONS = ("fp32", "fp16", "int8")
REFUSES: Mapping[str, str] = {}
DETAILS: Mapping[str, object] = {
    "form": "ML program for iOS 17 and macOS 14",
    "input": "images",
    "output": "logits",
    "images_per_call": 1,
}
READS_GRIDS = True

_UNITS = {"fp32": "CPU_ONLY", "fp16": "CPU_AND_NE", "int8": "CPU_ONLY"}
_COMPUTED_IN = {"fp32": "FLOAT32", "fp16": "FLOAT16", "int8": "FLOAT32"}
_CONTENTS = "Manifest.json"
_PROGRAM = "Data/com.apple.CoreML/model.mlmodel"
_DATE = "com.github.apple.coremltools.conversion_date"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def _obstacle() -> str | None:
    return None if sys.platform == "darwin" else f"Core ML runs on a Mac; this is {platform.system()}"


OBSTACLE = _obstacle


def export(program: ExportedProgram, folder: Path, *, about: About, precision: str) -> None:
    """Convert the network for one image, and write its package."""
    tools = _coremltools()
    import torch

    (images,), _ = program.example_inputs
    image = images[:1].clone()
    with quiet(), torch.no_grad(), TemporaryDirectory() as place:
        single = torch.export.export(program.module(check_guards=False), (image,)).run_decompositions({})
        package = tools.convert(
            single,
            convert_to="mlprogram",
            inputs=[tools.TensorType(name="images", shape=tuple(image.shape), dtype=np.float32)],
            outputs=[tools.TensorType(name="logits", dtype=np.float32)],
            compute_precision=getattr(tools.precision, _COMPUTED_IN[precision]),
            minimum_deployment_target=tools.target.iOS17,
            skip_model_load=True,
        )
        package.user_defined_metadata.update(metadata(about))
        package.user_defined_metadata.pop(_DATE, None)
        written = Path(place) / "model.mlpackage"
        package.save(str(written))
        (written / _PROGRAM).write_bytes(package.get_spec().SerializeToString(deterministic=True))
        (folder / FILES[0]).write_bytes(pack(written))


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> Engine:
    """The network, compiled by this Mac."""
    tools = _coremltools()
    place = TemporaryDirectory()
    try:
        package = Path(place.name) / "model.mlpackage"
        unpack(content[FILES[0]], package)
        with quiet():
            model = tools.models.MLModel(str(package), compute_units=getattr(tools.ComputeUnit, _UNITS[precision]))
        return _CoreMl(model, place, threads)
    except BaseException:
        place.cleanup()
        raise


class _CoreMl:
    """A model of Core ML and the folder it lies in; calls take turns.

    Core ML neither takes nor tells a number of threads: `threads` is what was asked for.
    """

    def __init__(self, model: Any, place: TemporaryDirectory[str], threads: int) -> None:
        self._model, self._place, self.threads, self._lock = model, place, threads, Lock()

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            answers = [self._model.predict({"images": images[i : i + 1]})["logits"] for i in range(len(images))]
            return np.concatenate(answers).astype(np.float32)

    def close(self) -> None:
        with self._lock:
            del self._model
            self._place.cleanup()


def pack(package: Path) -> bytes:
    """The archive of a package: stored, in order, without dates or other chance, so that it depends on the network."""
    packed = io.BytesIO()
    inside = (path.relative_to(package).as_posix() for path in package.glob("Data/**/*") if path.is_file())
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted([_CONTENTS, *inside]):
            data = (package / name).read_bytes()
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, _without_chance(data) if name == _CONTENTS else data)
    return packed.getvalue()


def unpack(data: bytes, package: Path) -> None:
    """Write the files of an archive of `pack` below a folder that is not there yet.

    Raises BadArtifact where it holds anything but plain files with plain names inside the folder, stored as they are -
    so that they cannot be more than the archive has bytes - or lacks a package's own two.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check(entries, len(data))
            for entry in entries:
                path = package / entry.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(entry))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, BadArtifact):
            raise
        raise BadArtifact(f"{FILES[0]} is not a package of Core ML: {error}; export the model again") from error


def _check(entries: list[zipfile.ZipInfo], num_bytes: int) -> None:
    names = [entry.filename for entry in entries]
    for entry in entries:
        kind = entry.external_attr >> 16 & 0o170000
        if not _NAME.fullmatch(entry.filename) or kind not in (0, 0o100000):
            raise BadArtifact(
                f"{FILES[0]} holds {entry.filename!r:.80}, which is no plain file inside it; export again"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise BadArtifact(f"{FILES[0]} is compressed, which it never is; export the model again")
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise BadArtifact(f"{FILES[0]} promises more bytes than it has; export the model again")
    if len(set(names)) < len(names) or not {_CONTENTS, _PROGRAM} <= set(names):
        raise BadArtifact(f"{FILES[0]} is not a package of Core ML; export the model again")


def _without_chance(contents: bytes) -> bytes:
    """A package's list of contents, whose entries are known by random numbers, with numbers made of their paths."""
    text = contents.decode("utf-8")
    for known_as, entry in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(known_as, str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper())
    return json.dumps(json.loads(text), indent=1, sort_keys=True).encode()


def _coremltools() -> ModuleType:
    return require("coremltools", extra="coreml")
