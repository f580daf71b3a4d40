"""Advice: why a network is slow in a runtime on this machine, and what helps, as interleaved trials confirmed it."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from onefold.advisor import Advice, Case, OnnxGraph, TrialBench, Variant, advise_on, select_rules
from onefold.advisor.onnx_int8 import quantize_onnx
from onefold.advisor.trials import answer_in_batches, apply_all
from onefold.advisor.variant import ADVISED_RUNTIMES, check_advised_runtimes, graph_precision, open_engine
from onefold.bench import Instruments, Machine, Procedure, Roofline
from onefold.bench.compare import FEWEST_ROUNDS
from onefold.commands.bench import load_or_measure_roofline
from onefold.commands.calibration_cache import (
    CalibrationOptions,
    Int8Network,
    calibrated_network,
    load_calibration_images,
)
from onefold.commands.evaluate import evaluate_dataset, open_suite
from onefold.commands.export import network_from_module, trace
from onefold.commands.held_out_images import calibration_photos
from onefold.commands.open_network import Network, open_network
from onefold.commands.optional_dependencies import extras_for_sources, missing_packages, require_extras
from onefold.commands.predictor import Floats, Predictor, Source, select_ema_weights, suggest_argument_names
from onefold.commands.progress_bars import show_progress
from onefold.data import Preprocessing, Subset
from onefold.data.fingerprint import evenly_spaced
from onefold.data.preprocessing import IMAGENET_PREPROCESSING
from onefold.errors import BadArgument
from onefold.file_io import atomic_replace
from onefold.models import create_model, list_models
from onefold.quantize import quantize
from onefold.runtimes.base import RuntimeEngine
from onefold.runtimes.onnx import convert_to_onnx, pad_input_channels_, refuse_external_data
from onefold.runtimes.reference_logits import make_reference_images

_log = logging.getLogger("onefold")

_MOST_PHOTOS = 500  # to score on: more would take longer than they tell
_CALIBRATED = 100  # photos that an .onnx file is calibrated with
_DRAWN = 8  # images that stand for photos where none are given, to calibrate int8 whose speed alone is asked for
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class AdviseOptions:
    """What to advise on, and how: see `advise`."""

    source: str
    runtimes: Sequence[str]
    data: str | None = None
    model: str | None = None
    img_size: int | None = None
    batch: int = 1
    rules: Sequence[str] = ()
    procedure: Procedure = field(default_factory=lambda: TrialBench().procedure)


@suggest_argument_names
def advise(
    source: Source,
    to: str | Sequence[str] = "onnx",
    *,
    data: Source | None = None,
    model: str | None = None,
    use_ema: bool | None = None,
    img_size: int | None = None,
    threads: int = 1,
    batch_size: int = 1,
    samples: int = 60,
    warmup: float = 0.3,
    only: Sequence[str] = (),
    results: Source | None = "results",
) -> list[Advice]:
    """Find why a network is slow in a runtime on this machine, try what could help, and give what did.

    `source` is a run folder, a file of weights, an id of the hub, timm:NAME, a network of `onefold models` (with random
    weights), `module:function` of a function that gives a module, or an .onnx file; `to` are runtimes: onnx, openvino.
    Every remedy is timed against the network as it is, interleaved, in `samples` rounds, and its answers are compared;
    `Advice.findings` are those that were faster beyond the noise, `unconfirmed` the others. Labelled photos of `data`
    calibrate int8 and tell what a change costs in accuracy. `only` names rules to try. The machine's limits are kept in
    `results` (None: they are not asked for).

    Raises BadArgument, BadData, BadCheckpoint, MissingExtra.

        (advice,) = onefold.advise("runs/photos-finetune", "onnx")
        [finding.remedy.change for finding in advice.findings]
    """
    if samples < FEWEST_ROUNDS:
        raise BadArgument(f"a trial needs {FEWEST_ROUNDS} samples or more, not {samples}")
    order = AdviseOptions(
        source=select_ema_weights(source, use_ema),
        runtimes=[to] if isinstance(to, str) else list(to),
        data=None if data is None else os.fspath(data),
        model=model,
        img_size=img_size,
        batch=batch_size,
        rules=only,
        procedure=Procedure(warmup_calls=5, warmup_seconds=warmup, samples=samples, threads=threads),
    )
    with show_progress():
        return advise_on_source(order, None if results is None else Path(results))


def advise_on_source(order: AdviseOptions, results: Path | None, trial_bench: TrialBench | None = None) -> list[Advice]:
    """Advise on a source in each runtime in turn; `trial_bench` takes the place of this machine's."""
    rules = select_rules(order.rules)
    subject = open_subject(order)
    machine = Machine.detect()
    usual = TrialBench(
        procedure=order.procedure,
        instruments=Instruments(machine=machine),
        score=None if order.data is None else _PhotoScorer(subject, order.data),
    )
    trial_bench = trial_bench or usual
    roofline = None if results is None else load_or_measure_roofline(results, [order.procedure.threads])
    return [
        advise_on(_case(order, subject, runtime, trial_bench, machine, roofline), rules, trial_bench)
        for runtime in order.runtimes
    ]


