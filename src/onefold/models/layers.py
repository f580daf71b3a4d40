"""Parts that the families share: layers, padding, initialization, heads, and the classifier and feature networks.

Shapes: B images in a batch, C channels, H W rows and columns of a map, D width of a token, N classes.
The *state* that goes from stage to stage is a map (B, C, H, W), or that map with tokens beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onefold.errors import BadArgument
from onefold.reparam import Chain, fold

BlockState = Tensor | tuple[Tensor, Tensor]


# --------------------------------------------------------------------------------------- layers


def conv_norm(c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1, *, eps: float = 1e-5) -> Chain:
    """A convolution without bias, padded symmetrically by half its kernel, and its BatchNorm."""
    kind = StridedPointwise if kernel_size == 1 and stride > 1 and groups == 1 else nn.Conv2d
    conv = kind(c_in, c_out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return Chain(conv, nn.BatchNorm2d(c_out, eps=eps))


class StridedPointwise(nn.Conv2d):
    """A strided 1x1 convolution that first selects the pixels it reads, then has no stride: the same numbers.

    torch 2.13's own kernel for few input channels in channels_last reads past its memory in the backward pass on
    processors without AVX-512.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        down, across = self.stride
        return F.conv2d(x[:, :, ::down, ::across], self.weight, self.bias)


fold.register(StridedPointwise, fold.dispatch(nn.Conv2d))


def hard_sigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) / 6, elementwise (MobileNetV3, arXiv 1905.02244)."""
    return F.hardsigmoid(x)


class SqueezeExcite(nn.Module):
    """A gain for each channel and image, computed from the mean of the map (Hu et al., arXiv 1709.01507)."""

    def __init__(self, channels: int, squeeze: int = 16) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // squeeze, 1)
        self.expand = nn.Conv2d(channels // squeeze, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, each channel scaled by its gain in (0, 1)."""
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(mean))))


