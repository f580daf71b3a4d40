"""Export a model to a runtime, open what was exported, load it: the steps that are the same for every runtime.

`export` traces the model, lets the runtime write its files into a temporary folder, loads them again, compares the
logits with PyTorch's, and only then moves the folder to its place. `load` checks every byte, and the logits for the
reference images, before it returns a session. Where a runtime cannot run on the machine that exports, the comparison
is left to the first `load`.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onefold.errors import BadArgument, BadArtifact, GateFailed, OnefoldError
from onefold.file_io import atomic_replace
from onefold.runtimes.artifact import (
    MANIFEST_FILE,
    README_FILE,
    REFERENCE_FILE,
    Artifact,
    ModelInfo,
    Parity,
    check_replaceable,
    hash_files,
    read_files,
    read_manifest,
    render_manifest,
)
from onefold.runtimes.artifact_readme import render_readme
from onefold.runtimes.base import (
    Int8Model,
    Runtime,
    RuntimeEngine,
    Session,
    check_precision,
    first_error_line,
    import_runtime,
    installed_versions,
    suppress_output,
)
from onefold.runtimes.reference_logits import (
    Example,
    Floats,
    ReferenceLogits,
    example_images,
    read_reference,
    relative_difference,
    top1_agreement,
    write_reference,
)
from onefold.runtimes.sandbox import mark_as_trusted, open_in_child_first

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

# The largest difference from PyTorch's logits that is accepted, relative to the largest logit. int8 needs the most: two
# roundings to nearest may fall on either side of a tie, and what differs by one step in one layer differs by several
# some layers later. In fp32 a network that magnifies rounding, as one with freshly settled norms does, may differ by
# ROUNDINGS times its own rounding, which the manifest keeps; but by no more than MOST_FP32, however it is edited.
TOLERANCES: dict[str, float] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.05, "int8": 0.1}
_ROUNDINGS, _MOST_FP32 = 16, 1e-3

RANDOM_WEIGHTS_NOTE = (
    "Its weights are drawn at random: how much an int8 rounding moves their logits says nothing of trained weights, so "
    "that is not judged, and what int8 costs in accuracy cannot be known from them"
)
_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")


class UnfusedWarning(UserWarning):
    """A model was exported with branches that could have been fused into one convolution."""


class TracedModel:
    """A model to export to several runtimes and precisions: what they have in common is computed once.

    That is a copy of it, its logits for the reference images, and what torch.export traces, in float or with quantize
    and dequantize operations. See `export` for `model` and `example`, and for what is raised.
    """

    def __init__(self, model: nn.Module | Int8Model, example: Example) -> None:
        self._model, self._example = model, example
        self._programs: dict[bool, ExportedProgram] = {}

    @cached_property
    def network(self) -> nn.Module:
        """The copy that gives the reference logits: images (B, C, H, W) to logits (B, N)."""
        from torch import nn

        return _frozen_copy(self._model if isinstance(self._model, nn.Module) else self._model.model)

    @cached_property
    def reference(self) -> ReferenceLogits:
        """The images of the example and the network's logits for them."""
        images = example_images(self._example)
        return ReferenceLogits(images=images, logits=_reference_logits(self.network, images))

    @cached_property
    def fp32_tolerance(self) -> float:
        """What a runtime's logits in 32 bits may differ by, relative to the largest (see `TOLERANCES`)."""
        rounding = float(f"{min(_ROUNDINGS * _rounding(self.network, self.reference), _MOST_FP32):.2g}")
        return max(TOLERANCES["fp32"], rounding)

    def program(self, *, qdq: bool) -> ExportedProgram:
        """The program for a converter: of an int8 model with quantize and dequantize operations, or in integers.

        It is one for all runtimes, none of which changes it.
        """
        from torch import nn

        if qdq not in self._programs:
            model = self._model
            form = self.network if isinstance(model, nn.Module) or not qdq else _frozen_copy(model.graph)
            self._programs[qdq] = trace(form, _to_torch(self.reference.images[:2]))
        return self._programs[qdq]

    def export(self, folder: Path | str, *, runtime: str, info: ModelInfo, precision: str = "fp32") -> Artifact:
        """Export it for a runtime into `folder`, atomic_replace an older artifact there: see `export`."""
        runtime_module, folder = check_precision(runtime, precision), Path(folder)
        check_replaceable(folder)
        info.check(self.reference.logits.shape[1])
        request = _Request(
            name=runtime,
            runtime=runtime_module,
            precision=precision,
            info=info,
            reference=self.reference,
            tolerance=self.fp32_tolerance if precision == "fp32" else TOLERANCES[precision],
        )
        _tell(0, "tracing the network")
        program = self.program(qdq=precision == "int8" and runtime_module.ACCEPTS_QDQ)
        with atomic_replace(folder) as temporary:
            temporary.mkdir()
            _write(request, program, temporary)
        if not info.fused:
            warnings.warn(f"{info.model} was exported NOT FUSED: fuse it first for its real speed", UnfusedWarning, 2)
        artifact = read_manifest(folder)
        if artifact.parity is not None:  # else it was not opened
            mark_as_trusted(artifact)
        return artifact


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What a runtime is asked to export."""

    name: str
    runtime: Runtime
    precision: str
    info: ModelInfo
    reference: ReferenceLogits
    tolerance: float


def export(
    model: nn.Module | Int8Model,
    example: Example,
    folder: Path | str,
    *,
    runtime: str,
    info: ModelInfo,
    precision: str = "fp32",
) -> Artifact:
    """Export `model` (in eval mode; it is not changed) for a runtime into `folder`, replacing an older artifact there.

    For int8 the model is what `quantize` returns. `example` is images (B, C, H, W) float32 as the model gets them,
    which become the artifact's reference, or only a shape (C, H, W), for which two random ones are made. Raises
    GateFailed, and leaves nothing, where the runtime's logits are not PyTorch's; BadArgument for a model, folder or
    argument that cannot be used; MissingExtra; NotWritable.
    """
    return TracedModel(model, example).export(folder, runtime=runtime, info=info, precision=precision)


def trace(model: nn.Module, images: Tensor) -> ExportedProgram:
    """Trace the model with torch.export for any batch size; `images` (B >= 2, C, H, W) are an example.

    Raises BadArgument where the control flow depends on the images' values or on their number.
    """
    import torch
    from torch.export import Dim

    try:
        with suppress_output(), torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise BadArgument(
            f"this network cannot be exported for any batch size: {first_error_line(error)}; "
            "its forward may depend neither on the values of its images nor on a fixed number of them"
        ) from error


def open_artifact(folder: Path | str) -> Artifact:
    """Read the artifact in a folder; its manifest is validated and every file compared with its hash.

    Raises BadArtifact.
    """
    artifact = read_manifest(Path(folder))
    _runtime_of(artifact)
    read_files(artifact)
    return artifact


def load(artifact: Artifact | Path | str, *, threads: int = 1) -> Session:
    """Load an artifact on this machine, once every file and its logits for the reference images are checked.

    Raises BadArtifact where anything is not as it was when exported, MissingExtra where the runtime is not installed,
    BadArgument where this machine cannot run it.
    """
    if type(threads) is not int or threads < 1:
        raise BadArgument(f"expected a number of threads of 1 or more, got {threads!r}")
    if not isinstance(artifact, Artifact):
        artifact = read_manifest(Path(artifact))
    runtime = _runtime_of(artifact)
    if not _unavailable(runtime):
        open_in_child_first(artifact)
    return open_session(artifact, threads=threads)


def open_session(artifact: Artifact, *, threads: int) -> Session:
    """Load an artifact as `load` does, in this process, whatever it may do to it."""
    runtime = _runtime_of(artifact)
    content = read_files(artifact)
    reference = read_reference(content[REFERENCE_FILE], artifact.input_shape, artifact.num_classes)
    tolerance = tolerance_of(artifact)
    if reason := _unavailable(runtime):
        raise BadArgument(f"{reason}: load {artifact.folder} on such a machine, or export the model to another runtime")
    try:
        engine = runtime.load(content, precision=artifact.precision, threads=threads)
        difference = relative_difference(_call_or_close(engine, reference.images), reference.logits)
    except OnefoldError:
        raise
    except Exception as error:
        raise BadArtifact(
            f"{artifact.runtime} cannot run {artifact.folder}: {first_error_line(error)}; export again"
        ) from error
    # Written as `not <=` so that NaN fails too.
    if not difference <= tolerance:
        engine.close()
        raise BadArtifact(
            f"{artifact.folder} does not give its reference logits on this machine: they differ by {difference:.2g} of "
            f"the largest, {tolerance:.2g} is allowed; export the model again on, or for, this machine"
        )
    return Session(artifact, engine)


def tolerance_of(artifact: Artifact) -> float:
    """Give the largest difference from its reference logits that an artifact may have, on whatever machine it runs."""
    if _is_drawn(artifact.precision, artifact.details):
        return math.inf
    if artifact.parity is None:
        return TOLERANCES[artifact.precision]
    return min(
        artifact.parity.tolerance, _MOST_FP32 if artifact.precision == "fp32" else TOLERANCES[artifact.precision]
    )


def _is_drawn(precision: str, details: Mapping[str, object]) -> bool:
    """Whether this is int8 of weights drawn at random, of whose logits no gate can tell anything."""
    return precision == "int8" and details.get("untrained") is True


def _write(request: _Request, program: ExportedProgram, folder: Path) -> None:
    """Write the runtime's files, the reference, the README and the manifest, once the logits have been compared."""
    parity = _convert(request, program, folder)
    if parity is not None and _is_drawn(request.precision, request.info.details) and math.isfinite(parity.difference):
        if not parity.difference <= parity.tolerance:
            text = "%s: the logits of %s in int8 differ from PyTorch's by %.2g of the largest. %s"
            _log.warning(text, request.info.model, request.name, parity.difference, RANDOM_WEIGHTS_NOTE)
        parity = replace(parity, tolerance=max(parity.tolerance, parity.difference))
    if parity is not None and not parity.difference <= parity.tolerance:
        hint = (
            "; int8 may overflow on this processor, as on x86 without VNNI: 7-bit weights do not (--weight-bits 7)"
            if request.precision == "int8"
            else ""
        )
        raise GateFailed(
            f"the logits of {request.name} differ from PyTorch's by {parity.difference:.2g} of the largest, "
            f"{parity.tolerance:.2g} is allowed; no artifact was written{hint}"
        )
    write_reference(folder / REFERENCE_FILE, request.reference)
    info, images = request.info, request.reference.images
    artifact = Artifact(
        folder=folder,
        runtime=request.name,
        precision=request.precision,
        model=info.model,
        fused=info.fused,
        drift=None if info.drift is None else float(info.drift),
        input_shape=(images.shape[1], images.shape[2], images.shape[3]),
        num_classes=request.reference.logits.shape[1],
        dynamic_batch=True,
        classes=info.classes,
        preprocessing=dict(info.preprocessing),
        parity=parity,
        licence=info.licence,
        source=info.source,
        details={**request.runtime.MANIFEST_DETAILS, **info.details},
        made_with=installed_versions(("onefold", *request.runtime.PACKAGES)),
        files=hash_files(folder),
    )
    # The README lists the other files, and the manifest lists the README too: so they are hashed twice.
    (folder / README_FILE).write_text(render_readme(artifact), encoding="utf-8")
    manifest = render_manifest(replace(artifact, files=hash_files(folder)))
    (folder / MANIFEST_FILE).write_text(manifest, encoding="utf-8")


