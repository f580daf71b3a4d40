"""Core ML on a Mac: one model.mlpackage.zip, the ML program that an app on an iPhone loads, as an archive.

A Core ML package is a folder; artifacts hold plain files, so it is stored as one archive and unpacked where Core ML
reads it. The program takes one image per call, as an app passes it, and needs iOS 17 or macOS 14.

fp32 and int8 run on the CPU, fp16 on the neural engine where that supports the layers. An int8 model keeps its weights
and quantization parameters: activations and weights in 8 bits, everything between them in 32.

It can be converted on any machine, but run on a Mac only; the first load there compares the logits with PyTorch's.
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
from onefold.runtimes.artifact import ModelInfo
from onefold.runtimes.base import RuntimeEngine, import_vendor_package, suppress_output
from onefold.runtimes.onnx import model_metadata
from onefold.runtimes.reference_logits import Floats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FILES = ("model.mlpackage.zip",)
PACKAGES = ("torch", "coremltools")
PRECISIONS = ("fp32", "fp16", "int8")
UNSUPPORTED_PRECISIONS: Mapping[str, str] = {}
MANIFEST_DETAILS: Mapping[str, object] = {
    "form": "ML program for iOS 17 and macOS 14",
    "input": "images",
    "output": "logits",
    "images_per_call": 1,
}
ACCEPTS_QDQ = True

_UNITS = {"fp32": "CPU_ONLY", "fp16": "CPU_AND_NE", "int8": "CPU_ONLY"}
_COMPUTE_PRECISION = {"fp32": "FLOAT32", "fp16": "FLOAT16", "int8": "FLOAT32"}
_MANIFEST = "Manifest.json"
_PROGRAM = "Data/com.apple.CoreML/model.mlmodel"
_DATE_KEY = "com.github.apple.coremltools.conversion_date"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def unavailable_reason() -> str | None:
    """Explain why Core ML cannot run here; None on a Mac."""
    return None if sys.platform == "darwin" else f"Core ML runs on a Mac; this is {platform.system()}"


def export(program: ExportedProgram, folder: Path, *, info: ModelInfo, precision: str) -> None:
    """Convert the network for one image per call, and write its package as an archive."""
    tools = _coremltools()
    import torch

    (images,), _ = program.example_inputs
    image = images[:1].clone()
    with suppress_output(), torch.no_grad(), TemporaryDirectory() as temporary:
        single = torch.export.export(program.module(check_guards=False), (image,)).run_decompositions({})
        package = tools.convert(
            single,
            convert_to="mlprogram",
            inputs=[tools.TensorType(name="images", shape=tuple(image.shape), dtype=np.float32)],
            outputs=[tools.TensorType(name="logits", dtype=np.float32)],
            compute_precision=getattr(tools.precision, _COMPUTE_PRECISION[precision]),
            minimum_deployment_target=tools.target.iOS17,
            skip_model_load=True,
        )
        package.user_defined_metadata.update(model_metadata(info))
        package.user_defined_metadata.pop(_DATE_KEY, None)
        saved = Path(temporary) / "model.mlpackage"
        package.save(str(saved))
        # Written again in a fixed order, so that the same network gives the same bytes.
        (saved / _PROGRAM).write_bytes(package.get_spec().SerializeToString(deterministic=True))
        (folder / FILES[0]).write_bytes(zip_mlpackage(saved))


def load(content: Mapping[str, bytes], *, precision: str, threads: int) -> RuntimeEngine:
    """Unpack the package and let Core ML compile it for this Mac."""
    tools = _coremltools()
    temporary = TemporaryDirectory()
    try:
        package = Path(temporary.name) / "model.mlpackage"
        unzip_mlpackage(content[FILES[0]], package)
        with suppress_output():
            model = tools.models.MLModel(str(package), compute_units=getattr(tools.ComputeUnit, _UNITS[precision]))
        return _CoreMl(model, temporary, threads)
    except BaseException:
        temporary.cleanup()
        raise


class _CoreMl:
    """A Core ML model and the folder it was unpacked to; calls are serialized.

    Core ML neither accepts nor reports a number of threads: `threads` is what was requested.
    """

    def __init__(self, model: Any, folder: TemporaryDirectory[str], threads: int) -> None:
        self._model, self._folder, self.threads, self._lock = model, folder, threads, Lock()

    def __call__(self, images: Floats) -> Floats:
        with self._lock:
            answers = [self._model.predict({"images": images[i : i + 1]})["logits"] for i in range(len(images))]
            return np.concatenate(answers).astype(np.float32)

    def close(self) -> None:
        with self._lock:
            del self._model
            self._folder.cleanup()


def zip_mlpackage(package: Path) -> bytes:
    """Archive a package: uncompressed, sorted, without dates or random ids, so that it depends on the network alone."""
    archive_bytes = io.BytesIO()
    data_files = (path.relative_to(package).as_posix() for path in package.glob("Data/**/*") if path.is_file())
    with zipfile.ZipFile(archive_bytes, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted([_MANIFEST, *data_files]):
            data = (package / name).read_bytes()
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, _deterministic(data) if name == _MANIFEST else data)
    return archive_bytes.getvalue()


def unzip_mlpackage(data: bytes, package: Path) -> None:
    """Write the files of an archive of `pack` into a folder that does not exist yet.

    Raises BadArtifact where the archive holds anything but plain files with plain relative names, uncompressed (so that
    they cannot be larger than the archive), or lacks the two files that every package has.
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
        raise BadArtifact(f"{FILES[0]} is not a Core ML package: {error}; export the model again") from error


def _check(entries: list[zipfile.ZipInfo], num_bytes: int) -> None:
    names = [entry.filename for entry in entries]
    for entry in entries:
        kind = entry.external_attr >> 16 & 0o170000
        if not _NAME.fullmatch(entry.filename) or kind not in (0, 0o100000):
            raise BadArtifact(
                f"{FILES[0]} holds {entry.filename!r:.80}, which is not a plain file inside it; export again"
            )
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise BadArtifact(f"{FILES[0]} is compressed, but exports store it uncompressed; export the model again")
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise BadArtifact(f"{FILES[0]} declares more bytes than it has; export the model again")
    if len(set(names)) < len(names) or not {_MANIFEST, _PROGRAM} <= set(names):
        raise BadArtifact(f"{FILES[0]} is not a Core ML package; export the model again")


def _deterministic(contents: bytes) -> bytes:
    """Replace the random ids of a package's Manifest.json by ids made of the entries' paths."""
    text = contents.decode("utf-8")
    for identifier, entry in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(identifier, str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])).upper())
    return json.dumps(json.loads(text), indent=1, sort_keys=True).encode()


def _coremltools() -> ModuleType:
    return import_vendor_package("coremltools", extra="coreml")
