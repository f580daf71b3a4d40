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

from onefold.commands.open_network import open_predictor
from onefold.commands.predict import predict
from onefold.commands.train import start_run
from onefold.data import find_images
from onefold.recipes import recipe_for

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
    small = {"model": MODEL, "plan.workers": "0", "plan.batch_size": "16"}
    if weights is None:
        others = make_photos(out / "others", OTHERS)
        scratch = recipe_for("photos:scratch", {**small, "data.spec": str(others)}, size=SIZE, epochs=2)
        weights = str(start_run(scratch, out / "scratch").weights)
    data = Path(photos) if photos is not None else make_photos(out / "photos", COLOURS)
    recipe = recipe_for("photos:finetune", {**small, "data.spec": str(data), "weights": weights}, size=SIZE, epochs=2)
    result = start_run(recipe, out / "finetuned")
    print(f"top-1 {result.top1:.1f} % on {result.count} held-out photos; the run is in {out / 'finetuned'}")

    with open_predictor(out / "finetuned") as predictor:
        for answer in predict(predictor, find_images([data])[:1]):
            _, name, share = answer.best[0]
            print(f"{answer.path.parent.name}/{answer.path.name}: {name} ({share:.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:3])
