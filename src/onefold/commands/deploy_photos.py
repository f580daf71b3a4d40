"""The photos of a deployment: which of them calibrate and which are scored, and the scores of networks on these."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from onefold.commands.deploy_results import QUICK_MAX_SCORED, DeployOptions
from onefold.commands.evaluate import class_indices
from onefold.commands.held_out_images import (
    DeploymentPhotos,
    count_trained_images,
    describe_seen_images,
    open_unlabelled_photos,
    remove_pixel_copies,
    split_photos,
    split_unlabelled_photos,
    training_records,
)
from onefold.commands.open_network import Network, make_predictor
from onefold.commands.predictor import Predictor
from onefold.data import Dataset, ImageLoader, Subset
from onefold.data.fingerprint import evenly_spaced, find_trained_copies
from onefold.errors import BadData
from onefold.report.format import format_count

_log = logging.getLogger("onefold")


def deployment_photos(network: Network, order: DeployOptions, *, calibrates: bool) -> DeploymentPhotos:
    """Divide photos into those to calibrate with and others to score on; what they are is in the title.

    A quick deployment scores some of those that are held out, evenly. Photos are without labels where none of their
    classes is the network's. Raises BadData for labels that are partly unknown, or damaged: the gate on accuracy is not
    to be lost with them.
    """
    place, records = order.calibration.data, training_records(network.title, network.card.trained_on)
    photos = split_photos(place, records, calibrates=calibrates, val=order.val)
    if photos.labelled:
        try:
            class_indices(make_predictor(network), photos.scored)
        except BadData as error:
            if order.val is not None or set(photos.scored.classes) & set(network.card.classes or ()):
                raise
            photos = split_unlabelled_photos(place, str(error))
    if not photos.labelled and not calibrates:
        photos = replace(photos, scored=open_unlabelled_photos(place))
    if calibrates:
        photos = remove_pixel_copies(photos, order.calibration.count, network.preprocessing.value_range)
    _check_photos(photos, order, calibrates=calibrates)
    seen, count = _seen_photos(network, photos.scored), len(photos.scored)
    title = f"{photos.title}: {count} photos, {seen.counted}"
    if records is None and not network.card.untrained:
        _log.info("%s: these photos may be among it", seen.counted)
    title += f"; {photos.why_unlabelled}" if photos.why_unlabelled else ""
    scored = photos.scored
    if order.quick and count > QUICK_MAX_SCORED:
        scored = Subset(scored, evenly_spaced(count, QUICK_MAX_SCORED))
        title += f"; {len(scored)} of them scored, evenly"
        seen = _seen_photos(network, scored)
    return replace(
        photos, scored=scored, title=title, num_held_out=count, num_seen=seen.number, seen=seen.as_in_evaluation
    )


def _check_photos(photos: DeploymentPhotos, order: DeployOptions, *, calibrates: bool) -> None:
    """Raise BadData, before any work, where too few photos are left to calibrate with, or none to score on is one."""
    if calibrates and len(photos.calibration) < 2:
        asked = f" that are not in {order.val} too" if order.val is not None else ""
        raise BadData(
            f"{order.calibration.data} has {format_count(len(photos.calibration), 'photo')} to calibrate int8 with"
            f"{asked}: give more with --data, or others to score on with --val"
        )
    reasons: list[str] = []
    for number in range(len(photos.scored)):
        try:
            photos.scored.image(number)
        except BadData as error:
            reasons.append(str(error))
        else:
            return
    first = f": {reasons[0]}" if reasons else ""
    raise BadData(f"none of {format_count(len(photos.scored), 'photo')} to score on can be read{first}")


class _SeenPhotos(NamedTuple):
    """How many photos were trained on or are copies of such; the same in words, and as `eval` says it."""

    number: int
    counted: str
    as_in_evaluation: str


def _seen_photos(network: Network, photos: Dataset) -> _SeenPhotos:
    records = training_records(network.title, network.card.trained_on)
    trained = count_trained_images(records, photos)
    if trained is None:
        return _SeenPhotos(0, "what the network was trained on is not recorded", "")
    copies = find_trained_copies(records or (), photos, network.preprocessing.value_range)
    more = f", {copies.found} more by their pixels copies of trained ones" if copies and copies.found else ""
    seen = describe_seen_images(len(photos), {"were trained on": trained}, {"trained ones": copies})
    return _SeenPhotos(trained + (copies.found if copies else 0), f"{trained} of them trained on{more}", seen)


class Answers(NamedTuple):
    """Logits (N, K) of N photos and the best class of each (N,); whether it is right (N,), and top-1 in percent."""

    logits: NDArray[np.float32]
    best: NDArray[np.int64]
    right: NDArray[np.bool_] | None
    top1: float | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores a network, and artifacts of it, on the same photos; `bad` are those that cannot be read (name -> why)."""

    photos: Dataset
    network: Network
    labelled: bool
    bad: dict[str, str] = field(default_factory=dict)

    def answers(self, predictor: Predictor) -> Answers:
        """Give what a network answers; with labels also whether it is right."""
        batches = ImageLoader(
            self.photos,
            self.network.preprocessing,
            batch_size=32,
            on_bad="skip",
            max_bad=len(self.photos),
            bad=self.bad,
        )
        found, labels = list[NDArray[np.float32]](), list[NDArray[np.int64]]()
        for images, truth in batches.epoch(0):
            if not found:
                predictor.warn_if_wrong_model(images.numpy())
            found.append(predictor.session(images.numpy()))
            labels.append(truth.numpy())
        logits = np.concatenate(found)
        best = logits.argmax(1)
        if not self.labelled:
            return Answers(logits, best, None, None)
        right = best == np.array(class_indices(predictor, self.photos))[np.concatenate(labels)]
        return Answers(logits, best, right, 100 * float(right.mean()))
