"""The loss of a classification: cross-entropy, with classes or shares of classes as labels, smoothed or not.

Shapes: B images, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from onefold.errors import BadArgument


def cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """The mean over B of -sum_k t_k log softmax(logits)_k, in nats, in float32.

    `labels` are classes (B) int64, or shares (B, K) that sum to 1, as mixing makes them; t is the label as shares,
    times 1 - smoothing, plus smoothing / K (Szegedy et al., arXiv 1512.00567, section 7).

    Raises BadArgument where the labels do not fit the logits.
    """
    count, num_classes = logits.shape
    if labels.shape not in ((count,), (count, num_classes)):
        came = f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
        raise BadArgument(f"{came}: expected ({count},) classes, or ({count}, {num_classes}) shares")
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
