"""The code that artifacts bring along for people without onefold, where they will run it.

In environments that hold one runtime's package and nothing of torch; in C++ against the vendors' own headers; and what
prepares photos in C++ and JavaScript against what onefold does.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import venv
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onefold.commands.calibration_cache import CalibrationOptions
from onefold.commands.export import ExportOptions, export_to_runtimes
from onefold.commands.open_network import open_network
from onefold.commands.predict import predict
from onefold.commands.predictor import open_predictor
from onefold.data import Preprocessing
from onefold.errors import MissingExtra
from onefold.models.load_model import save_weights
from onefold.runtimes import web
from onefold.runtimes.artifact_readme import list_platforms, render_code
from test_artifact_readme import PREPARED, SIZES, blocks, fake, python_of

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino", "litert": "ai-edge-litert", "ncnn": "ncnn"}
PHOTOS = ("n01440764_tench.jpg", "n02123045_tabby.jpg", "n07747607_orange.jpg")


# --- clean environments ---------------------------------------------------------------------------------------------


def an_environment(folder: Path, package: str) -> Path:
    """The Python of a new environment with a runtime's package, numpy and Pillow; a skip where none can be had."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    call = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package, "numpy", "pillow"]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {package} here: {done.stderr.strip()[-200:]}")
    there = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'onefold', 'torchvision'))))"
    assert subprocess.run([str(python), "-I", "-c", there], check=False).returncode == 0
    return python


