"""Measuring from the command line: a small network, exported, timed, held against the machine's limits, profiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onefold import bench, fuse
from onefold.cli import main
from onefold.commands.bench import BenchOptions
from onefold.commands.bench import measure_sources as run_bench
from onefold.commands.export import ExportOptions, export_to_runtimes
from onefold.errors import BadArgument
from onefold.models import count_flops, create_model
from onefold.models.load_model import Card, save_weights
from onefold.runtimes.layer_times import LayerTime, median_layer_times, profile

SIZE = 32
QUICK = ("--samples", "20", "--warmup", "0")


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused weights of a small network, its artifacts, and limits that no test has to wait for."""
    home = tmp_path_factory.mktemp("measuring")
    torch.manual_seed(0)
    model = fuse(create_model("mobilenetv1_025", num_classes=4).eval())
    save_weights(model, home / "fused.safetensors", Card(model="mobilenetv1_025", num_classes=4, fused=True))
    export_to_runtimes(home / "fused.safetensors", home / "artifacts", ExportOptions(runtimes=["onnx"], size=SIZE))
    here = bench.Machine.detect(())
    rates = [
        bench.PeakRate(kind=kind, threads=1, median=best, best=best, how="by hand", num_bytes=size)
        for kind, best, size in (("fp32", 1e14, None), ("read", 1e14, 1 << 28))
    ]
    roofline = bench.Roofline(limits=tuple(rates), features=here.features)
    (home / "results").mkdir()
    (home / f"results/{here.slug}-roofline.json").write_text(json.dumps(roofline.to_dict()))
    return home


def lines_of(home: Path) -> list[dict]:
    (ledger,) = (home / "results").glob("*.jsonl")
    return [json.loads(line) for line in ledger.read_text().splitlines()]


def test_an_artifact_says_what_it_costs(home: Path) -> None:
    manifest = json.loads((home / "artifacts/onnx-fp32/manifest.json").read_text())
    counted = count_flops(create_model("mobilenetv1_025", num_classes=4), SIZE)
    assert manifest["details"]["cost"]["macs"] == counted.macs
    assert 0 < manifest["details"]["cost"]["params"] < counted.params  # the norms are folded


def test_a_row_says_what_it_reaches_and_how_it_starts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", home / "artifacts/onnx-fp32", "--results", home / "results", *QUICK, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    line = lines_of(home)[-1]
    counted = json.loads((home / "artifacts/onnx-fp32/manifest.json").read_text())["details"]["cost"]
    assert line["subject"]["macs"] == counted["macs"]
    assert line["bound"]["compute_ns"] == pytest.approx(counted["macs"] / 1e5)
    assert line["bound"]["memory_ns"] == pytest.approx((4 * counted["params"] + 4 * 3 * SIZE**2) / 1e5)
    assert told["roofline"] == line["summary"]["roofline"]
    assert told["bound"]["side"] == (
        "memory" if line["bound"]["memory_ns"] > line["bound"]["compute_ns"] else "compute"
    )
    assert min(line["cold"][name] for name in ("open_ns", "first_ns", "warm_ns")) > 0
    model = home / "artifacts/onnx-fp32/model.onnx"
    assert line["subject"]["num_bytes"] == model.stat().st_size  # what a user ships, without the proof
    assert run("bench", home / "artifacts/onnx-fp32", "--results", home / "results", *QUICK) == 0
    said = capsys.readouterr().out
    assert "% of the roofline: fp32 with 1 thread cannot take less than" in said
    assert f"bound by {told['bound']['side']}" in said
    assert "in a fresh process opened in" in said


