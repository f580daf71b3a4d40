"""Train, fuse, calibrate int8, export to ONNX Runtime, and deploy behind a gate on accuracy.

    python examples/int8_with_gate.py [PHOTOS]

PHOTOS holds one folder a class; without it scikit-learn's digits are used. Needs the extras digits, onnx and report.
"""

import sys
import tempfile
from pathlib import Path

import onefold
from onefold.errors import GateFailed

MAX_DROP = 2.0  # percent points of top-1 that int8 may lose against the float network


def main(photos: str = "digits") -> None:
    """Export int8 by hand first, then let `deploy` do all of it and decide."""
    out = Path(tempfile.mkdtemp(prefix="onefold-"))
    if photos == "digits":
        run = onefold.train("digits", recipe="digits:w025", epochs=10, out=out / "run")
    else:
        run = onefold.train(photos, model="mobilenetv1_025", img_size=64, epochs=10, out=out / "run")
    print(f"top-1 {run.best.top1:.1f} % on held-out images, unfused, in fp32")
    fused = run.fuse(out / "fused.safetensors")
    print(f"fused: drift {fused.drift:.1e}")

    # The ranges of activations come from 64 images of the kind that the network will see.
    artifact = fused.export("onnx", precision="int8", data=photos, calibrate=64, out=out / "artifacts")
    with onefold.load(artifact) as session:  # loading compares its logits with those of the int8 network in PyTorch
        print(f"exported {artifact.folder.name}: {artifact.parity.difference:.1e} from PyTorch; opened {session}")

    try:
        deployed = onefold.deploy(
            fused, photos, int8=True, calibrate=64, max_drop=MAX_DROP, samples=20, out=out / "deploy", say=print
        )
    except GateFailed as error:
        raise SystemExit(f"not to be shipped: {error}") from error
    for gate in deployed.undecided:  # the photos are too few to tell
        print(f"undecided: {gate.sentence}")
    if not deployed.undecided:
        print(f"passed: no artifact loses more than {MAX_DROP:g} points")
    print(f"{deployed.folder / 'README.md'} says which to take")


if __name__ == "__main__":
    main(*sys.argv[1:2])
