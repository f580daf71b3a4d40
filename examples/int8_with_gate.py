"""Train, fuse, calibrate int8, export to ONNX Runtime, and deploy behind a gate on accuracy.

    python examples/int8_with_gate.py [PHOTOS]

PHOTOS holds one folder a class; without it scikit-learn's digits are used. Needs the extras digits, onnx and report.
"""

import sys
import tempfile
from pathlib import Path

import onefold
from onefold.bench import Procedure
from onefold.commands.calibration import Calibration
from onefold.commands.deploy import DeployOptions, deploy
from onefold.commands.fuse import fuse
from onefold.commands.train import start_run
from onefold.errors import GateFailed
from onefold.recipes import recipe_for

MAX_DROP = 2.0  # percent points of top-1 that int8 may lose against the float network


def main(photos: str = "digits") -> None:
    """Export int8 by hand first, then let `deploy` do all of it and decide."""
    out = Path(tempfile.mkdtemp(prefix="onefold-"))
    if photos == "digits":
        recipe = recipe_for("digits:w025", {}, epochs=10)
    else:
        recipe = recipe_for("photos:scratch", {"data.spec": photos, "model": "mobilenetv1_025"}, size=64, epochs=10)
    print(f"top-1 {start_run(recipe, out / 'run').top1:.1f} % on held-out images, unfused, in fp32")
    fused = fuse(out / "run", out / "fused.safetensors")
    print(f"fused: drift {fused.drift:.1e}")

    # The ranges of activations come from 64 images of the kind that the network will see.
    artifact = onefold.export(fused.path, "onnx", out=out / "artifacts", precision="int8", data=photos, calibrate=64)
    with onefold.load(artifact.folder) as session:  # loading compares its logits with the int8 network's in PyTorch
        print(f"exported {artifact.folder.name}: {artifact.parity.difference:.1e} from PyTorch; opened {session}")

    order = DeployOptions(
        runtimes=["onnx"],
        precisions=["fp32", "int8"],
        calibration=Calibration(data=photos, count=64),
        max_drop=MAX_DROP,
        procedure=Procedure(samples=20, warmup_seconds=0.05),
    )
    try:
        deployed = deploy(fused.path, out / "deploy", order, say=print)
    except GateFailed as error:
        raise SystemExit(f"not to be shipped: {error}") from error
    print(
        f"passed: no artifact loses more than {MAX_DROP:g} points; {deployed.folder / 'README.md'} says which to take"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
