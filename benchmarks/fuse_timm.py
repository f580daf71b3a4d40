"""Are networks of timm fused right, or left alone with a name? Random initialization, norm statistics settled.

    python benchmarks/fuse_timm.py [NAME ...] --out benchmarks/results/DATE-fuse-timm.jsonl

For each network: norms before and after, what was left and why, the drift in float32 and in float64 on images that the
fuse has not seen, the bound by the network's own rounding, and the seconds that it took. A line a network, appended.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

from onefold.commands.timm_networks import open_timm
from onefold.reparam import UnfoldedWarning, drift, fuse, unfused_norms
from onefold.reparam.drift import float64_drift

NAMES = (
    *("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "mobilenetv1_100"),
    *("mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small", "tf_mobilenetv3_small_075"),
    *("tf_efficientnet_lite0", "mnasnet_small", "efficientnet_b0", "ghostnet_050", "lcnet_050", "hardcorenas_a"),
    *("fbnetc_100", "resnet18", "resnet26d", "seresnet18", "regnetx_002", "regnety_002", "dla46_c", "densenet121"),
    *("convmixer_768_32", "cspresnet50", "levit_128s", "xception41p", "inception_v3", "hrnet_w18_small"),
    *("mobilevit_xxs", "ese_vovnet19b_dw"),
)


def examined(name: str) -> dict[str, object]:
    """Fuse one network and measure what came of it."""
    model, card = open_timm(f"timm:{name}")
    size = int(dict(card.preprocessing)["size"])
    images = torch.randn(1, card.in_chans, size, size, generator=torch.Generator().manual_seed(7))
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fused = fuse(model)
    seconds = time.perf_counter() - started
    said = [str(each.message) for each in caught if issubclass(each.category, UnfoldedWarning)]
    exact, allowed = float64_drift(model, fused, (images,))
    return {
        "network": f"timm:{name}",
        "norms": len(unfused_norms(model)),
        "left": len(unfused_norms(fused)),
        "drift": drift(model, fused, images),
        "drift_float64": exact,
        "allowed": allowed,
        "right": exact <= allowed,
        "said": " ".join(said),
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
    }


def main() -> None:
    """Examine the networks that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    order = parser.parse_args()
    torch.set_num_threads(1)
    for name in order.names:
        line = json.dumps(examined(name))
        print(line, flush=True)
        with order.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