def apply_rules(order: AdviseOptions, out: Path) -> list[str]:
    """Write the network as an ONNX file with the remedies of `order.rules`, untimed; the rules that applied.

    Raises BadArgument where none of them finds anything.
    """
    rules, subject = select_rules(order.rules), open_subject(order)
    runtime = order.runtimes[0]
    variant = _variant(order, subject, runtime)
    case = Case(
        source=order.source,
        variant=variant,
        layers=(),
        forms=subject.forms,
        features=Machine.detect().features,
    )
    remedies = [next(iter(rule.detect(case)), None) for rule in rules]
    changed, names = apply_all(variant, [each for each in remedies if each is not None])
    if not names or changed.content == variant.content:
        raise BadArgument(f"{order.source}: {', '.join(order.rules)} changes nothing in its graph")
    with atomic_replace(out) as temporary:
        temporary.write_bytes(changed.content)
    return names


def _case(
    order: AdviseOptions,
    subject: Subject,
    runtime: str,
    trial_bench: TrialBench,
    machine: Machine,
    roofline: Roofline | None,
) -> Case:
    variant = _variant(order, subject, runtime)
    return Case(
        source=order.source if order.model is None else f"{order.source} --model {order.model}",
        export_source=subject.export_source,
        variant=variant,
        layers=tuple(trial_bench.profile(variant)),
        forms=subject.forms,
        roofline=roofline,
        usable_cores=max(1, int(machine.available_cores)),
        features=machine.features,
        other_runtimes=[each for each in ADVISED_RUNTIMES if each != runtime and not missing_packages(each)],
    )


def _variant(order: AdviseOptions, subject: Subject, runtime: str) -> Variant:
    check_advised_runtimes([runtime])
    graph = OnnxGraph(subject.content)
    fixed = graph.input_shape()[0]
    if fixed is not None and order.batch not in (1, fixed):
        raise BadArgument(f"{order.source} takes {fixed} images a call: --batch-size {order.batch} is not possible")
    return Variant(
        content=subject.content,
        runtime=runtime,
        input_shape=subject.input_shape,
        precision=graph_precision(graph),
        threads=order.procedure.threads,
        batch=fixed or order.batch,
    )


# ------------------------------------------------------------------------------------------ the source


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A source opened for advice: its ONNX graph, and of a torch network its other forms."""

    source: str
    content: bytes
    input_shape: tuple[int, int, int]
    forms: _TorchForms | _OnnxForms | None = None
    export_source: str | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How its photos are prepared: of an .onnx file, which does not say, as ImageNet's."""
        if isinstance(self.forms, _TorchForms):
            return self.forms.network.preprocessing
        return Preprocessing.from_dict({**IMAGENET_PREPROCESSING.to_dict(), "size": self.input_shape[1]})


