"""200 SGD steps of MobileOne-S0 on real photos, branch by branch and by moments: do they learn the same?

    python benchmarks/same_losses.py run per_branch|flipped|moments --data ../shared/data/imagenette-224-subset
    python benchmarks/same_losses.py report

`flipped` is `per_branch` with the images of every batch in reverse: the same mathematics, summed in another order.
How far its losses part from those of `per_branch` is how far rounding alone takes them. At the end each network is
fused and answers the validation photos. One thread; the three runs can go side by side. Results go beside this file.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from onefold import create_model, fuse
from onefold.reparam import moments, per_branch, set_route_

STEPS, BATCH, SIZE, RATE = 200, 16, 128, 0.05
RESULTS = Path(__file__).parent / "results"


def photos(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, SIZE, SIZE) in channels_last, and labels by folder name."""
    images, names = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg")):
                photo = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB").resize((SIZE, SIZE))
                images.append(torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1))
                names.append(Path(member.name).parent.name)
    classes = sorted(set(names))
    x = torch.stack(images).float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
    return x, torch.tensor([classes.index(name) for name in names])


def run(kind: str, data: Path) -> None:
    torch.set_num_threads(1)
    x, y = photos(data / "train.tar")
    torch.manual_seed(0)
    model = set_route_(create_model("mobileone_s0", num_classes=10), moments if kind == "moments" else per_branch)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    order = torch.cat([torch.randperm(len(x)) for _ in range(-(-STEPS * BATCH // len(x)))])
    losses = []
    for step in range(STEPS):
        picks = order[step * BATCH : (step + 1) * BATCH]
        picks = picks.flip(0) if kind == "flipped" else picks
        loss = F.cross_entropy(model(x[picks]), y[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    fused = fuse(model.eval())
    x, y = photos(data / "val.tar")
    with torch.no_grad():
        right = sum((fused(a).argmax(1) == b).sum().item() for a, b in zip(x.split(50), y.split(50), strict=True))
    path = RESULTS / f"same-losses-{kind}.json"
    path.write_text(json.dumps({"losses": losses, "fused_top1": 100 * right / len(y), "photos": len(y)}) + "\n")


def report() -> None:
    runs = {
        kind: json.loads((RESULTS / f"same-losses-{kind}.json").read_text())
        for kind in ("per_branch", "flipped", "moments")
    }
    base = np.array(runs["per_branch"]["losses"])
    print(f"{'':10}{'loss: first 20':>16}{'last 20':>10}{'fused top-1':>13}   loss - per_branch's, mean |.| over steps")
    for kind, result in runs.items():
        losses = np.array(result["losses"])
        gaps = [abs(losses - base)[a:b].mean() for a, b in ((0, 5), (5, 20), (20, 50), (50, 100), (100, 200))]
        words = "  ".join(f"{gap:.1e}" for gap in gaps)
        print(f"{kind:10}{losses[:20].mean():16.4f}{losses[-20:].mean():10.4f}{result['fused_top1']:11.1f} %   {words}")
    print(f"{'':52}steps 1-5, 6-20, 21-50, 51-100, 101-200")


if __name__ == "__main__":
    words = sys.argv[1:] or ["report"]
    report() if words[0] == "report" else run(words[1], Path(words[words.index("--data") + 1]))
