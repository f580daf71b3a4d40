"""Images and labels: finding, decoding, preprocessing, augmenting, batching. Nothing here knows a network.

What makes batches of tensors is imported when it is first used: an artifact predicts photos without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onefold.data.augmentation import Augment as Augment
from onefold.data.augmentation import CentreCrop as CentreCrop
from onefold.data.augmentation import ColorJitter as ColorJitter
from onefold.data.augmentation import HorizontalFlip as HorizontalFlip
from onefold.data.augmentation import RandomAffine as RandomAffine
from onefold.data.augmentation import RandomErasing as RandomErasing
from onefold.data.augmentation import RandomResizedCrop as RandomResizedCrop
from onefold.data.augmentation import RandomShift as RandomShift
from onefold.data.augmentation import Resize as Resize
from onefold.data.autoaugment import AutoAugment as AutoAugment
from onefold.data.autoaugment import RandAugment as RandAugment
from onefold.data.curriculum import Curriculum as Curriculum
from onefold.data.curriculum import ProgressiveAugment as ProgressiveAugment
from onefold.data.curriculum import Stage as Stage
from onefold.data.dataset import Dataset as Dataset
from onefold.data.dataset import DatasetSplits as DatasetSplits
from onefold.data.dataset import Subset as Subset
from onefold.data.dataset import open_dataset as open_dataset
from onefold.data.dataset import read_dataset as read_dataset
from onefold.data.dataset_info import DatasetInfo as DatasetInfo
from onefold.data.dataset_info import LeftOut as LeftOut
from onefold.data.dataset_info import SplitInfo as SplitInfo
from onefold.data.folders import ImageFiles as ImageFiles
from onefold.data.folders import find_images as find_images
from onefold.data.mixup import Mixing as Mixing
from onefold.data.preprocessing import IMAGENET_MEAN as IMAGENET_MEAN
from onefold.data.preprocessing import IMAGENET_STD as IMAGENET_STD
from onefold.data.preprocessing import Preprocessing as Preprocessing

if TYPE_CHECKING:
    from onefold.data.loader import CachedDataset as CachedDataset
    from onefold.data.loader import ImageLoader as ImageLoader
    from onefold.data.loader import MixupLoader as MixupLoader

_LOADERS = {"CachedDataset": "loader", "ImageLoader": "loader", "MixupLoader": "loader"}
__all__ = [  # for `import *`, which asks no __getattr__
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "AutoAugment",
    "CachedDataset",
    "CentreCrop",
    "ColorJitter",
    "Curriculum",
    "Dataset",
    "DatasetInfo",
    "DatasetSplits",
    "HorizontalFlip",
    "ImageFiles",
    "ImageLoader",
    "LeftOut",
    "Mixing",
    "MixupLoader",
    "Preprocessing",
    "ProgressiveAugment",
    "RandAugment",
    "RandomAffine",
    "RandomErasing",
    "RandomResizedCrop",
    "RandomShift",
    "Resize",
    "SplitInfo",
    "Stage",
    "Subset",
    "find_images",
    "open_dataset",
    "read_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _LOADERS:
        raise AttributeError(f"module 'onefold.data' has no attribute {name!r}")
    return getattr(import_module(f"onefold.data.{_LOADERS[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