@pytest.fixture(scope="module")
def weights(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apple's MobileOne-S0 with ImageNet's names on its card."""
    network = open_network(shared_data / "weights" / "mobileone_s0_in1k_fused.npz", name="mobileone_s0")
    with (shared_data / "imagenet-sample" / "labels.csv").open(encoding="utf-8") as lines:
        names = {int(row["index"]): row["name"] for row in csv.DictReader(lines)}
    card = replace(network.card, classes=tuple(names[i] for i in range(1000)))
    path = tmp_path_factory.mktemp("weights") / "mobileone_s0.safetensors"
    save_weights(network.model, path, card)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("runtime", PACKAGES)
def test_ten_lines_in_a_clean_environment(runtime: str, weights: Path, shared_data: Path, tmp_path: Path) -> None:
    """Real weights on real photos: the class that onefold names, and its share."""
    python = an_environment(tmp_path / "environment", PACKAGES[runtime])
    images = shared_data / "imagenet-sample" / "images"
    for precision in ("fp32",) if runtime == "ncnn" else ("fp32", "int8"):
        calibration = CalibrationOptions(data=str(images), count=32) if precision == "int8" else None
        order = ExportOptions(runtimes=(runtime,), precision=precision, calibration=calibration)
        try:
            (artifact,) = export_to_runtimes(weights, tmp_path / "artifacts", order)
        except MissingExtra as error:
            pytest.skip(str(error))
        (tmp_path / "classify.py").write_text(python_of(artifact), encoding="utf-8")
        photos = [images / name for name in PHOTOS if (images / name).is_file()] or sorted(images.iterdir())[:3]
        with open_predictor(artifact.folder) as predictor:
            expected = [found.best[0] for found in predict(predictor, photos, top=1)]
        for photo, (_, name, share) in zip(photos, expected, strict=True):
            call = [str(python), "-I", str(tmp_path / "classify.py"), str(photo)]
            done = subprocess.run(call, cwd=artifact.folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            print(f"{runtime}-{precision} {photo.name}: {done.stdout.strip()}   onefold: {name} {share:.7f}")
            told, _, number = done.stdout.strip().rpartition(" ")
            assert told == name
            assert float(number) == pytest.approx(share, abs=2e-3 if runtime == "ncnn" else 1e-5)


# --- other languages ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Steep, but not noise: a pixel's shift is many levels of 255."""
    draw, sides = np.random.default_rng(7), [(97, 61), (50, 133), (37, 37), (20, 26), (301, 100)]
    coarse = [Image.fromarray(draw.integers(0, 256, (7, 7, 3), dtype=np.uint8)) for _ in sides]
    return [each.resize(size, Image.Resampling.BICUBIC) for each, size in zip(coarse, sides, strict=True)]


def agrees(given: np.ndarray, expected: np.ndarray, prepared: Preprocessing) -> None:
    """Equal but for what Pillow's versions differ in.

    Some resize the rows first and some the columns, with whole numbers between: a level of 255 here and there. The
    nearest pixel is another one where the two nearest are equally near: one row or column in 29.
    """
    step = 1 / 255 / np.array(prepared.std, np.float32)[:, None, None]
    off = np.abs(given - expected) / step
    if prepared.interpolation == "nearest":
        assert (off > 0.01).mean() < 0.08
    else:
        assert off.max() < 2.01
        assert off.mean() < 0.4


WAYS = [PREPARED, *SIZES, Preprocessing(size=24, crop_pct=0.8, interpolation="bicubic")]


@pytest.mark.parametrize("prepared", WAYS, ids=lambda each: f"{each.size}-{each.interpolation}-{each.channels}")
def test_cpp_prepares_photos_as_onefold_does(
    prepared: Preprocessing, pictures: list[Image.Image], tmp_path: Path
) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    for runtime in ("onnx", "litert"):
        (text,) = blocks(render_code(fake(runtime, prepared=prepared), "cpp"), "cpp")
        text = "#include <cstdlib>\n" + text[text.index("#include <algorithm>") : text.index("int main")]
        text += """
int main(int, char** words) {
  Photo photo{std::atoi(words[1]), std::atoi(words[2]), {}};
  for (int each; (each = std::getchar()) != EOF;) photo.pixels.push_back(uint8_t(each));
  const std::vector<float> x = prepare(photo);
  std::fwrite(x.data(), sizeof(float), x.size(), stdout);
}
"""
        (tmp_path / "prepare.cpp").write_text(text)
        call = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-o", "prepare", "prepare.cpp"]
        built = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
        for picture in pictures:
            run = [str(tmp_path / "prepare"), *map(str, picture.size)]
            done = subprocess.run(run, input=picture.tobytes(), capture_output=True, check=True)
            agrees(unpacked(done.stdout, prepared, last=runtime == "litert"), prepared(picture), prepared)


@pytest.mark.parametrize("prepared", WAYS, ids=lambda each: f"{each.size}-{each.interpolation}-{each.channels}")
def test_javascript_prepares_photos_as_onefold_does(
    prepared: Preprocessing, pictures: list[Image.Image], tmp_path: Path
) -> None:
    node = needs_node()
    (text,) = blocks(render_code(fake("web", prepared=prepared), "javascript"), "js")
    text = text.replace('import * as ort from "onnxruntime-web";', 'import { readFileSync, writeSync } from "node:fs";')
    text += """
const [width, height] = process.argv.slice(2).map(Number);
const x = new Uint8Array(prepare({ width, height, data: new Uint8ClampedArray(readFileSync(0)) }).buffer);
for (let done = 0; done < x.length; ) done += writeSync(1, x, done);
"""
    (tmp_path / "prepare.mjs").write_text(text)
    for picture in pictures:
        run = [node, str(tmp_path / "prepare.mjs"), *map(str, picture.size)]
        done = subprocess.run(run, input=picture.convert("RGBA").tobytes(), capture_output=True, check=True)
        agrees(unpacked(done.stdout, prepared, last=False), prepared(picture), prepared)


def unpacked(data: bytes, prepared: Preprocessing, *, last: bool) -> np.ndarray:
    """The floats as (C, H, W)."""
    size, channels = prepared.size, prepared.channels
    values = np.frombuffer(data, np.float32)
    return values.reshape(size, size, channels).transpose(2, 0, 1) if last else values.reshape(channels, size, size)


def needs_node() -> str:
    """The program `node`, or a skip."""
    return shutil.which("node") or pytest.skip("needs node")


def headers_of(runtime: str) -> list[Path]:
    """Where the installed package of a runtime keeps its headers for C++, or a skip."""
    spec = find_spec(runtime)
    found = Path(spec.submodule_search_locations[0]) / "include" if spec and spec.submodule_search_locations else None
    if found is None or not found.is_dir():
        pytest.skip(f"needs the headers in the package {runtime}")
    if runtime == "executorch":
        return [found, found / "executorch" / "runtime" / "core" / "portable_type" / "c10"]
    return [found]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["openvino", "executorch"])
def test_cpp_fits_the_vendors_headers(runtime: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    includes = [word for path in headers_of(runtime) for word in ("-isystem", str(path))]
    for prepared in WAYS:
        (text,) = blocks(render_code(fake(runtime, prepared=prepared), "cpp"), "cpp")
        (tmp_path / "classify.cpp").write_text(text)
        call = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *includes]
        call += ["-DC10_USING_CUSTOM_GENERATED_MACROS", str(tmp_path / "classify.cpp")]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:2000]


def test_the_process_of_onnx_runtime_web_is_javascript_that_node_reads() -> None:
    assert subprocess.run([needs_node(), "--check", str(web._SCRIPT)], check=False).returncode == 0


@pytest.mark.parametrize("runtime", ["onnx", "web"])
def test_javascript_is_well_formed(runtime: str, tmp_path: Path) -> None:
    node = needs_node()
    assert "javascript" in list_platforms(runtime)
    (text,) = blocks(render_code(fake(runtime), "javascript"), "js")
    (tmp_path / "classify.mjs").write_text(text)
    done = subprocess.run(
        [node, "--check", str(tmp_path / "classify.mjs")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
