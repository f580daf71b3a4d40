"""Fuse a network of timm, and check that it still gives the same answer.

    python examples/fuse_timm_network.py [PHOTOS] [NAME]

Without a folder of photos the images are noise. The weights are random, so that nothing is downloaded: for trained ones
pass `timm.create_model(NAME, pretrained=True)` to `onefold.fuse`, or NAME@FILE here.
"""

import sys

import numpy as np
import torch

import onefold
from onefold.commands.timm_networks import open_timm
from onefold.data import Preprocessing, find_images
from onefold.data.decode import decode_image
from onefold.errors import MissingExtra

LARGEST_DRIFT = 1e-4  # rounding gives about 1e-6, a fold that is wrong 1e-2


def main(photos: str | None = None, name: str = "mobileone_s0") -> None:
    """Fuse, measure the drift, and print both sizes."""
    try:
        model, card = open_timm(f"timm:{name}")
    except MissingExtra as error:
        print(f"Skipped: {error}")
        return
    preprocessing = Preprocessing.from_dict(card.preprocessing)
    images = torch.randn(2, preprocessing.channels, preprocessing.size, preprocessing.size)
    if photos is not None:
        images = torch.from_numpy(np.stack([preprocessing(decode_image(path)) for path in find_images([photos])[:8]]))

    fused = onefold.fuse(model)
    drift = onefold.drift(model, fused, images)
    for title, network in (("unfused", model), ("fused", fused)):
        parameters, layers = sum(p.numel() for p in network.parameters()), len(list(network.modules()))
        print(f"{name} {title:8} {parameters:>11,} parameters in {layers} modules")
    print(f"drift {drift:.1e}; norms left: {onefold.unfused_norms(fused) or 'none'}")
    if drift > LARGEST_DRIFT:
        raise SystemExit(f"the fused network gives another answer: {drift:.1e} is more than {LARGEST_DRIFT:.0e}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