_COSTS = (1.0, 3.0, 0.3)  # of tracing, converting and comparing, about


def _tell(done: int, what: str) -> None:
    _progress.debug("%s", what, extra={"done": done, "total": 3, "costs": _COSTS, "part": True})


def _convert(request: _Request, program: ExportedProgram, folder: Path) -> Parity | None:
    """Write the runtime's files, load them again, and compare logits; None where this machine cannot run them."""
    runtime = request.runtime
    try:
        _tell(1, f"converting to {request.name}")
        runtime.export(program, folder, info=request.info, precision=request.precision)
        content = {name: (folder / name).read_bytes() for name in runtime.FILES}
        if _unavailable(runtime):
            return None
        _tell(2, "comparing its logits with PyTorch's")
        engine = runtime.load(content, precision=request.precision, threads=1)
        parity = _measure_parity(engine, request.reference, request.tolerance)
        engine.close()
        _tell(3, "compared")
        return parity
    except (OnefoldError, OSError):
        raise
    except Exception as error:
        raise BadArgument(f"{request.name} cannot take this network: {first_error_line(error)}") from error


def _measure_parity(engine: RuntimeEngine, reference: ReferenceLogits, tolerance: float) -> Parity:
    """Compare logits for the reference batch, for one image alone, and for a batch one image larger.

    The other batch sizes show a converter that fixed the batch to the example's.
    """
    images, logits = reference.images, reference.logits
    worst, agreement = 0.0, 1.0
    for rows in (range(len(images)), range(1), range(-1, len(images))):
        answer = _call_or_close(engine, np.ascontiguousarray(images[rows]))
        worst = max(worst, relative_difference(answer, logits[rows]))
        if not math.isfinite(worst):
            return Parity(difference=worst, top1_agreement=0.0, tolerance=tolerance, images=len(images))
        agreement = min(agreement, top1_agreement(answer, logits[rows]))
    return Parity(difference=worst, top1_agreement=agreement, tolerance=tolerance, images=len(images))


