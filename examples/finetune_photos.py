"""Fine-tune a network on class folders of photos, and ask it about one of them.

    python examples/finetune_photos.py [PHOTOS] [WEIGHTS]

PHOTOS holds one folder a class. WEIGHTS is a run, a file, or an id of the hub such as timm/mobileone_s1.apple_in1k (for
which MODEL and SIZE below are to be changed). Without them the script makes noise of three colours, and weights by a
short training from scratch on noise of three others.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import onefold

MODEL, SIZE = "mobilenetv1_025", 32
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
OTHERS = {"yellow": (200, 200, 60), "cyan": (60, 200, 200), "magenta": (200, 60, 200)}


def make_photos(folder: Path, colours: dict[str, tuple[int, int, int]], count: int = 40) -> Path:
    """Write `count` images of coarse noise around each colour, 48 x 48, one folder a class."""
    rng = np.random.default_rng(0)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            coarse = np.clip(rng.normal(colour, 50, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((48, 48)).save(folder / name / f"{number:03}.png")
    return folder


def main(photos: str | None = None, weights: str | None = None) -> None:
    """Fine-tune by the recipe photos:finetune, with a few of its fields changed."""
    out = Path(tempfile.mkdtemp(prefix="onefold-"))
    small = {"model": MODEL, "img_size": SIZE, "epochs": 2, "batch_size": 16, "changes": {"plan.workers": 0}}
    if weights is None:
        others = make_photos(out / "others", OTHERS)
        weights = str(onefold.train(others, out=out / "scratch", **small).folder)
    data = Path(photos) if photos is not None else make_photos(out / "photos", COLOURS)
    run = onefold.train(data, recipe="photos:finetune", weights=weights, out=out / "finetuned", **small)
    best = run.best
    print(f"top-1 {best.top1:.1f} % on {best.count} held-out photos; the run is in {run.folder}")

    photo = next(path for path in sorted(data.rglob("*")) if path.is_file())
    print(f"{photo.parent.name}/{run.predict(photo)[0].path.name}: {run.predict(photo).names[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