def open_subject(order: AdviseOptions) -> Subject:
    """Open a source. Raises BadArgument, BadData, BadCheckpoint, MissingExtra."""
    require_extras(dict.fromkeys(["onnx", *order.runtimes, *extras_for_sources(order.source, order.data)]))
    if order.source.endswith(".onnx"):
        return _open_onnx(order)
    network = _open(order).with_size(order.img_size)
    forms = _TorchForms(network, order.data)
    size = network.preprocessing.size
    shape = (network.card.in_chans, size, size)
    return Subject(
        source=order.source,
        content=forms.as_it_is,
        input_shape=shape,
        forms=forms,
        export_source=_export_source(order),
    )


def _export_source(order: AdviseOptions) -> str | None:
    """What `onefold export` takes for a source; None for a function, whose network it takes in Python."""
    if _is_function(order.source):
        return None
    if order.source in list_models() and not Path(order.source).exists():
        return f"WEIGHTS --model {order.source}"
    return order.source if order.model is None else f"{order.source} --model {order.model}"


def _is_function(source: str) -> bool:
    """Whether a source is module:function, and no path of this machine, no network of timm, no choice of weights."""
    is_weights = source.startswith("timm:") or source.endswith((":plain", ":averaged"))
    return _FUNCTION.fullmatch(source) is not None and not is_weights and not Path(source).exists()


def _open(order: AdviseOptions) -> Network:
    if _is_function(order.source):
        module = _imported(*order.source.split(":"))
        return network_from_module(module.eval(), order.model)
    if order.source in list_models() and not Path(order.source).exists():
        _log.info("%s: random weights, of which the speed is that of any others", order.source)
        return network_from_module(create_model(order.source).eval(), order.source)
    return open_network(order.source, name=order.model)


def _imported(module: str, function: str) -> nn.Module:
    """Call a function of a module of the user's, found from the current folder too, for the network that it gives."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise BadArgument(f"{module}:{function} cannot be imported: {error}") from error
    if not isinstance(made, nn.Module):
        raise BadArgument(f"{module}:{function} gives {type(made).__name__}, expected a torch.nn.Module")
    return made


def _open_onnx(order: AdviseOptions) -> Subject:
    try:
        content = Path(order.source).read_bytes()
    except OSError as error:
        raise BadArgument(f"{order.source} cannot be read: {error.strerror}") from error
    shape = OnnxGraph(content).input_shape()
    refuse_external_data(content)
    sides = [order.img_size if size is None else size for size in shape[2:]]
    if None in sides:
        raise BadArgument(f"{order.source} takes images of any size: say of which (--img-size 224)")
    if order.img_size is not None and order.img_size not in sides:
        raise BadArgument(
            f"{order.source} takes images of {sides[0]} x {sides[1]}, which is fixed in it: leave --img-size out"
        )
    height, width = (int(side or 0) for side in sides)
    input_shape = shape[1] or 3, height, width
    subject = Subject(source=order.source, content=content, input_shape=input_shape)
    photos = None if order.data is None else partial(_photos, subject, order.data)
    return replace(subject, forms=_OnnxForms(content, input_shape, photos))


def _photos(subject: Subject, data: str) -> Floats:
    """Photos to calibrate an .onnx file with, prepared for it."""
    images = calibration_photos(data, None)
    chosen = Subset(images, evenly_spaced(len(images), _CALIBRATED))
    loaded: Floats = load_calibration_images(chosen, CalibrationOptions(data=data), subject.preprocessing).numpy()
    return loaded


class _OnnxForms:
    """The forms of an .onnx file: int8 by ONNX Runtime's own tool, for what it was made of is not known."""

    is_fused, is_resizable = True, False

    def __init__(self, content: bytes, input_shape: tuple[int, int, int], photos: Callable[[], Floats] | None) -> None:
        self._content, self._input_shape, self._photos = content, input_shape, photos
        self._int8: dict[bytes, bytes] = {}

    @property
    def size(self) -> int:
        return self._input_shape[1]

    def fused(self) -> bytes:
        return self._content

    def int8(self, content: bytes) -> bytes:
        if content not in self._int8:
            drawn = make_reference_images(self._input_shape, num_images=_DRAWN)
            self._int8[content] = quantize_onnx(content, drawn if self._photos is None else self._photos())
        return self._int8[content]

    def resized(self, size: int) -> bytes:
        raise BadArgument(f"an .onnx file is of one size, not of {size} pixels too")


