"""Export a model to a runtime, open what was exported, load it: the same road for every runtime.

`export` traces the model, lets the runtime write its files aside, loads them again, compares the answers with
PyTorch's, and only then puts the folder in its place. `load` checks every byte, and the answer, before it hands out a
session. Where a runtime cannot run on the machine that exports, the comparison is left to the first `load`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onefold.errors import BadArgument, BadArtifact, GateFailed, OnefoldError
from onefold.runtimes import reference as proof
from onefold.runtimes.artifact import (
    HANDBOOK,
    MANIFEST,
    REFERENCE,
    About,
    Artifact,
    Parity,
    read_files,
    read_manifest,
    render,
    seal,
)
from onefold.runtimes.base import EightBit, Engine, Runtime, Session, find_runtime
from onefold.runtimes.given import Example, answer_of, check_about, forms, images_of, tensor
from onefold.runtimes.readme import handbook
from onefold.runtimes.reference import Floats, Reference
from onefold.runtimes.vendor import first_line, versions
from onefold.storage import replacing

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

# The largest difference from PyTorch's logits, relative to the largest logit. A manifest cannot widen it.
# Two roundings to nearest may fall on either side of a tie, and what differs by a step differs by more steps later on.
TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.05, "int8": 0.1}


class UnfusedWarning(UserWarning):
    """A model was exported with branches that could have been folded into one convolution."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What is asked of a runtime."""

    name: str
    runtime: Runtime
    precision: str
    about: About
    reference: Reference


def export(
    model: nn.Module | EightBit,
    example: Example,
    folder: Path | str,
    *,
    runtime: str,
    about: About,
    precision: str = "fp32",
) -> Artifact:
    """Write `model` (in eval mode, left as it is) for a runtime into `folder`, in place of an older artifact there.

    For int8 it is what `quantize` gives. `example` is images (B, C, H, W) float32 as the model sees them, which become
    the proof that travels with the artifact, or only their shape (C, H, W), for two made-up ones. Raises GateFailed,
    and leaves nothing, where the runtime's answer is not PyTorch's; BadArgument where the model, the place or an
    argument cannot be; MissingExtra.
    """
    from onefold.runtimes.program import trace

    kind, folder = find_runtime(runtime), Path(folder)
    _check_precision(runtime, kind, precision)
    _check_place(folder)
    network, form = forms(model, kind)
    images = images_of(example)
    reference = Reference(images=images, logits=answer_of(network, images))
    check_about(about, reference.logits.shape[1])
    order = _Order(name=runtime, runtime=kind, precision=precision, about=about, reference=reference)
    program = trace(form, tensor(images[:2]))
    with replacing(folder) as aside:
        aside.mkdir()
        _write(order, program, aside)
    if not about.fused:
        warnings.warn(f"{about.model} was exported NOT FUSED: fuse it first for its real speed", UnfusedWarning, 2)
    return read_manifest(folder)


def open_artifact(folder: Path | str) -> Artifact:
    """The artifact in a folder, its manifest validated and every file compared with its hash. Raises BadArtifact."""
    artifact = read_manifest(Path(folder))
    _runtime_of(artifact)
    read_files(artifact)
    return artifact


def load(artifact: Artifact | Path | str, *, threads: int = 1) -> Session:
    """A session of the artifact on this machine, once every file and its answer to the reference are checked.

    Raises BadArtifact where anything is not as it was when exported, MissingExtra where the runtime is not installed,
    BadArgument where this machine cannot run it.
    """
    if type(threads) is not int or threads < 1:
        raise BadArgument(f"expected a number of threads of 1 or more, came {threads!r}")
    found = artifact if isinstance(artifact, Artifact) else read_manifest(Path(artifact))
    kind = _runtime_of(found)
    content = read_files(found)
    reference = proof.read_reference(content[REFERENCE], found.input_shape, found.num_classes)
    tolerance = min(found.parity.tolerance if found.parity else math.inf, TOLERANCES[found.precision])
    if obstacle := _obstacle(kind):
        raise BadArgument(f"{obstacle}: load {found.folder} on such a machine, or export the model to another runtime")
    try:
        engine = kind.load(content, precision=found.precision, threads=threads)
        distance = proof.difference(_ask(engine, reference.images), reference.logits)
    except OnefoldError:
        raise
    except Exception as error:
        raise BadArtifact(f"{found.runtime} cannot run {found.folder}: {first_line(error)}; export again") from error
    if not distance <= tolerance:
        engine.close()
        raise BadArtifact(
            f"{found.folder} does not answer as it promises: its logits differ from the reference by {distance:.2g} of "
            f"the largest, {tolerance:.2g} is allowed; export the model again on, or for, this machine"
        )
    return Session(found, engine)


