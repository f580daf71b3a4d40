"""Int8 networks, calibrated on the user's photos once: a calibration is kept, and found again for every export.

It is kept under XDG_CACHE_HOME (~/.cache) by the digests of all that it depends on: the network's tensors, the
preprocessing, the contents of the photos in their order, the method, and the code that calibrates.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from onefold.checksums import read_sealed_folder, write_sealed_folder
from onefold.commands.held_out_images import calibration_photos, training_records
from onefold.commands.open_network import Network
from onefold.commands.predict import warn_unusual_images
from onefold.commands.predictor import Floats
from onefold.data import Dataset, Preprocessing, Subset
from onefold.data.fingerprint import TrainedOn, evenly_spaced, image_keys
from onefold.errors import BadArgument, BadData, NotWritable
from onefold.file_io import cache_folder, parse_json
from onefold.models.flops import count_flops
from onefold.models.weights_file import tensors_sha256
from onefold.progress_steps import Steps
from onefold.quantize import MINMAX_METHOD, ModelQParams, QuantizationMethod, QuantizedModel, quantize
from onefold.quantize.convert import calibration_state_dict, from_calibration_state_dict
from onefold.quantize.method_search import MAX_IMAGES, NUM_CANDIDATES, quantize_with_search, skip_sensitive_layers
from onefold.report.format import format_count, join_words

_FEWEST_TO_SEARCH = 8
PHOTO_S = 0.005  # to read one, about
_CALIBRATION_S, _MACS_PER_S = 0.7, 2.2e9  # what of a calibration does not depend on the photos, and what does
_FLAT = 0.02  # of prepared photos, whose deviation is near 1: the deviation below which nothing is in them
_MOST_KEPT = 40  # each as large as the int8 network
_FACTS, _TENSORS = "calibration.json", "calibration.safetensors"

_log = logging.getLogger("onefold")
_progress = logging.getLogger("onefold.progress")


class TimeBudget:
    """The minutes that a deployment may take, None without a limit; what is left out for them is named."""

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self.left_out: list[str] = []
        self._ends = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for `what`, which takes about so many seconds; if not, it is noted as left out."""
        if time.monotonic() + seconds <= self._ends:
            return True
        self.left_out.append(what)
        return False

    @property
    def note(self) -> str | None:
        """A sentence that names what was left out; None where that is nothing."""
        if not self.left_out:
            return None
        minutes = f"{self.minutes:g} minute{'' if self.minutes == 1 else 's'}"
        return f"left out, for lack of time in the {minutes} that were given: {join_words(self.left_out)}"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What an int8 network is made with: photos (a folder at any depth, shards, "digits"), how many, and how.

    `data` is empty where the network was trained for int8. `photos` are those of `data` to choose from; None leaves
    that to `calibration_photos`. With `search` the method is only where a search by measured answers begins;
    `skip_layers`, those that cost most, stay in floating point.
    """

    data: str = ""
    photos: Dataset | None = None
    count: int = 200
    method: QuantizationMethod = field(default_factory=QuantizationMethod)
    search: bool = False
    skip_layers: int = 0

    def select_photos(self) -> Dataset:
        """`count` of `photos`, evenly; all where there are fewer."""
        assert self.photos is not None
        return Subset(self.photos, evenly_spaced(len(self.photos), self.count))


@dataclass(frozen=True, kw_only=True)
class Int8Network:
    """An int8 network, and on which photos it was calibrated; None where its scales were trained."""

    made: QuantizedModel
    calibrated_on: TrainedOn | None = None


def calibrated_network(
    network: Network,
    order: CalibrationOptions | None,
    say: Callable[[str], None] = lambda line: None,
    budget: TimeBudget | None = None,
) -> Int8Network:
    """The int8 network: with the scales it was trained with, where it was trained for int8, and else calibrated.

    A search for a method tries as many as the budget has time for; what it then finds is not kept for the next time.

    Raises BadData where there are too few photos, or nothing in them; BadArgument where it is not fused, where it was
    not trained so and there are no photos, and where it was, and the order asks for something else.
    """
    if order is None or not order.data or network.card.int8 is not None:
        return Int8Network(made=_as_trained(network, order))
    if not network.is_fused:
        raise BadArgument(f"{network.title} is not fused: int8 is made from the fused network")
    if network.left_norms:
        raise BadArgument(
            f"{network.title} is partly fused, {network.left_norms} norms follow no convolution: int8 is made of "
            "networks without norms; export it in fp32"
        )
    if order.photos is None:
        records = training_records(network.title, network.card.trained_on)
        order = replace(order, photos=calibration_photos(order.data, records))
    if order.count < 2:
        raise BadArgument(f"expected 2 photos or more to calibrate with, not {order.count}")
    source = order.select_photos()
    contents = image_keys(source, "content")
    kept = _kept_as(network, contents, order)
    made = _found(network, kept)
    if made is None:
        budget = TimeBudget() if budget is None else budget
        left_out = len(budget.left_out)
        made = _calibrated(network, source, order, say, budget)
        if len(budget.left_out) == left_out:
            _keep(made, kept)
    record = TrainedOn.from_keys(contents, "content").with_pixels(source, network.preprocessing.value_range)
    return Int8Network(made=made, calibrated_on=record)


def _calibrated(
    network: Network, source: Dataset, order: CalibrationOptions, say: Callable[[str], None], budget: TimeBudget
) -> QuantizedModel:
    macs = count_flops(network.model, network.preprocessing.size).macs
    steps = Steps([("reading photos", PHOTO_S * len(source)), ("", calibration_seconds(order, macs))])
    steps.begin(0)
    images, method = load_calibration_images(source, order, network.preprocessing), order.method
    steps.begin(1)
    _refuse_empty(images, order.data)
    if order.skip_layers:
        method = skip_sensitive_layers(network.model, images, method, order.skip_layers)
    if order.search and len(images) >= _FEWEST_TO_SEARCH:
        made = quantize_with_search(network.model, images, method, say, budget.allows)
    else:
        made = quantize(network.model, images, method)
    steps.end()
    return made


def calibration_seconds(order: CalibrationOptions, macs: int) -> float:
    """How long it takes, about, to calibrate a network of so many multiply-adds, with its search, on two cores."""
    photos = order.count if order.photos is None else min(order.count, len(order.photos))

    def once(images: float) -> float:
        return _CALIBRATION_S + images * macs / _MACS_PER_S

    search = NUM_CANDIDATES * once(0.75 * min(photos, MAX_IMAGES)) if order.search else 0.0
    return search + once(photos)


def _refuse_empty(images: torch.Tensor, place: str) -> None:
    """Raise BadData where the photos (B, C, H, W) are of one colour each, or all the same; warn where half of them are.

    The ranges of activations on such photos say nothing of others: what exceeds them is cut off.
    """
    flat = int((images.flatten(2).std(2).amax(1) < _FLAT).sum())
    advice = "calibrate on photos of the kind that the network will see"
    ranges = "activation ranges observed on them would clip those of any other photo"
    if flat == len(images):
        raise BadData(f"the {flat} photos of {place} to calibrate with are of one colour each, and {ranges}: {advice}")
    if float((images[1:] - images[:1]).flatten(1).std(1).amax()) < _FLAT:
        raise BadData(f"the {len(images)} photos of {place} to calibrate with are all the same, and {ranges}: {advice}")
    if 2 * flat >= len(images):
        text = "%d of the %d photos of %s to calibrate with are of one colour each, and calibrate nothing: %s"
        _log.warning(text, flat, len(images), place, advice)


# ------------------------------------------------------------------------------ calibrations that are kept


def _kept_as(network: Network, contents: Sequence[str], order: CalibrationOptions) -> Path:
    """The folder of a calibration, named by the digests of all that it depends on."""
    facts = {
        "model": network.card.model,
        "tensors": tensors_sha256(network.model.state_dict()),
        "preprocessing": network.preprocessing.to_dict(),
        "photos": contents,
        "method": asdict(order.method),
        "search": order.search,
        "skip_layers": order.skip_layers,
        "code": _code(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return calibration_cache() / key


def calibration_cache() -> Path:
    """Where calibrations are kept, a sealed folder each: another one's damage or exchange is noticed."""
    return cache_folder() / "calibrations"