def _call_or_close(engine: RuntimeEngine, images: Floats) -> Floats:
    """Call an engine that has no other owner yet, and close it where it fails."""
    try:
        return engine(images)
    except BaseException:
        engine.close()
        raise


def _unavailable(runtime: Runtime) -> str | None:
    return None if runtime.unavailable_reason is None else runtime.unavailable_reason()


def _runtime_of(artifact: Artifact) -> Runtime:
    """Find an artifact's runtime and check that its files and precision are the runtime's. Raises BadArtifact."""
    try:
        runtime = import_runtime(artifact.runtime)
    except BadArgument as error:
        raise BadArtifact(f"{artifact.folder} cannot be used: {error}; or update onefold") from error
    if set(artifact.files) - {README_FILE} != {*runtime.FILES, REFERENCE_FILE}:
        raise BadArtifact(
            f"{artifact.folder} is not an artifact of {artifact.runtime}: expected {', '.join(runtime.FILES)} and "
            f"{REFERENCE_FILE}, its manifest lists {', '.join(artifact.files)}; export the model again"
        )
    if artifact.precision not in runtime.PRECISIONS:
        raise BadArtifact(f"{artifact.folder} has the unknown precision {artifact.precision!r:.80}; update onefold")
    if artifact.parity is None and runtime.unavailable_reason is None:
        raise BadArtifact(f"{artifact.folder} was never compared with PyTorch, as {artifact.runtime} is; export again")
    return runtime


