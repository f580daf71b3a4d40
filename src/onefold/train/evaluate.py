"""Accuracy: one code for networks and for runtime sessions, on images and labels.

Shapes: B images in a batch, C classes, N images in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from onefold.errors import BadArgument, BadData

Floats = NDArray[np.float32]
Session = Callable[[Floats], NDArray[np.floating[Any]]]

BINS = 15


class Judged(NamedTuple):
    """What the answers to N images are worth, an entry an image."""

    labels: NDArray[np.int64]
    answers: NDArray[np.int64]  # -1 where the logits are not finite
    ranks: NDArray[np.int64]  # how many classes stand before the label; C where the logits are not finite
    losses: NDArray[np.float64]
    confidences: NDArray[np.float64]  # the answer's softmax share; NaN where the logits are not finite


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often the answers are right. `top1`, `top5` and `per_class` are in percent, as papers print them.

    `loss` is the mean cross-entropy in nats. `confusion[label, answer]` counts images, int64 (C, C);
    `per_class` (C,) is the top-1 of each label's images, NaN where it has none. An answer that is not finite is
    wrong and counts for no class in `confusion`. `ece` is the expected calibration error in percent: the distance of
    accuracy and mean confidence (greatest softmax share) in `BINS` bins of equal width, the right end of each its own,
    weighted by their images (Guo et al., arXiv 1706.04599, eq. 3); answers that are not finite are in no bin. `judged`
    has an entry an image. `logits` (N, C) and `labels` (N,) are there when asked for.
    """

    top1: float
    top5: float
    loss: float
    ece: float
    count: int
    judged: Judged = field(repr=False)
    per_class: NDArray[np.float64] = field(repr=False)
    confusion: NDArray[np.int64] = field(repr=False)
    logits: Floats | None = field(default=None, repr=False)
    labels: NDArray[np.int64] | None = field(default=None, repr=False)

    def metrics(self) -> dict[str, float]:
        """The numbers a training logs and chooses by."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss, "ece": self.ece}


def accuracy(
    predict: nn.Module | Session, batches: Iterable[tuple[Tensor, Tensor]], *, keep_logits: bool = False
) -> Accuracy:
    """Score `predict` on pairs of images (B, C_in, H, W) float32 and labels (B,) of classes.

    A module, in eval mode, is called with tensors on its own device; anything else (a runtime session) takes and
    gives numpy float32. The answer to an image is its greatest logit, the first of equals. Raises BadArgument for a
    module in training mode or a label without a logit, BadData where there is no image.
    """
    answer = _of_module(predict) if isinstance(predict, nn.Module) else predict
    judged: list[Judged] = []
    kept: list[Floats] = []
    num_classes = 0
    for images, labels in batches:
        logits = np.asarray(answer(np.ascontiguousarray(images.cpu().numpy(), dtype=np.float32)), dtype=np.float32)
        judged.append(_judge(logits, labels.cpu().numpy().astype(np.int64)))
        num_classes = logits.shape[1]
        if keep_logits:
            kept.append(logits)
    if not sum(len(one.labels) for one in judged):
        raise BadData("there is no image to evaluate on: the batches are empty")
    every = Judged(*(np.concatenate(column) for column in zip(*judged, strict=True)))
    return _summary(every, num_classes, np.concatenate(kept) if keep_logits else None)


def _of_module(model: nn.Module) -> Session:
    if model.training:
        raise BadArgument("accuracy needs the model in eval mode: call model.eval() first")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def answer(images: Floats) -> Floats:
        with torch.inference_mode():
            logits: Floats = model(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return logits

    return answer


def _judge(logits: Floats, labels: NDArray[np.int64]) -> Judged:
    count, num_classes = logits.shape
    if len(labels) != count or (count and not 0 <= labels.min() <= labels.max() < num_classes):
        raise BadArgument(
            f"{count} answers of {num_classes} classes do not fit the {len(labels)} labels {sorted(set(labels))}: "
            f"is this the network for these data?"
        )
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    wide = np.where(finite[:, None], logits, 0.0).astype(np.float64)
    own = wide[np.arange(count), labels][:, None]
    earlier = np.arange(num_classes) < labels[:, None]  # of equal logits the first one is the answer
    ranks = ((wide > own) | ((wide == own) & earlier)).sum(axis=1)
    top = wide.max(axis=1, keepdims=True)
    sums = np.exp(wide - top).sum(axis=1)
    losses = np.log(sums) + (top - own)[:, 0]
    return Judged(
        labels,
        np.where(finite, wide.argmax(axis=1), -1),
        np.where(finite, ranks, num_classes),
        np.where(finite, losses, np.nan),
        np.where(finite, 1 / sums, np.nan),
    )


def _summary(every: Judged, num_classes: int, logits: Floats | None) -> Accuracy:
    labels, answers = every.labels, every.answers
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels[answers >= 0], answers[answers >= 0]), 1)
    per_label = np.bincount(labels, minlength=num_classes)
    per_class = np.full(num_classes, np.nan)
    np.divide(100.0 * confusion.diagonal(), per_label, out=per_class, where=per_label > 0)
    return Accuracy(
        top1=100.0 * float((every.ranks < 1).mean()),
        top5=100.0 * float((every.ranks < min(5, num_classes)).mean()),
        loss=float(every.losses.mean()),
        ece=calibration_error(every.confidences, every.answers == labels),
        judged=every,
        count=len(labels),
        per_class=per_class,
        confusion=confusion,
        logits=logits,
        labels=None if logits is None else labels,
    )


def calibration_error(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """The expected calibration error in percent, of N answers (see `Accuracy`); NaN where none is finite."""
    known = np.isfinite(confidences)
    if not known.any():
        return math.nan
    shares, right = confidences[known], is_right[known]
    bins = np.clip(np.ceil(shares * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - shares, minlength=BINS)  # already weighted by the images of each bin
    return 100.0 * float(np.abs(gaps).sum() / len(shares))


def together(scores: Sequence[Accuracy]) -> Accuracy:
    """The score on the images of all, which are of the same classes."""
    every = Judged(*(np.concatenate(column) for column in zip(*(score.judged for score in scores), strict=True)))
    return _summary(every, len(scores[0].per_class), None)


_PENALTY = 1e-3  # on the squares of the weights of standardized features; 1e-5 to 1e-3 differ by 0.2 % on photos
_MAX_STEPS = 200


def fit_linear(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (N, D) and bias (N,) float32 of the logistic regression of labels (M,) on features (M, D).

    It minimises the mean cross-entropy with a small penalty on the weights: a convex problem, solved by L-BFGS in
    float64 on standardized features, so nothing is random and no rate is to be chosen. A class without an image gets
    the least of all biases. Raises BadArgument where there is no image or a feature is not finite.
    """
    if not len(features) or not bool(features.isfinite().all()):
        raise BadArgument(f"a probe needs images with finite features, not {len(features)}: are the weights sound?")
    std, mean = torch.std_mean(features.double(), 0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-12), std, torch.inf)  # what never varies tells nothing
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
