"""Predictors: an artifact or a network opened for inference, with its preprocessing and classes.

A source is a run folder, a file of weights, an id of the hub, `timm:NAME` or an exported artifact, as text or a path;
what the verbs return (a run, fused weights, an artifact) is a path too. torch is imported for networks alone: an
artifact needs its runtime, and no second of waiting for torch.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from onefold.checksums import MANIFEST, read_sealed_folder
from onefold.data import Preprocessing
from onefold.data.image_inputs import prepare_images
from onefold.errors import BadArgument, BadCheckpoint
from onefold.models.locate_weights import check_weights_exist
from onefold.runtimes import Artifact, Session, exporter
from onefold.runtimes.artifact import is_artifact

if TYPE_CHECKING:
    from onefold.commands.open_network import ModelNameCheck

_log = logging.getLogger("onefold")

Floats = NDArray[np.float32]
Source = str | os.PathLike[str]
TIMM_PREFIX = "timm:"
_Verb = TypeVar("_Verb", bound=Callable[..., Any])


def suggest_argument_names(function: _Verb) -> _Verb:
    """Let a verb that is called with an argument that it does not have say by TypeError which one may be meant."""
    known = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise TypeError(f"{function.__name__}() has no argument {name!r}: {hint}")
        return function(*args, **given)

    return checked  # type: ignore[return-value]


class SavedResult(os.PathLike[str]):
    """What a verb has written - a run, fused weights, an artifact: a path, which is opened once and then kept open."""

    @abstractmethod
    def __fspath__(self) -> str:
        """Give where it lies, as the verbs take it."""

    @cached_property
    def _predictors(self) -> dict[object, Predictor]:
        return {}


def load(artifact: Artifact | Source, *, threads: int = 1) -> Session:
    """Load an artifact on this machine, once every file and its logits for the reference images are checked.

    The session gives logits (B, classes) float32 of PIL images, uint8 arrays (H, W, 3), tensors (3, H, W) and lists of
    them, which it prepares as the artifact says; float32 (B, C, H, W) are taken as prepared. Raises BadArtifact where
    anything is not as it was when exported, MissingExtra where the runtime is not installed, BadArgument where this
    machine cannot run it.

        with onefold.load("artifacts/onnx-fp32", threads=2) as session:
            logits = session(image)
    """
    session = exporter.load(artifact if isinstance(artifact, Artifact) else Path(artifact), threads=threads)
    session.prepare = partial(prepare_images, preprocessing=Preprocessing.from_dict(session.artifact.preprocessing))
    return session


class _Session(Protocol):
    """Images (B, C, H, W) float32 in, logits (B, N) float32 out."""

    def __call__(self, images: Floats) -> Floats:
        """Give the logits."""

    def close(self) -> None:
        """Give memory and threads back."""


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A session with what is needed to use it: its preprocessing and its classes.

    `facts` describes it as a measurement records it: model, runtime, precision, fused, ... `trained_on` and
    `calibrated_on` say on which images, as `held_out.records_from_dict` reads it; None where nothing is recorded.
    """

    session: _Session
    classes: tuple[str, ...] | None
    num_classes: int
    preprocessing: Preprocessing
    facts: Mapping[str, Any]
    trained_on: object = None
    calibrated_on: object = None
    name_check: ModelNameCheck | None = None

    def warn_if_wrong_model(self, images: Floats) -> None:
        """Log a warning where the network's norms say, on these photos, that the weights are of another network."""
        if self.name_check is not None:
            self.name_check.warn(images)

    @property
    def title(self) -> str:
        """One line for a table."""
        untrained = " random weights" if self.facts.get("untrained") else ""
        fused = " UNFUSED" if not self.facts["fused"] else " partly fused" if self.facts.get("left_norms") else ""
        return f"{self.facts['model']} {self.facts['runtime']} {self.facts['precision']}{untrained}{fused}"

    def class_name(self, index: int) -> str:
        """Give the name of a class, or its index where it has none."""
        return self.classes[index] if self.classes is not None else str(index)

    def close(self) -> None:
        """Give a runtime's memory and threads back."""
        self.session.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def select_ema_weights(source: Source, use_ema: bool | None) -> str:
    """Give the source with the choice that `use_ema` states among its weights, as FILE:averaged or FILE:plain.

    Raises BadArgument where the source states another.
    """
    path = os.fspath(source)
    if use_ema is None:
        return path
    kind, (before, colon, stated) = "averaged" if use_ema else "plain", path.rpartition(":")
    file = before.rpartition("@")[2] if is_timm(before) else before
    if colon and Path(file).exists() and not Path(path).exists():
        if stated != kind:
            raise BadArgument(f"{path} names {stated!r} weights, and {kind!r} ones are asked for: give one of the two")
        return path
    return f"{path}:{kind}"


def is_timm(source: str | Path) -> bool:
    """Whether a source, or the model of a recipe, names a network of timm."""
    return str(source).startswith(TIMM_PREFIX)


def parse_timm_spec(spec: str) -> tuple[str, Path | None]:
    """Split `timm:NAME@FILE` into timm:NAME and the file, None where there is none. Raises BadArgument."""
    model_name, at, file = spec.partition("@")
    if at and not file:
        raise BadArgument(f"{spec} has no file after its @: give {model_name}@FILE, or {model_name} for random weights")
    return model_name, Path(file) if at else None


def resolve_weights_file(source: str | Path) -> str | Path:
    """Give the best weights of a run folder, and any other source as it is. Raises BadArgument, BadCheckpoint.

    Those of a run that averages are averaged: RUN:averaged are the same, and RUN:plain is refused.
    """
    file = _find_weights_file(source)
    if file != source:
        best = Path(file).parent
        if (best / MANIFEST).exists():
            read_sealed_folder(best)
        else:
            _log.warning(
                "%s is gone: the weights are checked by their own checksum, their metrics are not", best / MANIFEST
            )
    return file


