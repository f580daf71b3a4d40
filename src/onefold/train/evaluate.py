"""Accuracy of networks and runtime sessions on labelled images, and the linear probe.

Shapes: B images in a batch, N images in all, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from onefold.accuracy_intervals import wilson_interval
from onefold.errors import BadArgument, BadData

_Floats = NDArray[np.float32]
_Session = Callable[[_Floats], NDArray[np.floating[Any]]]

NUM_BINS = 15
_NO_IMAGE = "there is no image to evaluate on: the batches are empty"


class Predictions(NamedTuple):
    """What was predicted for N images, one entry per image."""

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]  # the class of the greatest logit, the first of equals; -1 where they are not finite
    ranks: NDArray[np.int64]  # how many classes are ranked before the label; C where the logits are not finite
    losses: NDArray[np.float64]
    confidences: NDArray[np.float64]  # softmax probability of the predicted class; NaN where logits are not finite


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often predictions are right. `top1`, `top5` and `per_class` are in percent, as papers print them.

    `loss` is the mean cross-entropy in nats. `confusion[label, predicted]` counts images, int64 (C, C);
    `per_class` (C,) is the top-1 of each label's images, NaN where it has none. Logits that are not finite are a wrong
    prediction and count for no class in `confusion`. `ece` is the expected calibration error in percent: the distance
    of accuracy and mean confidence (greatest softmax probability) in `NUM_BINS` bins of equal width, each with its
    right end, weighted by their images (Guo et al., arXiv 1706.04599, eq. 3); logits that are not finite are in no bin.
    `predictions` has one entry per image. `logits` (N, C) and `labels` (N,) are kept where asked for.
    """

    top1: float
    top5: float
    loss: float
    ece: float
    count: int
    predictions: Predictions = field(repr=False)
    per_class: NDArray[np.float64] = field(repr=False)
    confusion: NDArray[np.int64] = field(repr=False)
    logits: _Floats | None = field(default=None, repr=False)
    labels: NDArray[np.int64] | None = field(default=None, repr=False)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `top1`, in percent, for images of this kind: see `wilson_interval`."""
        return wilson_interval(round(self.top1 * self.count / 100), self.count)

    def metrics(self) -> dict[str, float]:
        """Give the numbers that a training logs and chooses the best epoch by."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss, "ece": self.ece}


def compute_accuracy(
    predict: nn.Module | _Session, batches: Iterable[tuple[Tensor, Tensor]], *, keep_logits: bool = False
) -> Accuracy:
    """Evaluate `predict` on pairs of images (B, C_in, H, W) float32 and labels (B,) of classes.

    A module, in eval mode, is called with tensors on its own device; anything else (a runtime session) takes and
    gives numpy float32. Raises BadArgument for a module in training mode or a label without a logit, BadData where
    there is no image.
    """
    parts: list[Predictions] = []
    kept: list[_Floats] = []
    num_classes = 0
    for logits, part in _predict(predict, batches):
        parts.append(part)
        num_classes = logits.shape[1]
        if keep_logits:
            kept.append(logits)
    if not sum(len(part.labels) for part in parts):
        raise BadData(_NO_IMAGE)
    return _summary(_concatenate(parts), num_classes, np.concatenate(kept) if keep_logits else None)


def predict_batches(predict: nn.Module | _Session, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Predictions]:
    """Give the predictions for each batch: the share of one process, which `merge_worker_predictions` puts together."""
    return [part for _, part in _predict(predict, batches)]


def merge_worker_predictions(shares: Sequence[Sequence[Predictions]], num_classes: int) -> Accuracy:
    """Give the accuracy on all images, where of N shares share i has batches i, i + N, i + 2N ... of the dataset.

    The predictions are put in the dataset's order, so that all sums are those of one process to the bit, as long as
    no batch is missing. Raises BadData where there is no image.
    """
    parts = [part for turn in zip_longest(*shares) for part in turn if part is not None]
    if not sum(len(part.labels) for part in parts):
        raise BadData(_NO_IMAGE)
    return _summary(_concatenate(parts), num_classes, None)


def _predict(
    predict: nn.Module | _Session, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[_Floats, Predictions]]:
    session = _module_session(predict) if isinstance(predict, nn.Module) else predict
    for images, labels in batches:
        logits = np.asarray(session(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32)), dtype=np.float32)
        yield logits, _predictions(logits, labels.cpu().numpy().astype(np.int64))