def _rounding(network: nn.Module, reference: ReferenceLogits) -> float:
    """Give the difference of the logits from those in float64, relative to the largest; 0 where it has no float64."""
    import torch

    try:
        with suppress_output(), torch.inference_mode():
            exact = copy.deepcopy(network).double()(_to_torch(reference.images).double()).numpy()
    except Exception:  # it makes tensors of another dtype itself: the fixed tolerance has to do
        return 0.0
    difference = relative_difference(reference.logits, exact)
    return difference if math.isfinite(difference) else 0.0


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Copy the model to the CPU in float32, so that nothing here can change the caller's."""
    import torch

    if any(module.training for module in model.modules()):
        raise BadArgument("the model is in train mode, where its logits depend on the batch; call model.eval() first")
    with suppress_output():  # copying a traced graph warns of torch's own deprecations
        return copy.deepcopy(model).to("cpu", torch.float32)


def _to_torch(images: Floats) -> Tensor:
    """Copy images (B, C, H, W) to a tensor: one that shared memory could be changed by the network."""
    import torch

    return torch.from_numpy(images.copy())


def _reference_logits(network: nn.Module, images: Floats) -> Floats:
    """Compute PyTorch's logits (B, classes), twice. Raises BadArgument where they could not serve as a reference."""
    import torch

    x = _to_torch(images)
    try:
        with torch.inference_mode():
            first, second = network(x), network(x)
    except Exception as error:
        raise BadArgument(
            f"the model does not take images of shape {images.shape}: {first_error_line(error)}"
        ) from error
    if not isinstance(first, torch.Tensor) or first.ndim != 2 or len(first) != len(images):
        actual = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        raise BadArgument(f"expected a model that returns one tensor (B, classes), got {actual}")
    if not torch.isfinite(first).all() or not first.any():
        raise BadArgument("the model's logits are not finite, or all zero: nothing could be compared with them")
    if not torch.equal(first, second) or not np.array_equal(x.numpy(), images):
        raise BadArgument("the model is not deterministic, or changes its images in place; that cannot be exported")
    return first.numpy().copy()
