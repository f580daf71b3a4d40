"""Where a trained network runs: export it, open what was exported, load it.

    artifact = export(model, (3, 224, 224), "artifacts/onnx-fp32", runtime="onnx", about=About(model="...", fused=True))
    with load("artifacts/onnx-fp32", threads=2) as session:
        logits = session(images)

What `export` leaves explains itself: a README.md with code that loads it without onefold (docs/artifacts.md).
No runtime's own package, and not torch either, is imported before it is used.
"""

from onefold.runtimes.artifact import About as About
from onefold.runtimes.artifact import Artifact as Artifact
from onefold.runtimes.artifact import Parity as Parity
from onefold.runtimes.base import RUNTIMES as RUNTIMES
from onefold.runtimes.base import Runtime as Runtime
from onefold.runtimes.base import Session as Session
from onefold.runtimes.base import find_runtime as find_runtime
from onefold.runtimes.profile import Layer as Layer
from onefold.runtimes.profile import Profile as Profile
from onefold.runtimes.profile import profile as profile
from onefold.runtimes.verbs import TOLERANCES as TOLERANCES
from onefold.runtimes.verbs import UnfusedWarning as UnfusedWarning
from onefold.runtimes.verbs import export as export
from onefold.runtimes.verbs import load as load
from onefold.runtimes.verbs import open_artifact as open_artifact
