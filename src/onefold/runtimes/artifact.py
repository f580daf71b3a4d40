"""An artifact: the folder that an export writes, its manifest, and how both are read and verified.

    artifacts/onnx-fp32/
        model.onnx       what the runtime runs; each runtime has its own model.* files
        reference.npz    images (B, C, H, W) and the PyTorch model's logits (B, classes) for them, both float32
        README.md        the same for people, with code that loads it (artifact_readme.py); older artifacts have none
        manifest.json    model, classes, preprocessing, parity, and the size and SHA-256 of every other file

Nothing is used before it is checked: every file is read once, compared with its hash, and passed on as bytes, so a
model cannot point to a file outside. The manifest carries the digest of itself. Hashes detect damage, not malice: who
can write the folder can write its hashes. So no file is ever unpickled or run as Python, whoever made the artifact.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from onefold.errors import BadArgument, BadArtifact
from onefold.file_io import parse_json, read_json, suggest_path

_SCHEMA = 1
MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.npz"
README_FILE = "README.md"

_LARGEST_MANIFEST = 64 << 20
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_T = TypeVar("_T", str, int, float, bool, list[object], dict[str, object])


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What an export cannot find in the model itself: its name, its classes in the order of its logits, its source.

    `preprocessing` is any plain mapping that JSON can hold. `fused` says whether every foldable branch of the model was
    fused, and `drift` how far the fused model's logits lie from the trained one's, relative to the largest. `details`
    are further plain values, such as how the model was quantized.
    """

    model: str
    fused: bool
    drift: float | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Mapping[str, object] = field(default_factory=dict)
    licence: str | None = None
    source: str | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    def check(self, num_classes: int) -> None:
        """Refuse what a manifest cannot hold, or what does not fit a model of so many logits. Raises BadArgument."""
        if not (isinstance(self.model, str) and self.model) or type(self.fused) is not bool:
            raise BadArgument(
                f"expected the name of a model and whether it is fused, got {self.model!r}, {self.fused!r}"
            )
        if self.classes is not None and len(self.classes) != num_classes:
            raise BadArgument(f"the model gives {num_classes} logits, but {len(self.classes)} classes were named")
        if not all(isinstance(text, str) for text in (*(self.classes or ()), self.licence or "", self.source or "")):
            raise BadArgument("expected text for every class, for the licence and for the source")
        if self.drift is not None and not (math.isfinite(self.drift) and self.drift >= 0):
            raise BadArgument(f"expected a drift of 0 or more, got {self.drift}")
        try:
            json.dumps([dict(self.preprocessing), dict(self.details)], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadArgument(
                f"preprocessing and details must be plain mappings that JSON can hold: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the runtime's logits lay from PyTorch's when the model was exported.

    `difference` is the largest difference of any two logits over the largest logit; `top1_agreement` the share of
    images with the same top class; `images` how many were compared.
    """

    difference: float
    top1_agreement: float
    tolerance: float
    images: int


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """Size and SHA-256 (hex) of a file of an artifact."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An exported model on disk, as its manifest tells it; `files` does not list the manifest itself.

    `parity` is None where the runtime cannot run on the machine that exported; then the first load elsewhere proves it.
    """

    folder: Path
    runtime: str
    precision: str
    model: str
    fused: bool
    drift: float | None
    input_shape: tuple[int, int, int]
    num_classes: int
    dynamic_batch: bool
    classes: tuple[str, ...] | None
    preprocessing: Mapping[str, object]
    parity: Parity | None
    licence: str | None
    source: str | None
    details: Mapping[str, object]
    made_with: Mapping[str, str]
    files: Mapping[str, StoredFile]

    @property
    def compared_with(self) -> str:
        """What `parity` compares its logits with: for int8 the same integers in PyTorch, not the float network."""
        return "the int8 network in PyTorch" if self.precision == "int8" else "PyTorch"

    @property
    def num_bytes(self) -> int:
        """Size of the model's files."""
        return sum(stored.num_bytes for name, stored in self.files.items() if name.startswith("model."))

    @property
    def title(self) -> str:
        """One line for a table or a log; it says where a model is unfused or was never trained."""
        untrained = " random weights" if self.details.get("untrained") is True else ""
        fused = " NOT FUSED" if not self.fused else " partly fused" if self.details.get("left_norms") else ""
        return f"{self.model} {self.runtime} {self.precision}{untrained}{fused}"


def hash_files(folder: Path) -> dict[str, StoredFile]:
    """Compute size and SHA-256 of every file that is in the folder now."""
    files = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = StoredFile(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return files


def render_manifest(artifact: Artifact) -> str:
    """Write the manifest as JSON text; its last field is the SHA-256 of the text without that field."""
    fields = asdict(artifact)
    del fields["folder"]
    return _with_digest({"schema": _SCHEMA, **fields})


def manifest_sha256(artifact: Artifact) -> str:
    """Give the SHA-256 of an artifact's manifest, which holds those of all its files."""
    return hashlib.sha256(render_manifest(artifact).encode()).hexdigest()


def is_artifact(folder: Path) -> bool:
    """Whether a folder claims to be an exported artifact; a sealed folder of weights has a manifest too."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError):
        return folder.is_dir() and (folder / REFERENCE_FILE).is_file()
    return isinstance(manifest, dict) and "runtime" in manifest


def read_manifest(folder: Path) -> Artifact:
    """Read the artifact in `folder` from its manifest; no other file is read. Raises BadArtifact."""
    if not folder.is_dir():
        actual = "a file" if folder.exists() else "nothing"
        raise BadArtifact(
            f"expected an artifact folder at {folder}, found {actual} there; give the folder of an export"
            f"{'' if folder.exists() else suggest_path(folder)}"
        )
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise BadArtifact(f"{folder} is not an artifact: it has no {MANIFEST_FILE}; give the folder of an export")
    data = _read(path, None)
    try:
        text = data.decode("utf-8")
        fields = parse_json(text)
        intact = isinstance(fields, dict) and _with_digest({k: v for k, v in fields.items() if k != "sha256"}) == text
    except ValueError as error:
        raise BadArtifact(f"{path} is damaged: it is not JSON ({error}); export the model again") from error
    _check_schema(fields, path)
    if not intact:
        raise BadArtifact(f"{path} was changed after the export: its digest does not fit; export the model again")
    return _parse(_Fields(fields, path), folder)


def read_files(artifact: Artifact) -> dict[str, bytes]:
    """Read every file of the artifact and compare it with its size and hash. Raises BadArtifact."""
    content = {}
    for name, stored in artifact.files.items():
        path = artifact.folder / name
        data = _read(path, stored.num_bytes)
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            raise BadArtifact(f"{path} is damaged: its SHA-256 is not the manifest's; export the model again")
        content[name] = data
    return content


def _with_digest(fields: Mapping[str, object]) -> str:
    digest = hashlib.sha256(json.dumps(fields, indent=1, allow_nan=False).encode()).hexdigest()
    return json.dumps({**fields, "sha256": digest}, indent=1, allow_nan=False) + "\n"


def _read(path: Path, num_bytes: int | None) -> bytes:
    """Read a plain file without further links; `num_bytes` is None for the manifest, whose size is not known."""
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
            raise BadArtifact(f"{path} is a link or not a plain file, which an artifact may not hold; copy the files")
        if num_bytes is None and info.st_size > _LARGEST_MANIFEST:
            raise BadArtifact(f"{path} has {info.st_size} bytes, more than a manifest can have; export the model again")
        if num_bytes is not None and info.st_size != num_bytes:
            raise BadArtifact(f"{path} is damaged: expected {num_bytes} bytes, found {info.st_size}; export again")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadArtifact(f"{path} is missing; export the model again") from error
    except OSError as error:
        raise BadArtifact(f"{path} cannot be read: {error.strerror or error}") from error


def _check_schema(fields: object, path: Path) -> None:
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if type(schema) is int and schema > _SCHEMA:
        raise BadArtifact(f"{path} has schema {schema}, this onefold reads up to {_SCHEMA}; update onefold")
    if type(schema) is not int or schema < 1:
        raise BadArtifact(f"{path} is not the manifest of an artifact of onefold; give the folder of an export")


class _Fields:
    """The fields of a manifest; each access checks the type. Raises BadArtifact."""

    def __init__(self, fields: Mapping[str, object], path: Path) -> None:
        self._fields, self._path = fields, path

    def get(self, name: str, kind: type[_T]) -> _T:
        value = self._fields.get(name)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.error(f"{name!r} must be {kind.__name__}, not {value!r:.80}")
        return value

    def optional(self, name: str, kind: type[_T]) -> _T | None:
        return None if name in self._fields and self._fields[name] is None else self.get(name, kind)

    def inner(self, name: str) -> _Fields:
        return _Fields(self.get(name, dict), self._path)

    def names(self) -> set[str]:
        return set(self._fields)

    def strings(self, name: str) -> tuple[str, ...]:
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"{name!r} must be a list of strings")
        return tuple(str(value) for value in values)

    def error(self, why: str) -> BadArtifact:
        return BadArtifact(f"{self._path} cannot be used: {why}; export the model again")


def _parse(fields: _Fields, folder: Path) -> Artifact:
    expected = {"schema", "sha256", *Artifact.__dataclass_fields__} - {"folder"}
    if fields.names() != expected:
        raise fields.error(f"missing or unknown fields: {', '.join(sorted(fields.names() ^ expected))}")
    num_classes = fields.get("num_classes", int)
    classes = fields.strings("classes") if fields.optional("classes", list) is not None else None
    if num_classes < 1 or (classes is not None and len(classes) != num_classes):
        raise fields.error(f"{num_classes} logits do not fit {len(classes or ())} classes")
    return Artifact(
        folder=folder,
        runtime=fields.get("runtime", str),
        precision=fields.get("precision", str),
        model=fields.get("model", str),
        fused=fields.get("fused", bool),
        drift=fields.optional("drift", float),
        input_shape=_parse_shape(fields),
        num_classes=num_classes,
        dynamic_batch=fields.get("dynamic_batch", bool),
        classes=classes,
        preprocessing=fields.get("preprocessing", dict),
        parity=None if fields.optional("parity", dict) is None else _parse_parity(fields.inner("parity")),
        licence=fields.optional("licence", str),
        source=fields.optional("source", str),
        details=fields.get("details", dict),
        made_with={
            name: fields.inner("made_with").get(name, str) for name in sorted(fields.inner("made_with").names())
        },
        files=_parse_files(fields.inner("files")),
    )


def _parse_shape(fields: _Fields) -> tuple[int, int, int]:
    shape = fields.get("input_shape", list)
    sizes = [size for size in shape if type(size) is int and size > 0]
    if len(shape) != 3 or len(sizes) != 3:
        raise fields.error(f"'input_shape' must be three sizes (channels, height, width), not {shape!r:.80}")
    return sizes[0], sizes[1], sizes[2]


def _parse_parity(fields: _Fields) -> Parity:
    parity = Parity(
        difference=fields.get("difference", float),
        top1_agreement=fields.get("top1_agreement", float),
        tolerance=fields.get("tolerance", float),
        images=fields.get("images", int),
    )
    if not 0 <= parity.difference <= parity.tolerance or not 0 <= parity.top1_agreement <= 1:
        raise fields.error(f"its parity did not hold: {parity}")
    return parity


def _parse_files(fields: _Fields) -> dict[str, StoredFile]:
    files = {}
    for name in sorted(fields.names()):
        if not _PLAIN_NAME.fullmatch(name) or name == MANIFEST_FILE:
            raise fields.error(f"{name!r} is not the name of a file inside the folder")
        entry = fields.inner(name)
        stored = StoredFile(num_bytes=entry.get("num_bytes", int), sha256=entry.get("sha256", str))
        if not _SHA256.fullmatch(stored.sha256):
            raise fields.error(f"the hash of {name} is not a SHA-256")
        files[name] = stored
    if REFERENCE_FILE not in files:
        raise fields.error(f"it lists no {REFERENCE_FILE}")
    return files


def check_replaceable(folder: Path) -> None:
    """Refuse to replace anything but an artifact or an empty folder. Raises BadArgument."""
    if not folder.exists():
        return
    is_artifact = folder.is_dir() and all(
        path.name in (MANIFEST_FILE, REFERENCE_FILE, README_FILE) or path.name.startswith("model.")
        for path in folder.iterdir()
    )
    if not is_artifact:
        raise BadArgument(
            f"{folder} holds something else than an artifact, which an export would replace; choose a new name"
        )
