"""What is written to disk, against tests/golden/files.json: fused weights, a checkpoint, an artifact for each runtime.

Digests are compared where nothing but this project decides them: weights are dyadic numbers, folding is float64 and
rounded once. A vendor's file is compared byte for byte where its packages have the versions that the golden was made
with, and by its manifest, its set of files and its answers everywhere.
`python tests/test_golden_files.py` writes the golden anew, with every runtime that is installed here; or
only the artifacts of those named: `python tests/test_golden_files.py onnx`.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from onefold.errors import MissingExtra
from onefold.quantize import MINMAX_METHOD, quantize
from onefold.reparam import Chain, Sum, fuse
from onefold.runtimes import RUNTIMES, ModelInfo, export, import_runtime
from onefold.train import Checkpoint
from training_kit import PLAN, StoppedError, fresh, stop_at

GOLDEN = Path(__file__).parent / "golden" / "files.json"
CLASSES = ("ant", "bee", "caf\u00e9")
CASES = [
    (name, precision)
    for name in RUNTIMES
    for precision in ("fp32", "int8")
    if precision in import_runtime(name).PRECISIONS
]
SLOW = ("openvino", "executorch", "litert", "coreml")


def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def dyadic(shape: tuple[int, ...], source: np.random.Generator, low: int = -63, high: int = 64) -> Tensor:
    """Multiples of 1/64: their products and short sums are exact, on any processor."""
    return torch.from_numpy(source.integers(low, high, shape).astype(np.float32) / 64)


def unit(c_in: int, c_out: int, groups: int = 1) -> Sum:
    return Sum(
        Chain(nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(c_out)),
        Chain(nn.Conv2d(c_in, c_out, 1, groups=groups, bias=False), nn.BatchNorm2d(c_out)),
    )


def network() -> nn.Module:
    """Two units of branches, a plain layer with stride and a classifier, in eval mode."""
    model = nn.Sequential(
        unit(3, 8),
        nn.ReLU(),
        unit(8, 8, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, len(CLASSES)),
    )
    source = np.random.default_rng(3)
    state = model.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            positive = name.endswith("running_var") or (value.dim() == 1 and name.endswith("1.weight"))
            state[name] = dyadic(tuple(value.shape), source, *((32, 128) if positive else (-63, 64)))
    model.load_state_dict(state)
    return model.eval()


def images(count: int) -> Tensor:
    return dyadic((count, 3, 16, 16), np.random.default_rng(4))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def form(value: Any) -> Any:
    """JSON with the kind in place of each value: which keys there are, and what they hold."""
    if isinstance(value, dict):
        return {key: form(inner) for key, inner in value.items()}
    return [form(inner) for inner in value[:1]] if isinstance(value, list) else type(value).__name__


# ---- fused weights ---------------------------------------------------------------------------------------------------


def fused_weights() -> dict[str, list[Any]]:
    """Name -> type, shape and digest of each tensor of the fused network."""
    state = fuse(network()).state_dict()
    return {name: [str(t.dtype), list(t.shape), digest(t.numpy().tobytes())] for name, t in state.items()}


def test_fused_weights_have_the_same_bits_everywhere() -> None:
    assert fused_weights() == golden()["fused"]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_form(run: Path) -> dict[str, Any]:
    """The files of the sealed folders of a run: keys of JSON, and name, type and shape of tensors."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.suffix == ".json":
            found[name] = form(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                slices = {key: tensors.get_slice(key) for key in sorted(tensors.keys())}
            found[name] = {key: f"{part.get_dtype()} {part.get_shape()}" for key, part in slices.items()}
        elif path.name == "log.jsonl":
            found[name] = [form(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return found


def a_run(folder: Path) -> Path:
    """A run stopped in its second epoch, so that every part of a checkpoint has something to hold."""
    with pytest.raises(StoppedError):
        fresh(folder, PLAN, on_progress=stop_at(2, 3))
    return folder


def test_a_checkpoint_has_its_files_keys_types_and_shapes(tmp_path: Path) -> None:
    assert checkpoint_form(a_run(tmp_path / "run")) == golden()["checkpoint"]


def test_a_training_gives_the_same_bits_again_and_when_it_was_stopped(tmp_path: Path) -> None:
    plan = replace(PLAN, epochs=2)
    first, second = fresh(tmp_path / "first", plan), fresh(tmp_path / "second", plan)
    assert first.digest() == second.digest()
    with pytest.raises(StoppedError):
        fresh(tmp_path / "third", plan, on_progress=stop_at(2, 3))
    third = fresh(tmp_path / "third", plan, resume=True)
    assert third.digest() == first.digest() == Checkpoint.load(tmp_path / "third").digest()
    assert losses(tmp_path / "third") == losses(tmp_path / "first")


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["epoch"]: line["loss"] for line in lines if line["kind"] == "epoch"}


# ---- artifacts -------------------------------------------------------------------------------------------------------


def operations(folder: Path) -> dict[str, int]:
    """How often each operation stands in the graph, where its file says so in text or in ONNX."""
    found: list[str] = []
    for path in folder.glob("model.*"):
        if path.suffix == ".onnx":
            onnx = pytest.importorskip("onnx")
            found += [node.op_type for node in onnx.load(path).graph.node]
        elif path.suffix == ".xml":
            found += re.findall(r'<layer [^>]*type="(\w+)"', path.read_text(encoding="utf-8"))
        elif path.suffix == ".param":
            found += re.findall(r"^([A-Z]\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return dict(sorted(Counter(found).items()))


def artifact_facts(folder: Path, runtime: str, precision: str) -> dict[str, Any]:
    """The manifest but for what changes with versions, the digests of the model's files, the reference's logits."""
    model = fuse(network())
    info = ModelInfo(
        model="dyadic",
        fused=True,
        drift=0.0,
        classes=CLASSES,
        preprocessing={"size": 16, "mean": [0.5, 0.5, 0.5]},
        licence="Apache-2.0",
        source="tests",
    )
    made = (
        quantize(model, images(16), replace(MINMAX_METHOD, power_of_two_scales=True)) if precision == "int8" else model
    )
    export(made, images(2).numpy(), folder, runtime=runtime, info=info, precision=precision)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.startswith("model.")}
    names = sorted(path.name for path in folder.iterdir())
    with np.load(folder / "reference.npz") as reference:
        logits = reference["logits"].tolist()
    parity = manifest["parity"]
    made_with = {name: version for name, version in manifest["made_with"].items() if name != "onefold"}
    for key in ("files", "made_with", "sha256"):
        del manifest[key]
    manifest["parity"] = None if parity is None else {**parity, "difference": "float"}
    return {
        "manifest": manifest,
        "names": names,
        "operations": operations(folder),
        "logits": logits,
        "made_with": made_with,
        "digests": files,
    }


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in CASES],
)
def test_an_artifact_is_what_the_golden_says(runtime: str, precision: str, tmp_path: Path) -> None:
    try:
        now = artifact_facts(tmp_path / "artifact", runtime, precision)
    except MissingExtra as error:
        pytest.skip(str(error))
    then = golden()["artifacts"].get(f"{runtime}-{precision}")
    assert then is not None, f"python tests/test_golden_files.py {runtime}"
    assert now["manifest"] == then["manifest"]
    assert now["names"] == then["names"]
    np.testing.assert_allclose(now["logits"], then["logits"], rtol=1e-5, atol=1e-6)
    if now["made_with"] == then["made_with"]:
        assert now["operations"] == then["operations"]
        assert {name: now["digests"][name] for name in then["digests"]} == then["digests"]


# ---- writing it anew -------------------------------------------------------------------------------------------------


def main(runtimes: list[str]) -> None:
    torch.set_num_threads(1)
    found = golden() if GOLDEN.exists() else {"artifacts": {}}
    with tempfile.TemporaryDirectory() as folder:
        found |= {"fused": fused_weights(), "checkpoint": checkpoint_form(a_run(Path(folder) / "run"))}
        for runtime, precision in CASES:
            if runtime not in (runtimes or RUNTIMES):
                continue
            name = f"{runtime}-{precision}"
            try:
                first, second = (artifact_facts(Path(folder) / f"{name}-{i}", runtime, precision) for i in (1, 2))
            except MissingExtra as error:
                sys.stdout.write(f"{name}: {error}\n")
                continue
            same = {file: value for file, value in first["digests"].items() if second["digests"][file] == value}
            sys.stdout.write(f"{name}: {len(same)} of {len(first['digests'])} files are deterministic\n")
            found["artifacts"][name] = {**first, "digests": same}
            GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