@cache
def _code() -> str:
    """The digest of the code that calibrates: another version may calibrate otherwise."""
    total = hashlib.sha256(torch.__version__.encode())
    for path in sorted((Path(__file__).parents[1] / "quantize").glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _found(network: Network, path: Path) -> QuantizedModel | None:
    """The int8 network of a calibration that is kept; None where there is none, or none that can be used."""
    size = network.preprocessing.size
    if not path.is_dir():
        return None
    try:
        contents = read_sealed_folder(path)
        facts, tensors = parse_json(contents[_FACTS]), load(contents[_TENSORS])
        made = from_calibration_state_dict(network.model, (network.card.in_chans, size, size), tensors, facts)
        os.utime(path)  # those that are used last are kept
    except (OSError, SafetensorError, BadArgument, ValueError, KeyError, TypeError) as error:
        _log.info("the cached calibration %s cannot be used (%s): calibrating again", path, error)
        return None
    _log.info("cached calibration of this network, these photos and this method is used, of %s (%s)", facts["at"], path)
    return made


def _keep(made: QuantizedModel, path: Path) -> None:
    """Keep a calibration, in place of those that were used longest ago; a folder that cannot be written keeps none."""
    tensors, facts = calibration_state_dict(made)
    facts["at"] = datetime.now().strftime("%Y-%m-%d %H:%M")
    try:
        write_sealed_folder(path, {_FACTS: json.dumps(facts).encode(), _TENSORS: save(tensors)})
        kept = sorted(path.parent.glob(f"*/{_FACTS}"), key=lambda each: each.parent.stat().st_mtime)
        for old in kept[:-_MOST_KEPT]:
            shutil.rmtree(old.parent)
    except (NotWritable, OSError) as error:
        _log.info("the calibration is not kept for the next time: %s", error)


# ------------------------------------------------------------------------------------------ what is made


def quantization_details(made: QuantizedModel) -> dict[str, object]:
    """What an artifact's manifest says of its quantization; the noise of each layer in decibels."""
    layers = {
        each.name: {"output_db": round(each.output_db, 2), "weight_db": round(each.weight_db, 2)}
        for each in made.layers
        if each.quantized
    }
    return {
        "quantization": {
            "method": made.method.title if made.images else f"trained, per {made.method.weights}",
            "activations": "int8, asymmetric, per tensor",
            "weights": f"int8, symmetric, per {made.method.weights}, up to {made.method.weight_qmax}",
            "calibrated_on": made.images,
            "layers": layers,
        }
    }


def _as_trained(network: Network, order: CalibrationOptions | None) -> QuantizedModel:
    """The int8 network with the scales it was trained with: options that contradict them are refused."""
    model = network.int8_model()
    params = ModelQParams.from_dict(network.card.int8 or {})
    if order is not None:
        method = order.method
        other = method.weights == "tensor" != params.weights or method.weight_qmax < params.weight_qmax
        if other or order.skip_layers:
            raise BadArgument(
                f"{network.title} was trained for 8 bits, weights per {params.weights} up to {params.weight_qmax}, "
                "and another network would lose what it has learnt: leave out --weight-bits, --per-tensor and "
                "--skip-layers, or train for them (onefold train --int8 --int8.limit 63, --int8.weights tensor)"
            )
        if order.data:
            text = "%s was trained for 8 bits and keeps its own: %s is not calibrated on"
            _log.warning(text, network.title, order.data)
    method = replace(
        MINMAX_METHOD, weights=params.weights, weight_qmax=params.weight_qmax, skip_layers=params.skip_layers
    )
    return QuantizedModel(model=model, method=method, layers=(), images=0)


def load_calibration_images(source: Dataset, order: CalibrationOptions, preprocessing: Preprocessing) -> torch.Tensor:
    """The photos (B, C, H, W); what cannot be read is left out and named."""
    warn_unusual_images(source, preprocessing)
    photos: list[Floats] = []
    for index in range(len(source)):
        _progress.debug("reading photos", extra={"done": index, "total": len(source), "part": True})
        try:
            photos.append(preprocessing(source.image(index, value_range=preprocessing.value_range)))
        except BadData as error:
            left_out = index + 1 - len(photos)
            _log.warning("left out of calibration, %d of %d photos so far: %s", left_out, len(source), error)
    _progress.debug("photos are read", extra={"done": 1, "total": 1})
    if len(photos) < 2:
        raise BadData(
            f"{order.data} has {format_count(len(photos), 'photo')} to calibrate with that can be read and are not to "
            "be scored: 2 are needed, better 200"
        )
    return torch.from_numpy(np.stack(photos))
