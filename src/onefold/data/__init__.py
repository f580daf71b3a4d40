"""Images and labels: finding, decoding, preprocessing, augmenting, batching. Nothing here knows a network."""

from onefold.data.augment import Augment as Augment
from onefold.data.augment import CentreCrop as CentreCrop
from onefold.data.augment import HorizontalFlip as HorizontalFlip
from onefold.data.augment import RandomAffine as RandomAffine
from onefold.data.augment import RandomResizedCrop as RandomResizedCrop
from onefold.data.augment import RandomShift as RandomShift
from onefold.data.augment import Resize as Resize
from onefold.data.augment import Step as Step
from onefold.data.decode import decode as decode
from onefold.data.decode import printable as printable
from onefold.data.folders import Files as Files
from onefold.data.folders import find_images as find_images
from onefold.data.images import IMAGENET as IMAGENET
from onefold.data.images import IMAGENET_MEAN as IMAGENET_MEAN
from onefold.data.images import IMAGENET_STD as IMAGENET_STD
from onefold.data.images import Preprocessing as Preprocessing
from onefold.data.loader import Batches as Batches
from onefold.data.loader import Transform as Transform
from onefold.data.sources import Cached as Cached
from onefold.data.sources import Source as Source
from onefold.data.sources import Subset as Subset
from onefold.data.sources import fingerprint as fingerprint
from onefold.data.sources import open_source as open_source