class _TorchForms:
    """The forms of a torch network as ONNX files, each made when it is first asked for."""

    is_resizable = True

    def __init__(self, network: Network, data: str | None) -> None:
        self.network, self._data = network, data
        self._resized: dict[int, bytes] = {}

    @property
    def is_fused(self) -> bool:
        return self.network.is_fused

    @property
    def size(self) -> int:
        return self.network.preprocessing.size

    @cached_property
    def as_it_is(self) -> bytes:
        """The network as the source has it: one that was trained for int8, and is fused, in int8."""
        if self.network.card.int8 is not None and self.network.is_fused:
            return self._int8
        return _to_onnx(self.network)

    def fused(self) -> bytes:
        return self._fused_content

    def int8(self, content: bytes) -> bytes:
        return self._int8

    def resized(self, size: int) -> bytes:
        if size not in self._resized:
            # Not `with_size`, which tells of the user's option: here the size is one that is tried.
            resized = {**self._fused.preprocessing.to_dict(), "size": size}
            self._resized[size] = _to_onnx(replace(self._fused, card=replace(self._fused.card, preprocessing=resized)))
        return self._resized[size]

    @cached_property
    def _fused(self) -> Network:
        return self.network if self.network.is_fused else self.network.fused()[0]

    @cached_property
    def _fused_content(self) -> bytes:
        return _to_onnx(self._fused)

    @cached_property
    def _int8(self) -> bytes:
        if self._data is None and self._fused.card.int8 is None:
            made = Int8Network(made=quantize(self._fused.model, self._fused.random_images(_DRAWN)))
        else:
            made = calibrated_network(self._fused, CalibrationOptions(data=self._data or ""))
        return _to_onnx(self._fused, made)


def _to_onnx(network: Network, made: Int8Network | None = None) -> bytes:
    precision = "fp32" if made is None else "int8"
    model = convert_to_onnx(trace(network, made).program(qdq=made is not None), precision=precision)
    if made is not None:
        pad_input_channels_(model)
    content: bytes = model.SerializeToString()
    return content


# ------------------------------------------------------------------------------------------- accuracy


class _BatchedSession:
    """An engine as a session that takes any number of images."""

    def __init__(self, engine: RuntimeEngine, variant: Variant) -> None:
        self._engine, self._variant = engine, variant

    def __call__(self, images: Floats) -> Floats:
        missing = -len(images) % self._variant.batch
        filled = np.concatenate([images, images[:1].repeat(missing, 0)]) if missing else images
        return answer_in_batches(self._engine, self._variant, filled)[: len(images)]

    def close(self) -> None:
        self._engine.close()


class _PhotoScorer:
    """Tells on which of the labelled photos a variant is right; once for each graph and precision."""

    def __init__(self, subject: Subject, data: str) -> None:
        self._subject, self._data = subject, data
        self._known: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}

    def __call__(self, variant: Variant) -> npt.NDArray[np.bool_]:
        key = variant.sha256, variant.precision
        if key not in self._known:
            self._known[key] = self._score(variant)
        return self._known[key]

    def _score(self, variant: Variant) -> npt.NDArray[np.bool_]:
        subject, session = self._subject, _BatchedSession(open_engine(variant), variant)
        card = subject.forms.network.card if isinstance(subject.forms, _TorchForms) else None
        size = variant.input_shape[1]
        facts = {"model": subject.source, "runtime": variant.runtime, "precision": variant.precision, "fused": True}
        try:
            predictor = Predictor(
                session=session,
                classes=None if card is None else card.classes,
                num_classes=session(variant.images(1)).shape[1],
                preprocessing=Preprocessing.from_dict({**subject.preprocessing.to_dict(), "size": size}),
                facts=facts,
                trained_on=None if card is None else card.trained_on,
            )
            images = next(iter(open_suite(subject.source, self._data, predictor).sets.values()))
            chosen = Subset(images, evenly_spaced(len(images), _MOST_PHOTOS))
            found = evaluate_dataset(predictor, chosen).score.predictions
        finally:
            session.close()
        return np.asarray(found.labels == found.predicted)