class DynamicReLU(nn.Module):
    """max(a x, b x) with a in [0, 2] and b in [-1, 1] for each channel, computed from a token: DY-ReLU, no intercepts.

    As initialized it is close to ReLU: a = 1, b = 0.
    Source: arXiv 2003.10027; as Mobile-Former (arXiv 2108.05895) uses it.
    """

    def __init__(self, channels: int, token_dim: int, squeeze: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Linear(token_dim, token_dim // squeeze)
        self.expand = nn.Linear(token_dim // squeeze, 2 * channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """(B, C, H, W) and its token (B, D) -> (B, C, H, W)."""
        theta = hard_sigmoid(self.expand(F.relu(self.reduce(token))))
        a, b = theta[:, :, None, None].chunk(2, dim=1)
        return torch.maximum(x * (2 * a), x * (2 * b - 1))


class SamePad(nn.Module):
    """TensorFlow's SAME padding of a strided window: as many outputs as ceil(size / stride), the odd zero last.

    For a 3x3 kernel of stride 2 a map of even size gets zeros below and right only, one of odd size all round.
    """

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def extra_repr(self) -> str:
        """The arguments, for the module's repr."""
        return f"{self.kernel_size}, stride={self.stride}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same with zeros around it."""
        (top, bottom), (left, right) = self._split(x.shape[2]), self._split(x.shape[3])
        return F.pad(x, (left, right, top, bottom))

    def _split(self, size: int) -> tuple[int, int]:
        outputs = -(-size // self.stride)
        zeros = max((outputs - 1) * self.stride + self.kernel_size - size, 0)
        return zeros // 2, zeros - zeros // 2


def init_weights_(model: nn.Module) -> None:
    """Initialize in place: convolutions N(0, 2 / fan-out), Linear N(0, 0.01^2), biases 0; norms keep 1 and 0.

    The fan-out of a grouped convolution is that of one group. Source: He et al. 2015, arXiv 1502.01852, section 2.2,
    backward case. None of the three papers states an initialization; this one is what public re-trainings use.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def set_norm_statistics_(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every BatchNorm to those of `images` (B, C, H, W), in place; eval mode afterwards.

    At random initialization the maps of a deep network shrink or grow from layer to layer; with these they do not.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # one batch is the whole statistic
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


# ---------------------------------------------------------------------------------------- heads


class Head(nn.Module, ABC):
    """The end of a classifier: `pool` makes (B, num_features) of the last state, `fc` makes logits of that."""

    fc: nn.Module
    dropout: nn.Dropout

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.fc = nn.Linear(num_features, num_classes) if num_classes else nn.Identity()

    @property
    def num_classes(self) -> int:
        """N, or 0 where the head ends in features."""
        return self.fc.out_features if isinstance(self.fc, nn.Linear) else 0

    @abstractmethod
    def pool(self, state: BlockState) -> Tensor:
        """The last state -> (B, num_features)."""

    def forward(self, state: BlockState, pre_logits: bool = False) -> Tensor:
        """The last state -> (B, N), or (B, num_features) with `pre_logits` or without classes."""
        pooled = self.pool(state)
        if pre_logits:
            return pooled
        logits: Tensor = self.fc(pooled)
        return logits


class PooledHead(Head):
    """Global average pooling, dropout, one Linear."""

    def __init__(self, num_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(num_features, num_classes)
        self.dropout = nn.Dropout(dropout)

    def pool(self, state: BlockState) -> Tensor:
        """The mean over the map: (B, C, H, W) -> (B, C)."""
        pooled: Tensor = self.dropout(_map_of(state).mean((2, 3)))
        return pooled


def set_dropout_(model: nn.Module, p: float) -> None:
    """Set the dropout before the last layer, in place. Raises BadArgument where there is no head."""
    if not isinstance(model, Classifier) or not isinstance(model.head, Head):
        raise BadArgument(f"dropout needs a network with a head of ours, not a {type(model).__name__}")
    model.head.dropout.p = p


def _map_of(state: BlockState) -> Tensor:
    """The map (B, C, H, W) of a state."""
    return state if isinstance(state, Tensor) else state[0]


# ------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class FeatureMap:
    """A feature map of a network: its channels, its reduction (input size / map size), the module that ends in it."""

    num_chs: int
    reduction: int
    module: str


class Classifier(nn.Module):
    """Images (B, C, H, W) -> logits (B, N): a stem, stages in series, a head.

    `features` names, for each reduction, the last module that gives it: "stem" or "stages.<i>", in order of depth.
    """

    stem: nn.Module
    stages: nn.Sequential
    head: Head

    def __init__(self, stem: nn.Module, stages: nn.Sequential, head: Head, features: Sequence[FeatureMap]) -> None:
        super().__init__()
        self.stem, self.stages, self.head = stem, stages, head
        self.features = tuple(features)

    @property
    def feature_info(self) -> list[dict[str, int | str]]:
        """The feature maps as dicts with the keys num_chs, reduction, module."""
        return FeatureInfo(self.features).get_dicts()

    @property
    def num_features(self) -> int:
        """Number of features that the last Linear takes."""
        return self.head.num_features

    @property
    def num_classes(self) -> int:
        """N, or 0 where the network ends in features."""
        return self.head.num_classes

    def __repr__(self) -> str:
        """One line a stage; `torch.nn.Module.__repr__(model)` shows every layer."""
        maps = {f.module: f"{f.num_chs} channels at 1/{f.reduction}, " for f in self.features}
        stages = [("stem", self.stem), *((f"stages.{name}", stage) for name, stage in self.stages.named_children())]
        parts = [(name, part, maps.get(name, "")) for name, part in stages]
        parts.append(("head", self.head, f"{self.num_features} -> {self.num_classes or 'features'}, "))
        lines = [f"  {name}: {text}{_num_parameters(part):,} parameters" for name, part, text in parts]
        return "\n".join([f"{type(self).__name__}(  # {_num_parameters(self):,} parameters", *lines, ")"])

    def forward_features(self, x: Tensor) -> BlockState:
        """Images -> the last state, before any pooling."""
        state: BlockState = self.stages(self.stem(x))
        return state

    def forward_head(self, x: BlockState, pre_logits: bool = False) -> Tensor:
        """The last state -> logits, or with `pre_logits` the features (B, num_features) that the last Linear takes."""
        logits: Tensor = self.head(x, pre_logits)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last Linear, or an Identity where there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last Linear by a new one for `num_classes`; 0 ends the network in its pooled features."""
        if num_classes < 0:
            raise BadArgument(f"num_classes must be 0 (pooled features) or more, not {num_classes}")
        like = next(self.parameters())
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_weights_(fc)
        self.head.fc = fc.to(like.device, like.dtype).train(self.training)


class FeatureNet(nn.Module):
    """Images -> the maps at `out_indices` of a classifier's features, in that order.

    It shares the classifier's modules up to the deepest map, and has none of the others. Raises BadArgument.
    """

    def __init__(self, net: Classifier, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        chosen = range(len(net.features)) if out_indices is None else out_indices
        if not chosen or any(not -len(net.features) <= i < len(net.features) for i in chosen):
            raise BadArgument(f"out_indices must be some of 0..{len(net.features) - 1}, not {list(chosen)}")
        features = tuple(net.features[i] for i in chosen)
        deepest = max(_depth(feature) for feature in features)
        self.stem, self.stages = net.stem, net.stages[:deepest]
        self.features = features

    @property
    def feature_info(self) -> FeatureInfo:
        """A description of the maps, in their order."""
        return FeatureInfo(self.features)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> one map for each of `feature_info`."""
        state = self.stem(x)
        maps = [_map_of(state)]
        for stage in self.stages.children():
            state = stage(state)
            maps.append(_map_of(state))
        return [maps[_depth(feature)] for feature in self.features]


@dataclass(frozen=True)
class FeatureInfo:
    """A description of the feature maps of a network; the methods are those of timm's FeatureInfo."""

    features: tuple[FeatureMap, ...]

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [feature.num_chs for feature in self.features]

    def reduction(self) -> list[int]:
        """Input pixels that one pixel of each map spans."""
        return [feature.reduction for feature in self.features]

    def module_name(self) -> list[str]:
        """The module that ends in each map."""
        return [feature.module for feature in self.features]

    def get_dicts(self) -> list[dict[str, int | str]]:
        """Each map as a dict with the keys num_chs, reduction, module."""
        return [{"num_chs": f.num_chs, "reduction": f.reduction, "module": f.module} for f in self.features]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _depth(feature: FeatureMap) -> int:
    """Number of stages to run for this map; 0 for that of the stem."""
    return 0 if feature.module == "stem" else int(feature.module.removeprefix("stages.")) + 1