def merge_accuracies(scores: Sequence[Accuracy]) -> Accuracy:
    """Give the accuracy on the images of all `scores`, which are of the same classes."""
    return _summary(_concatenate([score.predictions for score in scores]), len(scores[0].per_class), None)


def _module_session(model: nn.Module) -> _Session:
    if model.training:
        raise BadArgument("accuracy needs the model in eval mode: call model.eval() first")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def session(images: _Floats) -> _Floats:
        with torch.inference_mode():
            logits: _Floats = model(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits

    return session


def _predictions(logits: _Floats, labels: NDArray[np.int64]) -> Predictions:
    count, num_classes = logits.shape
    if len(labels) != count or (count and not 0 <= labels.min() <= labels.max() < num_classes):
        raise BadArgument(
            f"{count} predictions of {num_classes} classes do not fit the {len(labels)} labels {sorted(set(labels))}: "
            f"is this the network for these data?"
        )
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    wide = np.where(finite[:, None], logits, 0.0).astype(np.float64)
    own = wide[np.arange(count), labels][:, None]
    earlier = np.arange(num_classes) < labels[:, None]  # of equal logits the first one is the prediction
    ranks = ((wide > own) | ((wide == own) & earlier)).sum(axis=1)
    top = wide.max(axis=1, keepdims=True)
    sums = np.exp(wide - top).sum(axis=1)
    losses = np.log(sums) + (top - own)[:, 0]
    return Predictions(
        labels,
        np.where(finite, wide.argmax(axis=1), -1),
        np.where(finite, ranks, num_classes),
        np.where(finite, losses, np.nan),
        np.where(finite, 1 / sums, np.nan),
    )


def _concatenate(parts: Sequence[Predictions]) -> Predictions:
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _summary(predictions: Predictions, num_classes: int, logits: _Floats | None) -> Accuracy:
    labels, predicted = predictions.labels, predictions.predicted
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels[predicted >= 0], predicted[predicted >= 0]), 1)
    per_label = np.bincount(labels, minlength=num_classes)
    per_class = np.full(num_classes, np.nan)
    np.divide(100.0 * confusion.diagonal(), per_label, out=per_class, where=per_label > 0)
    return Accuracy(
        top1=100.0 * float((predictions.ranks < 1).mean()),
        top5=100.0 * float((predictions.ranks < min(5, num_classes)).mean()),
        loss=float(predictions.losses.mean()),
        ece=calibration_error(predictions.confidences, predicted == labels),
        predictions=predictions,
        count=len(labels),
        per_class=per_class,
        confusion=confusion,
        logits=logits,
        labels=None if logits is None else labels,
    )


def calibration_error(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """Give the expected calibration error in percent of N predictions (see `Accuracy`); NaN where none is finite."""
    known = np.isfinite(confidences)
    if not known.any():
        return math.nan
    finite, right = confidences[known], is_right[known]
    bins = np.clip(np.ceil(finite * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    gaps = np.bincount(bins, weights=right - finite, minlength=NUM_BINS)  # already weighted by the images of each bin
    return 100.0 * float(np.abs(gaps).sum() / len(finite))


# ------------------------------------------------------------------------------------ linear probe

_PENALTY = 1e-3  # on the squares of the weights of standardized features; 1e-5 to 1e-3 differ by 0.2 % on photos
_MAX_STEPS = 200


def fit_linear_probe(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Give weight (C, D) and bias (C,) float32 of the logistic regression of labels (N,) on features (N, D).

    It minimises the mean cross-entropy with a small penalty on the weights: a convex problem, solved by L-BFGS in
    float64 on standardized features, so nothing is random and there is no learning rate to choose. A class without an
    image gets the least of all biases. Raises BadArgument where there is no image or a feature is not finite.
    """
    if not len(features) or not bool(features.isfinite().all()):
        raise BadArgument(f"a probe needs images with finite features, not {len(features)}: are the weights damaged?")
    std, mean = torch.std_mean(features.double(), 0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.inf)  # a constant feature gets weight 0
    x = (features.double() - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=_MAX_STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective() -> float:
        solver.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(F.linear(x, weight, bias), labels) + _PENALTY * weight.square().sum()
            loss.backward()
        return float(loss.detach())

    solver.step(objective)
    scaled = weight.detach() / std
    return scaled.float(), (bias.detach() - scaled @ mean).float()
