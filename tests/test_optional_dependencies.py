"""A command that lacks optional packages says so before its work, all of them at once, with one line to type."""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from onefold import cpp_extension
from onefold.cli import main
from onefold.commands import bench, optional_dependencies
from onefold.errors import MissingExtra

STATED = [
    "torch>=2.6",
    "scikit-learn>=1.4; extra == 'digits'",
    'onnx>=1.21; extra == "onnx"',
    'onnxruntime>=1.20; extra == "onnx"',
    "openvino>=2025.0; extra == 'openvino'",
    "litert-torch>=0.8; extra == 'litert'",
    "matplotlib>=3.8; extra == 'report'",
    "obstore>=0.9; extra == 'cloud'",
    "pyarrow>=20 ; extra == 'parquet'",
    "timm>=1.0; (python_version > '3.9') and extra == 'timm'",
    "wandb>=0.17; extra == 'wandb'",
    "onnx>=1.21; extra == 'tensorrt'",
    "tensorrt>=10.0; extra == 'tensorrt'",
    *(f"{name}>=1; extra == 'demo'" for name in ("scikit-learn", "onnx", "onnxruntime", "openvino", "matplotlib")),
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[str]:
    """The optional packages that are installed: none until a test adds some. The current folder is an empty one."""
    packages: set[str] = set()

    def version(package: str) -> str:
        if package not in packages:
            raise PackageNotFoundError(package)
        return "1"

    fake = SimpleNamespace(requires=lambda _: STATED, version=version, PackageNotFoundError=PackageNotFoundError)
    monkeypatch.setattr(optional_dependencies, "metadata", fake)
    monkeypatch.setattr(optional_dependencies, "find_spec", lambda module: None)
    monkeypatch.chdir(tmp_path)
    return packages


@pytest.mark.parametrize(
    ("command", "packages", "names"),
    [
        ("demo", "scikit-learn, onnx, onnxruntime, openvino and matplotlib are", "demo"),
        ("deploy w --data digits --to onnx,litert", "onnx, onnxruntime, litert-torch, matplotlib and scikit-learn are",
         "onnx,litert,report,digits"),
        ("deploy w --data a --val s3://b/c.tar", "onnx, onnxruntime, matplotlib and obstore are", "onnx,report,cloud"),
        ("export timm:x --to openvino,onnx", "openvino, onnx, onnxruntime and timm are", "openvino,onnx,timm"),
        ("export w --to onnx --precision int8 --data digits", "onnx, onnxruntime and scikit-learn are", "onnx,digits"),
        ("eval timm:x --data digits", "timm and scikit-learn are", "timm,digits"),
        ("train --recipe photos:distill --data digits --log-to wandb --teacher timm:x",
         "wandb, scikit-learn and timm are", "wandb,digits,timm"),
        ("train --recipe photos:finetune --data train.parquet", "pyarrow is", "parquet"),
    ],
)  # fmt: skip
def test_all_that_is_missing_is_said_at_once_and_nothing_is_done(
    installed: set[str], capsys: pytest.CaptureFixture[str], command: str, packages: str, names: str
):
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f'error: {packages} needed and not installed: pip install "onefold[{names}]"\n'
    assert list(Path().iterdir()) == []
    installed |= set(optional_dependencies.missing_packages("demo")) | {
        "timm",
        "wandb",
        "obstore",
        "pyarrow",
        "litert-torch",
    }
    optional_dependencies.require_extras(names.split(","))


def test_what_runs_elsewhere_is_exported_without_its_package(installed: set[str], monkeypatch: pytest.MonkeyPatch):
    installed.add("onnx")
    optional_dependencies.require_extras(["tensorrt"])
    monkeypatch.setattr(optional_dependencies.tensorrt, "unavailable_reason", lambda: None)
    with pytest.raises(MissingExtra, match=r'^tensorrt is needed .*"onefold\[tensorrt\]"$'):
        optional_dependencies.require_extras(["tensorrt"])


def test_what_sources_are_measured_with_is_missing_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def open_predictor(source: str, **_: object) -> None:
        raise MissingExtra(f"{source} needs it", source)

    monkeypatch.setattr(bench, "open_predictor", open_predictor)
    with pytest.raises(MissingExtra) as error:
        bench.bench("onnx", "litert", "onnx", results=tmp_path)
    assert str(error.value) == 'onnx needs it; litert needs it: pip install "onefold[onnx,litert]"'


def test_another_distribution_of_the_same_module_does(installed: set[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optional_dependencies, "find_spec", lambda module: module if module == "onnxruntime" else None)
    assert optional_dependencies.missing_packages("onnx") == ["onnx"]


def test_a_source_tree_that_is_not_installed_knows_no_extras(installed: set[str], monkeypatch: pytest.MonkeyPatch):
    def requires(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(optional_dependencies.metadata, "requires", requires)
    optional_dependencies.require_extras(["demo"])


def test_the_installation_tells_what_it_has(
    installed: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def loaded(name: str) -> ctypes.CDLL | None:
        cpp_extension.LIBRARY_ORIGINS[name] = "not compiled: slower" if name == "roofline" else "from the wheel, for x"
        return None

    monkeypatch.setattr(cpp_extension, "LIBRARY_ORIGINS", {})
    monkeypatch.setattr(cpp_extension, "load_library", loaded)
    installed |= {"onnx", "onnxruntime", "timm"}
    assert main(["info"]) == 0
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name.strip(): text.strip() for name, text in said.items()}
    assert facts["C++ code"] == (
        "kernels, resample, nchw_to_nhwc: from the wheel, for x; roofline: not compiled: slower"
    )
    assert facts["extras"] == "onnx, timm"
    assert facts["not installed"] == 'pip install "onefold[cloud,digits,litert,openvino,parquet,report,tensorrt,wandb]"'
    monkeypatch.setenv("ONEFOLD_KERNELS", "plain")
    assert main(["info", "--json"]) == 0
    assert '"C++ code": "switched off by ONEFOLD_KERNELS=plain"' in capsys.readouterr().out