def test_a_limit_that_is_beaten_is_measured_anew(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on a busy machine at first: as slow as no machine is."""
    rates = iter([1.0, 1e15])
    asked = []

    def measured(threads: list[int], kinds: list[str] | None = None) -> bench.Roofline:
        asked.append((threads, kinds))
        best = next(rates)
        return bench.Roofline(limits=(bench.PeakRate(kind="fp32", threads=1, median=best, best=best, how="by hand"),))

    monkeypatch.setattr("onefold.commands.bench.measure_roofline", measured)
    order = BenchOptions(
        sources=[str(home / "fused.safetensors")], procedure=bench.Procedure(samples=16, warmup_seconds=0.0)
    )
    outcome, _ = run_bench(order, tmp_path)
    assert isinstance(outcome, bench.Measurement)
    assert asked == [([1], None), ([1], ["fp32"])]  # and no memory is read for it
    assert outcome.roofline_share is not None
    assert 0 < outcome.roofline_share < 1


def test_weights_have_limits_but_no_fresh_process(home: Path) -> None:
    order = BenchOptions(
        sources=[str(home / "fused.safetensors")], procedure=bench.Procedure(samples=16, warmup_seconds=0.0)
    )
    outcome, _ = run_bench(order, home / "results")
    assert isinstance(outcome, bench.Measurement)
    assert outcome.bound is not None
    assert outcome.cold is None


def test_the_self_test_prints_its_floor_and_keeps_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", home / "artifacts/onnx-fp32", "--results", home / "results", *QUICK, "--aa") == 0
    assert "Noise floor: against itself it differs by up to" in capsys.readouterr().out
    line = lines_of(home)[-1]
    assert line["kind"] == "comparison"
    assert len(line["measurements"]) == 1
    assert line["floor"]["floor"] >= 0


def test_a_planted_slowdown_is_told_to_be_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sevenfold, which no machine is too noisy for."""
    where = ("--results", home / "results")
    assert run("bench", home / "artifacts/onnx-fp32", *where, *QUICK, "--inject-slowdown", "600%") == 0
    assert "The injected slowdown of 600 % was detected" in capsys.readouterr().out
    plain, slower = lines_of(home)[-1]["measurements"].values()
    assert "planted" not in plain["subject"]
    assert slower["subject"]["planted"] == 6
    assert slower["cold"] is None


def test_processors_can_be_chosen(home: Path) -> None:
    usable = bench.Machine.detect(()).affinity
    if not usable:
        pytest.skip("this system does not let a program choose its processors")
    where = ("--results", home / "results", "--no-cold")
    assert run("bench", home / "artifacts/onnx-fp32", *where, *QUICK, "--pin", usable[-1]) == 0
    line = lines_of(home)[-1]
    assert line["machine"]["affinity"] == [usable[-1]]
    assert line["cold"] is None
    assert bench.Machine.detect(()).affinity == usable


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["bench", "A", "--pin", "0,x"], 2, "numbers of processors by comma"),
        (["bench", "A", "--plant", "much"], 2, "a slowdown in percent"),
        (["bench", "A", "--plant", "0"], 2, "must lie above 0"),
        (["bench", "A", "A", "--aa"], 2, "a self-test is of one source"),
        (["bench", "A", "--aa", "--plant", "2"], 2, "give one of them"),
        (["limits", "--threads", "0"], 2, "numbers from 1 to 1024"),
        (["limits", "--threads", "one"], 2, "numbers from 1 to 1024"),
        (["profile", "nowhere"], 4, "expected an artifact folder"),
    ],
)
def test_mistakes_have_their_sentence(
    home: Path, arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"A": str(home / "artifacts/onnx-fp32")}
    assert run(*(places.get(each, each) for each in arguments)) == status
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_limits_are_printed_from_their_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("limits", "--results", home / "results", "--threads", "1") == 0
    said = capsys.readouterr().out
    assert "multiply-adds in fp32" in said
    assert "reading 256 MiB over and over" in said
    assert "100000.0" in said


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_the_layers_of_an_artifact_have_times(runtime: str, home: Path, tmp_path: Path) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[runtime], reason=f"{runtime} is not installed")
    export_to_runtimes(home / "fused.safetensors", tmp_path, ExportOptions(runtimes=[runtime], size=SIZE))
    found = profile(tmp_path / f"{runtime}-fp32", calls=5)
    kinds = [layer.kind.lower() for layer in found.layers]
    convolutions = sum("conv" in kind for kind in kinds)
    assert 27 <= convolutions <= 28  # a stem and 13 pairs; the head is one too where the runtime makes it one
    assert all(layer.ns >= 0 for layer in found.layers)
    assert found.ns == pytest.approx(sum(found.time_by_type().values()))
    assert found.ns > 0


def test_layers_are_told_for_people_and_programs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = home / "artifacts/onnx-fp32"
    assert run("profile", artifact, "--calls", 3, "--top", 2) == 0
    head, *rows, whole, kinds = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "type", "ms", "share"]
    assert len(rows) == 3
    assert "more" in rows[2]
    assert whole.startswith("mobilenetv1_025 onnx fp32: ")
    assert kinds.startswith("by type: ")
    assert run("profile", artifact, "--calls", 3, "--json") == 0
    layers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(layer["share"] for layer in layers) == pytest.approx(1)


def test_a_layer_is_the_median_of_its_calls() -> None:
    runs = [[LayerTime(name="a", kind="Conv", ns=ns), LayerTime(name="b", kind="Gemm", ns=1)] for ns in (5, 9, 6)]
    assert median_layer_times(runs) == [LayerTime(name="a", kind="Conv", ns=6), LayerTime(name="b", kind="Gemm", ns=1)]


def test_only_runtimes_that_measure_their_layers_are_profiled(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onefold.runtimes.layer_times._PROFILED", ("openvino",))
    with pytest.raises(BadArgument, match="onnx does not report the time of its layers; openvino do"):
        profile(home / "artifacts/onnx-fp32")


@pytest.mark.parametrize(("batch", "count"), [(1, 64), (8, 8), (256, 4)])
def test_large_batches_are_few(batch: int, count: int) -> None:
    from onefold.commands.bench import _drawn

    assert len(_drawn((batch, 1, 2, 2))) == count