def _find_weights_file(source: str | Path) -> str | Path:
    """Do what `resolve_weights_file` does, and read none of the weights."""
    path = Path(source)
    run, _, choice = str(source).rpartition(":")
    if choice in ("plain", "averaged") and not path.exists() and (Path(run) / "log.jsonl").is_file():
        has_averaged = (Path(run) / "last" / "ema.safetensors").is_file()
        if (choice == "averaged") == has_averaged:
            return _find_weights_file(run)
        there, place = "averaged" if has_averaged else "plain", f"; {run}/last:plain are those of its last step"
        raise BadArgument(f"the best weights of {run} are {there}, and no {choice} ones are kept{place * has_averaged}")
    if is_artifact(path):
        raise BadArgument(f"{source} is an exported artifact: give the weights that it was made from")
    if not (path / "log.jsonl").is_file():
        return source
    best = path / "best"
    if not (best / "model.safetensors").is_file():
        raise BadCheckpoint(f"{source} is a run without best weights yet: let it finish an epoch")
    return best / "model.safetensors"


def check_source_exists(source: Source) -> None:
    """Raise what opening a source would, where nothing lies there: without torch, and before the rest of a command.

    What is no path of this machine and may be an id is asked for at the hub. Raises BadArgument, BadCheckpoint,
    NetworkFailed.
    """
    path = os.fspath(source)
    if is_timm(path):
        _, file = parse_timm_spec(path)
        path = "" if file is None else str(file)
    if path and not is_artifact(Path(path)):
        check_weights_exist(_find_weights_file(path))


@contextmanager
def open_source(
    source: Source | Predictor,
    *,
    model: str | None = None,
    use_ema: bool | None = None,
    classes: Source | None = None,
    img_size: int | None = None,
    threads: int = 1,
) -> Iterator[Predictor]:
    """Open a source for inference as the options of the verbs say; a predictor, and a `SavedResult`, stay open."""
    if isinstance(source, Predictor):
        yield source
        return
    key = model, use_ema, classes, img_size, threads
    kept = source._predictors if isinstance(source, SavedResult) else {}
    if key not in kept:
        opened = open_predictor(select_ema_weights(source, use_ema), name=model, threads=threads, size=img_size)
        kept[key] = with_class_names(opened, None if classes is None else Path(classes))
    try:
        yield kept[key]
    finally:
        if not isinstance(source, SavedResult):
            kept[key].close()


def open_predictor(
    source: str | Path, *, name: str | None = None, threads: int = 1, fused: bool = True, size: int | None = None
) -> Predictor:
    """Open an artifact or a network for inference; weights are fused first unless `fused` is false.

    `size` asks a torch network for images of another size than its card says; an artifact's size is fixed.
    """
    if is_artifact(Path(source)):
        return _artifact_predictor(Path(source), threads, size)
    from onefold.commands.open_network import make_predictor, open_network

    network = open_network(source, name=name)
    if fused and not network.is_fused:
        network, _ = network.fused()
    return make_predictor(network.with_size(size), threads=threads)


def untrained_facts(untrained: bool) -> dict[str, object]:
    """Give what a measurement records of randomly initialized weights; nothing of others."""
    return {"untrained": True} if untrained else {}


def with_class_names(predictor: Predictor, classes: Path | None) -> Predictor:
    """Give the predictor with the class names of a file (see `read_class_names`); None leaves it as it is."""
    if classes is None:
        return predictor
    from onefold.commands.class_matching import read_class_names

    names = read_class_names(classes, predictor.num_classes, predictor.title, predictor.classes)
    return replace(predictor, classes=names)


def _artifact_predictor(folder: Path, threads: int, size: int | None) -> Predictor:
    session = exporter.load(folder, threads=threads)
    artifact = session.artifact
    if size is not None and size != artifact.input_shape[1]:
        raise BadArgument(f"{folder} takes images of {artifact.input_shape[1]} pixels: export again for {size}")
    return Predictor(
        session=session,
        classes=artifact.classes,
        num_classes=0 if artifact.details.get("features") is True else artifact.num_classes,
        preprocessing=Preprocessing.from_dict(artifact.preprocessing),
        facts=artifact_facts(artifact),
        trained_on=artifact.details.get("trained_on"),
        calibrated_on=artifact.details.get("calibrated_on"),
    )


def artifact_facts(artifact: Artifact) -> dict[str, Any]:
    """Give what a measurement records of an artifact."""
    digests = {name: stored.sha256 for name, stored in artifact.files.items() if name.startswith("model.")}
    return {
        "model": artifact.model,
        "runtime": artifact.runtime,
        "precision": artifact.precision,
        "fused": artifact.fused,
        "drift": artifact.drift,
        "input_shape": artifact.input_shape,
        "num_bytes": artifact.num_bytes,
        "sha256": digests[min(digests)],
        "source": artifact.folder.name,
        **_cost_of(artifact.details),
        **untrained_facts(artifact.details.get("untrained") is True),
        **({"left_norms": artifact.details["left_norms"]} if artifact.details.get("left_norms") else {}),
    }


def _cost_of(details: Mapping[str, object]) -> dict[str, int]:
    """Give parameters and multiply-adds per image from a manifest's details; nothing where an older one has none."""
    cost = details.get("cost")
    values = cost if isinstance(cost, dict) else {}
    return {key: values[key] for key in ("params", "macs") if type(values.get(key)) is int and values[key] > 0}
