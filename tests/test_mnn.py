"""What MNN has of its own: a converter whose wrapper must never be imported, and weights in 16 bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from available_runtimes import require
from onefold.errors import BadArgument
from onefold.runtimes import ModelInfo, export, load
from onefold.runtimes import mnn as runtime
from onefold.runtimes.reference_logits import make_reference_images

require("mnn")
SHAPE = (3, 16, 16)
INFO = ModelInfo(model="small", fused=True)


def small() -> nn.Module:
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5)).eval()


ALONE = """
import socket, subprocess, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
def refuse(*_): raise SystemExit("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from test_mnn import INFO, SHAPE, small
from onefold.runtimes import export, load
asked = []
start = subprocess.Popen.__init__
def watched(self, call, *rest, **how):
    asked.append(call)
    start(self, call, *rest, **how)
subprocess.Popen.__init__ = watched
import os
os.system = refuse
with load(export(small(), SHAPE, sys.argv[2], runtime="mnn", info=INFO)) as session:
    assert session(np.zeros((1, *SHAPE), np.float32)).shape == (1, 5)
assert len(asked) == 1 and asked[0][0] == sys.executable and "mnnconvert" in asked[0][2]
assert not [name for name in sys.modules if name.startswith(("MNN.tools", "aliyun"))]
"""


def test_nothing_is_reported_to_its_makers_and_nothing_installed(tmp_path: Path) -> None:
    """In a process of its own, where pip would leave a mark, and where both of its halves must not call outside."""
    for name in ("pip", "pip3", "mnnconvert"):
        fake = tmp_path / name
        fake.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        fake.chmod(0o755)
    (tmp_path / "home").mkdir()
    place = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path / "home")}
    call = [sys.executable, "-c", ALONE, str(Path(__file__).parent), str(tmp_path / "out")]
    done = subprocess.run(call, env=os.environ | place, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "called").exists()
    written = {path.relative_to(tmp_path / "home").parts[:2] for path in (tmp_path / "home").rglob("*")}
    assert written <= {(".cache",), (".cache", "onefold")}  # ours: which artifacts were made here


def test_the_converters_process_imports_no_wrapper() -> None:
    code = (
        runtime._CONVERT.split(";")[0]
        + "; sys.exit(any(name.split('.')[0] in ('MNN', 'aliyun') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def answer(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(x)).numpy()


def test_16_bits_halve_the_file_and_keep_the_answer(tmp_path: Path) -> None:
    x = make_reference_images(SHAPE, num_images=4, seed=1)
    expected = {"fp32": answer(small(), x), "fp16": answer(small().half().float(), x)}
    sizes, errors = {}, {}
    for precision in ("fp32", "fp16"):
        artifact = export(small(), SHAPE, tmp_path / precision, runtime="mnn", info=INFO, precision=precision)
        sizes[precision] = artifact.files["model.mnn"].num_bytes
        with load(artifact) as session:
            errors[precision] = np.abs(session(x) - expected[precision]).max() / np.abs(expected[precision]).max()
    num_weights = sum(p.numel() for p in small().parameters() if p.dim() > 1)
    assert sizes["fp32"] - sizes["fp16"] > 1.5 * num_weights
    assert errors["fp32"] < 1e-5
    assert errors["fp16"] < (1e-5 if platform.machine() == "x86_64" else 0.005)  # ARM computes in 16 bits, too
    assert not np.array_equal(expected["fp16"], expected["fp32"])


def test_8_bits_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="its converter misreads asymmetric QDQ models; choose one of: fp32, fp16"):
        export(small(), SHAPE, tmp_path / "out", runtime="mnn", info=INFO, precision="int8")


@pytest.mark.parametrize("how", ["sys.exit(3)", "sys.exit(0)", "import os; os.abort()"])
def test_a_converter_that_fails_is_told(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that ends its process, as MNN's does, or says nothing and writes nothing."""
    monkeypatch.setattr(runtime, "_CONVERT", f"import sys; print('no such thing', file=sys.stderr, flush=True); {how}")
    with pytest.raises(BadArgument, match=r"mnn cannot take this network: .* ended with status .*no such thing"):
        export(small(), SHAPE, tmp_path / "out", runtime="mnn", info=INFO)
    assert list(tmp_path.iterdir()) == []
