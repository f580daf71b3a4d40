"""An artifact explains itself: its README.md is true, and its lines of Python give onefold's own answer without it."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from available_runtimes import RUNNABLE
from onefold.commands.predict import predict
from onefold.commands.predictor import open_predictor
from onefold.data import Preprocessing
from onefold.errors import BadArtifact
from onefold.quantize import QuantizationMethod, quantize
from onefold.runtimes import RUNTIMES, Artifact, ModelInfo, Parity, export, import_runtime, load, open_artifact
from onefold.runtimes.artifact_readme import PLATFORMS, list_platforms, render_code, render_readme

ALSO_ALLOWED = {"executorch": {"torch"}}
CLASSES = ("ant", "bee", "cat", "caf\u00e9", "two words", 'quo"te', "<b>")
PREPARED = Preprocessing(size=32, crop_pct=0.875)

# Runs the lines for each photo, with the modules of the first argument out of reach.
RUNNER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ImportError(name + " is out of reach")
REFUSED = set(filter(None, sys.argv[1].split(",")))
sys.meta_path.insert(0, Refuse())
lines, photos = open(sys.argv[2], encoding="utf-8").read(), sys.argv[3:]
for photo in photos:
    sys.argv = ["classify.py", photo]
    exec(compile(lines, "classify.py", "exec"), {"__name__": "__main__"})
"""