def _write(order: _Order, program: ExportedProgram, folder: Path) -> None:
    """The runtime's files, the proof and what is said of them, once the files have answered as PyTorch does."""
    parity = _convert(order, program, folder)
    if parity is not None and not parity.difference <= parity.tolerance:
        hint = "; do its sums saturate here? 7-bit weights do not let them" if order.precision == "int8" else ""
        raise GateFailed(
            f"{order.name} does not answer as PyTorch does: the logits differ by {parity.difference:.2g} of the "
            f"largest, {parity.tolerance:.2g} is allowed; nothing was written{hint}"
        )
    proof.write_reference(folder / REFERENCE, order.reference)
    about, images = order.about, order.reference.images
    made = Artifact(
        folder=folder,
        runtime=order.name,
        precision=order.precision,
        model=about.model,
        fused=about.fused,
        drift=None if about.drift is None else float(about.drift),
        input_shape=(images.shape[1], images.shape[2], images.shape[3]),
        num_classes=order.reference.logits.shape[1],
        dynamic_batch=True,
        classes=about.classes,
        preprocessing=dict(about.preprocessing),
        parity=parity,
        licence=about.licence,
        source=about.source,
        details={**order.runtime.DETAILS, **about.details},
        made_with=versions(("onefold", *order.runtime.PACKAGES)),
        files=seal(folder),
    )
    (folder / HANDBOOK).write_text(handbook(made), encoding="utf-8")
    (folder / MANIFEST).write_text(render(replace(made, files=seal(folder))), encoding="utf-8")


def _convert(order: _Order, program: ExportedProgram, folder: Path) -> Parity | None:
    """Put the runtime's files into the folder, load them again, and compare the answers where this machine can."""
    kind = order.runtime
    try:
        kind.export(program, folder, about=order.about, precision=order.precision)
        content = {name: (folder / name).read_bytes() for name in kind.FILES}
        if _obstacle(kind):
            return None
        engine = kind.load(content, precision=order.precision, threads=1)
        parity = _parity(engine, order.reference, TOLERANCES[order.precision])
        engine.close()
        return parity
    except (OnefoldError, OSError):
        raise
    except Exception as error:
        raise BadArgument(f"{order.name} cannot take this network: {first_line(error)}") from error


def _parity(engine: Engine, reference: Reference, tolerance: float) -> Parity:
    """Compares the answers for the reference batch, for one image alone and for one image more than the batch."""
    images, logits = reference.images, reference.logits
    worst, agreement = 0.0, 1.0
    for rows in (range(len(images)), range(1), range(-1, len(images))):
        answer = _ask(engine, np.ascontiguousarray(images[rows]))
        worst = max(worst, proof.difference(answer, logits[rows]))
        if not math.isfinite(worst):
            return Parity(difference=worst, top1_agreement=0.0, tolerance=tolerance, images=len(images))
        agreement = min(agreement, proof.top1_agreement(answer, logits[rows]))
    return Parity(difference=worst, top1_agreement=agreement, tolerance=tolerance, images=len(images))


def _ask(engine: Engine, images: Floats) -> Floats:
    """The engine's answer; one that fails is closed."""
    try:
        return engine(images)
    except BaseException:
        engine.close()
        raise


def _obstacle(kind: Runtime) -> str | None:
    """Why this machine cannot run the runtime, or None."""
    return None if kind.OBSTACLE is None else kind.OBSTACLE()


def _runtime_of(artifact: Artifact) -> Runtime:
    """The runtime of an artifact, once its files and its precision are the runtime's. Raises BadArtifact."""
    try:
        kind = find_runtime(artifact.runtime)
    except BadArgument as error:
        raise BadArtifact(f"{artifact.folder} cannot be used: {error}; or update onefold") from error
    if set(artifact.files) - {HANDBOOK} != {*kind.FILES, REFERENCE}:
        raise BadArtifact(
            f"{artifact.folder} is not an artifact of {artifact.runtime}: expected {', '.join(kind.FILES)} and "
            f"{REFERENCE}, its manifest lists {', '.join(artifact.files)}; export the model again"
        )
    if artifact.precision not in kind.PRECISIONS:
        raise BadArtifact(f"{artifact.folder} has the unknown precision {artifact.precision!r:.80}; update onefold")
    if artifact.parity is None and kind.OBSTACLE is None:
        raise BadArtifact(f"{artifact.folder} was never compared with PyTorch, as {artifact.runtime} is; export again")
    return kind


def _check_precision(name: str, kind: Runtime, precision: str) -> None:
    if precision not in kind.PRECISIONS:
        why = f": {kind.REFUSES[precision]}" if precision in kind.REFUSES else ""
        raise BadArgument(f"{name} cannot export {precision!r}{why}; choose one of: {', '.join(kind.PRECISIONS)}")


def _check_place(folder: Path) -> None:
    """Refuse to put an artifact in the place of anything but an artifact or an empty folder."""
    if not folder.exists():
        return
    ours = folder.is_dir() and all(
        p.name in (MANIFEST, REFERENCE, HANDBOOK) or p.name.startswith("model.") for p in folder.iterdir()
    )
    if not ours:
        raise BadArgument(
            f"{folder} holds something else than an artifact, which an export would replace; choose a new name"
        )
