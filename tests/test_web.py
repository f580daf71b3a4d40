"""What ONNX Runtime Web has of its own: a process of Node.js, which can be missing, and can end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from available_runtimes import require
from onefold.errors import LostWorker, MissingExtra
from onefold.runtimes import ModelInfo, export, load
from onefold.runtimes import web as runtime
from onefold.runtimes.reference_logits import make_reference_images

require("web")
SHAPE = (3, 12, 12)


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "fp32"
    return export(small().eval(), SHAPE, folder, runtime="web", info=ModelInfo(model="small", fused=True)).folder


def children() -> set[int]:
    """The processes of Node.js that this one started and has not taken leave of."""
    found = Path("/proc/self/task").glob("*/children")
    return {int(one) for path in found for one in path.read_text().split()}


def test_a_batch_of_any_size_is_answered(folder: Path) -> None:
    x = make_reference_images(SHAPE, num_images=2 * runtime._MAX_BATCH + 3, seed=1)
    with torch.inference_mode():
        expected = small()(torch.from_numpy(x)).numpy()
    with load(folder) as session:
        np.testing.assert_allclose(session(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks at processes through /proc")
def test_a_closed_session_leaves_no_process_and_neither_does_a_forgotten_or_refused_one(folder: Path) -> None:
    before = children()
    session = load(folder)
    assert len(children() - before) == 1
    session.close()
    assert children() == before
    session = load(folder)
    del session
    assert children() == before
    with pytest.raises(RuntimeError, match="protobuf"):
        runtime.load({"model.onnx": b"not a network"}, precision="fp32", threads=1)
    assert children() == before


def test_a_process_that_was_killed_is_told(folder: Path) -> None:
    x = make_reference_images(SHAPE)
    session = load(folder)
    engine = session._engine
    assert isinstance(engine, runtime._Web)
    os.kill(engine._process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(LostWorker, match=r"the process of Node.js ended with status -9.*load the artifact again"):
            session(x)
    session.close()


def test_images_that_the_network_does_not_take_are_told_and_the_next_are_answered(folder: Path) -> None:
    content = {"model.onnx": (folder / "model.onnx").read_bytes()}
    engine = runtime.load(content, precision="fp32", threads=1)
    with pytest.raises(RuntimeError, match="images"):
        engine(np.zeros((1, 3, 5, 5), np.float32))
    assert engine(make_reference_images(SHAPE)).shape == (2, 5)
    engine.close()


def test_the_package_is_looked_for_upwards_and_where_the_variable_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = runtime._node_modules()
    inner = tmp_path / "project" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    monkeypatch.delenv("ONEFOLD_NODE_MODULES", raising=False)
    with pytest.raises(MissingExtra, match="type: npm install onnxruntime-web"):
        load(folder)
    (tmp_path / "project" / "node_modules").symlink_to(modules)
    load(folder).close()
    monkeypatch.setenv("ONEFOLD_NODE_MODULES", str(tmp_path / "nothing"))
    with pytest.raises(MissingExtra, match="nothing; type"):
        load(folder)


def test_a_machine_without_nodejs_is_told_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtra, match=r"install it \(https://nodejs.org\)"):
        load(folder)


def test_a_node_that_fails_at_once_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "node"
    broken.write_text("#!/bin/sh\necho this is no node >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(LostWorker, match="ended with status 3: this is no node"):
        load(folder)


def test_a_broken_package_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "onnxruntime-web"
    package.mkdir()
    (package / "package.json").write_text('{"name": "onnxruntime-web", "main": "main.js"}')
    (package / "main.js").write_text("console.log('hello'); throw new Error('too old')")
    monkeypatch.setenv("ONEFOLD_NODE_MODULES", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"cannot be used by this Node.js \(too old\); type: npm install"):
        load(folder)