class Small(nn.Module):
    """Decided enough that no class changes by a rounding, and not so that no share does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, 2, 1)
        self.mix = nn.Conv2d(8, 16, 3, 2, 1)
        self.fc = nn.Linear(16, len(CLASSES))
        self.fc.weight.data *= 30

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.mix(torch.relu(self.stem(x)))).mean((2, 3)))


def exported(folder: Path, runtime: str, precision: str = "fp32", prepared: Preprocessing = PREPARED) -> Artifact:
    torch.manual_seed(3)
    model = Small(prepared.channels).eval()
    patches = nn.functional.interpolate(torch.randn(64, prepared.channels, 4, 4), prepared.size)
    with torch.no_grad():  # no class is the favourite
        model.fc.bias -= model(patches).mean(0)
    info = ModelInfo(model="small", fused=True, classes=CLASSES, preprocessing=prepared.to_dict(), licence="MIT")
    shape = (prepared.channels, prepared.size, prepared.size)
    given = (
        quantize(model, torch.randn(16, *shape), QuantizationMethod(weight_qmax=63)) if precision == "int8" else model
    )
    return export(given, shape, folder, runtime=runtime, info=info, precision=precision)


def fake(runtime: str, precision: str = "fp32", prepared: Preprocessing | None = PREPARED, **changes) -> Artifact:
    """An artifact that was never made, for what is rendered."""
    channels, size = (prepared.channels, prepared.size) if prepared else (3, 32)
    facts = {
        "folder": Path("nowhere"),
        "runtime": runtime,
        "precision": precision,
        "model": "small",
        "fused": True,
        "drift": 1e-7,
        "input_shape": (channels, size, size),
        "num_classes": len(CLASSES),
        "dynamic_batch": True,
        "classes": CLASSES,
        "preprocessing": prepared.to_dict() if prepared else {},
        "parity": Parity(difference=2e-7, top1_agreement=1.0, tolerance=1e-4, images=2),
        "licence": "MIT",
        "source": "made here",
        "details": {},
        "made_with": {"onefold": "0"},
        "files": {},
    }
    return Artifact(**{**facts, **changes})


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def python_of(artifact: Artifact) -> str:
    (lines,) = blocks((artifact.folder / "README.md").read_text(encoding="utf-8"), "python")
    return lines


GREETING = "The device supports: "  # MNN says so of the processor on standard output


def ran(artifact: Artifact, photos: list[Path], place: Path) -> list[tuple[str, float]]:
    """What the README's lines print of each photo, run in the artifact's folder."""
    (place / "lines.py").write_text(python_of(artifact), encoding="utf-8")
    (place / "runner.py").write_text(RUNNER)
    refused = {"torch", "torchvision", "onefold"} - ALSO_ALLOWED.get(artifact.runtime, set())
    call = [sys.executable, place / "runner.py", ",".join(refused), place / "lines.py", *photos]
    done = subprocess.run(
        list(map(str, call)), cwd=artifact.folder, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith(GREETING)]
    return [(line.rpartition(" ")[0], float(line.rpartition(" ")[2])) for line in lines]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Lying, standing, turned by EXIF, square and small, grey, transparent; of colours that change across the photo."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)

    def made(width: int, height: int, bands: int) -> Image.Image:
        coarse = draw.integers(0, 256, (5, 6, bands), dtype=np.uint8)
        picture = Image.fromarray(coarse if bands > 1 else coarse[..., 0])
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6
    made(97, 61, 3).save(folder / "lying.png")
    made(50, 133, 3).save(folder / "standing.jpg", quality=95)
    made(120, 71, 3).save(folder / "turned.jpg", exif=turned, quality=95)
    made(20, 20, 3).save(folder / "small.png")
    made(80, 64, 1).save(folder / "grey.jpg", quality=95)
    made(75, 90, 4).save(folder / "transparent.png")
    return sorted(folder.iterdir())


PRECISIONS = [
    (runtime, precision)
    for runtime in RUNNABLE
    for precision in import_runtime(runtime).PRECISIONS
    if precision in ("fp32", "int8")
]


@pytest.mark.parametrize(("runtime", "precision"), PRECISIONS, ids=str)
def test_the_lines_give_onefolds_answer(runtime: str, precision: str, photos: list[Path], tmp_path: Path) -> None:
    artifact = exported(tmp_path / "artifact", runtime, precision)
    told = ran(artifact, photos, tmp_path)
    with open_predictor(artifact.folder) as predictor:
        expected = [found.best[0] for found in predict(predictor, photos, top=1)]
    assert len({index for index, _, _ in expected}) > 1
    assert [name for name, _ in told] == [name for _, name, _ in expected]
    near = 2e-3 if runtime == "ncnn" else 1e-5  # left to itself, ncnn keeps some weights in 16 bits
    np.testing.assert_allclose([share for _, share in told], [share for _, _, share in expected], atol=near)


SIZES = [
    Preprocessing(size=33, crop_pct=0.9, interpolation="bicubic", channels=1, mean=(0.3,), std=(0.2,)),
    Preprocessing(size=29, crop_pct=1.0, interpolation="nearest", mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2)),
    Preprocessing(size=45, crop_pct=0.35),
]


@pytest.mark.parametrize("prepared", SIZES, ids=lambda prepared: f"{prepared.size}-{prepared.interpolation}")
def test_photos_are_prepared_to_the_bit(prepared: Preprocessing, photos: list[Path], tmp_path: Path) -> None:
    """Any size, crop, filter and number of channels; the shares are those of onefold to the last digit of float32."""
    artifact = exported(tmp_path / "artifact", "onnx", prepared=prepared)
    told = ran(artifact, photos, tmp_path)
    with open_predictor(artifact.folder) as predictor:
        expected = [found.best[0] for found in predict(predictor, photos, top=1)]
    assert [name for name, _ in told] == [name for _, name, _ in expected]
    np.testing.assert_allclose([share for _, share in told], [share for _, _, share in expected], rtol=2e-6)


def test_a_class_without_a_name_is_told_by_its_number(photos: list[Path], tmp_path: Path) -> None:
    info = ModelInfo(model="small", fused=True, preprocessing=PREPARED.to_dict())
    model = Small(3).eval()
    artifact = export(model, (3, 32, 32), tmp_path / "artifact", runtime="onnx", info=info)
    assert all(name in set("0123456") for name, _ in ran(artifact, photos[:2], tmp_path))


def test_what_does_not_say_how_photos_are_prepared_answers_to_its_proof(tmp_path: Path) -> None:
    info = ModelInfo(model="small", fused=True, classes=CLASSES, preprocessing={"size": 32})
    artifact = export(Small(3).eval(), (3, 32, 32), tmp_path / "artifact", runtime="onnx", info=info)
    logits = np.load(artifact.folder / "reference.npz")["logits"][0].astype(np.float64)
    ((name, share),) = ran(artifact, [Path("none")], tmp_path)
    assert name == CLASSES[logits.argmax()]
    assert share == pytest.approx(1 / np.exp(logits - logits.max()).sum(), rel=1e-5)
    text = (artifact.folder / "README.md").read_text(encoding="utf-8")
    assert "stated at the export: size 32" in text
    assert "## C++" not in text


# --- what can be checked without a runtime ----------------------------------------------------------------------


def rendered(runtime: str) -> list[Artifact]:
    precisions = ("fp32", "fp16", "bf16", "int8")
    how = [PREPARED, *SIZES, None]
    return [fake(runtime, precision, prepared) for precision, prepared in itertools.product(precisions, how)]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_runtime_has_code_for_python_of_ten_lines(runtime: str) -> None:
    assert "python" in list_platforms(runtime), f"write snippets/{runtime}.python.md"
    for artifact in rendered(runtime):
        (lines,) = blocks(render_code(artifact, "python"), "python")
        counted = [line for line in lines.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(counted) <= 10, f"{len(counted)} lines of code"
        assert max(map(len, lines.splitlines())) <= 120
        assert ";" not in re.sub(r'"[^"]*"|#.*', "", lines)
        imported = imports_of(lines)
        assert not imported & ({"torch", "onefold"} - ALSO_ALLOWED.get(runtime, set()))
        assert "manifest.json" in lines
        assert len(imported - set(sys.stdlib_module_names) - {"numpy", "PIL", "torch"}) == 1


def imports_of(lines: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(lines)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


WHERE = {
    "onnx": {"python", "cpp", "swift", "kotlin", "javascript"},
    "openvino": {"python", "cpp"},
    "executorch": {"python", "cpp", "swift", "kotlin"},
    "litert": {"python", "cpp", "kotlin"},
    "ncnn": {"python", "cpp", "kotlin"},
    "mnn": {"python", "cpp"},
    "coreml": {"python", "swift"},
    "web": {"python", "javascript"},
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_platform_is_rendered_whole(runtime: str) -> None:
    assert set(list_platforms(runtime)) == WHERE.get(runtime, {"python"})
    for artifact in rendered(runtime):
        text = render_readme(artifact)
        assert not re.search(r"@[a-z_.]+@", text)
        assert text.count("```") % 2 == 0
        complete = bool(artifact.preprocessing)
        for platform in list_platforms(runtime):
            assert (f"\n## {PLATFORMS[platform]}\n" in text) == (complete or platform == "python")


def test_code_that_does_not_apply_the_value_range_says_so() -> None:
    deep = replace(PREPARED, value_range=(0, 4095))
    text, plain = (render_readme(fake("onnx", prepared=prepared)) for prepared in (deep, PREPARED))
    said = "This code takes 8-bit pictures and does not apply the network's value range, 0 to 4095"
    saying = [section.partition("\n")[0] for section in text.split("\n## ") if said in section]
    assert saying == ["C++", "Swift", "Kotlin", "JavaScript"]
    assert "value range" not in plain


@pytest.mark.parametrize("runtime", ["onnx", "web", "openvino"])
def test_nobody_is_told_of_its_use(runtime: str) -> None:
    """What declines comes before the import that would report."""
    (lines,) = blocks(render_code(fake(runtime), "python"), "python")
    decline = '["openvino_telemetry"] = None' if runtime == "openvino" else '("ORT_DISABLE_TELEMETRY", "1")'
    vendor = "import openvino" if runtime == "openvino" else "onnxruntime as"
    assert 0 < lines.index(decline) < lines.index(vendor)


def test_an_unknown_runtime_has_a_readme_too() -> None:
    assert "onefold predict" in render_readme(fake("from-the-future", "fp4"))


HOSTILE = "x\n# y | z <script> `a` ![b](c) \u202e \udce9"


def test_what_people_wrote_stays_in_its_place() -> None:
    """Names cannot start a heading, a tag, a link or a code block, and never come into code."""
    calm = fake("onnx", model="m", licence="l", source="s", classes=("c",) * len(CLASSES))
    wild = replace(calm, model=HOSTILE, licence=HOSTILE, source=HOSTILE, classes=(HOSTILE,) * len(CLASSES))
    wild = replace(wild, made_with={"p": HOSTILE}, details={"note": HOSTILE, "quantization": {"method": HOSTILE}})
    text = render_readme(wild)
    assert text.encode("utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).splitlines()
    assert [line for line in prose if line.startswith("# ")] == prose[:1]
    assert "<script" not in text
    assert "![b](c)" not in text
    assert "\u202e" not in text
    assert all(line.count(" | ") == 1 for line in prose if line.startswith("| ") and line != "| | |")
    for platform in PLATFORMS:
        assert render_code(wild, platform) == render_code(calm, platform)


FACTS: dict[str, tuple[Callable[[], Artifact], tuple[str, ...]]] = {
    "whole": (
        lambda: fake("litert", "int8", details={"images_per_call": 1, "input": "one image"}),
        ("# small for LiteRT, int8", "3 x 32 x 32", "(1, 32, 32, 3)", "0.485, 0.456, 0.406", "short side has 37"),
    ),
    "grey": (lambda: fake("onnx", prepared=SIZES[0]), ("19595 R", "minus 0.3, divided by 0.2 (grey)", "cubic filter")),
    "not run": (lambda: fake("coreml", parity=None), ("not run on the machine that exported it",)),
    "not fused": (lambda: fake("onnx", fused=False), ("It is not fused", "NOT FUSED")),
    "not trained": (lambda: fake("onnx", details={"untrained": True}), ("weights are random",)),
    "quantized": (
        lambda: fake("onnx", "int8", details={"quantization": {"method": "by moments", "layers": {"a": {}}}}),
        ("## How it was quantized", "| method | by moments |", "signal-to-noise ratio of each layer"),
    ),
    "many": (
        lambda: fake("onnx", num_classes=100, classes=tuple(f"c{i}" for i in range(100))),
        ("9 c9, ... (all of them in `manifest.json`)",),
    ),
    "nothing stated": (lambda: fake("onnx", licence=None, drift=None, classes=None), ("not stated", "have no names")),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTS)
def test_it_says_what_the_manifest_says(case: str) -> None:
    make, told = FACTS[case]
    text = render_readme(make())
    for words in told:
        assert words in text


# --- on disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> Artifact:
    return exported(tmp_path / "artifact", "onnx")


def test_it_is_sealed_like_the_rest_and_lists_the_rest(made: Artifact) -> None:
    text = (made.folder / "README.md").read_text(encoding="utf-8")
    assert "README.md" in made.files
    for name, stored in made.files.items():
        assert name == "README.md" or f"| `{name}` | {stored.num_bytes:,} bytes" in text
    (made.folder / "README.md").write_text(text.replace("MIT", "GPL"), encoding="utf-8")
    with pytest.raises(BadArtifact, match=r"README\.md is damaged"):
        open_artifact(made.folder)


def test_it_renders_from_the_manifest_alone(made: Artifact) -> None:
    before = {name: stored for name, stored in made.files.items() if name != "README.md"}
    text = (made.folder / "README.md").read_text(encoding="utf-8")
    assert render_readme(replace(open_artifact(made.folder), files=before)) == text


def test_an_older_artifact_has_none_and_opens(made: Artifact) -> None:
    from onefold.runtimes.artifact import render_manifest

    (made.folder / "README.md").unlink()
    older = replace(made, files={name: stored for name, stored in made.files.items() if name != "README.md"})
    (made.folder / "manifest.json").write_text(render_manifest(older), encoding="utf-8")
    load(made.folder).close()
    again = exported(made.folder, "onnx")  # and is replaced by a new one
    assert "README.md" in json.loads((again.folder / "manifest.json").read_text())["files"]
