"""The report: what it says is what the inputs hold, and nothing in them can break the page."""

from __future__ import annotations

import base64
import errno
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onefold import bench
from onefold.checksums import write_sealed_json
from onefold.cli import main
from onefold.commands.deploy_gates import Gate, write_gates
from onefold.commands.report import find_inputs, write_report_page
from onefold.data import DatasetInfo, LeftOut, SplitInfo
from onefold.errors import BadArgument, BadData, MissingExtra
from onefold.report import write_report
from onefold.report.figures import Curve, draw_curves
from onefold.report.format import (
    format_count,
    format_latency,
    format_significant,
    format_size,
    join_words,
    one_line,
    printable,
)
from onefold.report.grouping import group_by_subject, group_inputs, subject_label
from onefold.report.load_results import ReportInputs, load_report_inputs
from onefold.report.page import _with_unit, render_page
from onefold.runtimes.artifact import Artifact, Parity, StoredFile, render_manifest

MACHINE = bench.Machine(
    chip="Test Chip 9",
    architecture="x86_64",
    cores=4,
    usable_cores=4,
    memory_bytes=2**34,
    system="Linux 6.1",
    versions={"onnxruntime": "1.32.0"},
)
SUBJECT = {
    "model": "mobileone_s0",
    "runtime": "onnx",
    "precision": "fp32",
    "fused": True,
    "input_shape": [1, 3, 64, 64],
}
HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)>\n$\\frac{a}{$ \x00\x1b --> ]]> fill: #123456 url(#x) '
    "\u202e\ud800 &amp; 漢字"
)


class Page(HTMLParser):
    """A page taken apart: every tag closed in its order, ids, links, the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.said: dict[str, list[str]] = {}
        self.pieces: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.said.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.said[tag][-1] += data
        if "body" in self.open:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).replace("\N{NO-BREAK SPACE}", " ").split())


def samples(milliseconds: float, seed: int = 0, count: int = 100) -> tuple[int, ...]:
    source = np.random.default_rng(seed)
    return tuple(int(each) for each in milliseconds * 1e6 * np.exp(source.normal(0, 0.02, count)))


def measured(milliseconds: float, seed: int = 0, **subject: object) -> bench.Measurement:
    return bench.Measurement(
        subject={**SUBJECT, **subject},
        machine=MACHINE,
        procedure=bench.Procedure(samples=100),
        samples_ns=samples(milliseconds, seed),
        warmup_ns=(int(9e6),),
        noise=bench.TimingNoise(load_before=0.1, others=0.0),
    )


def compared(fused_ms: float, unfused_ms: float, seed: int = 0) -> bench.Comparison:
    pair = {
        "fused": measured(fused_ms, seed, name="fused"),
        "unfused": measured(unfused_ms, seed + 1, name="unfused", fused=False),
    }
    return bench.Comparison(measurements=pair, twin=measured(fused_ms, seed + 2, name="fused"))


def a_run(
    folder: Path, name: str = "digits", top1: tuple[float, ...] = (50.0, 97.5, 96.0), expect: float | None = 97.0
) -> Path:
    run = folder / "runs" / name
    run.mkdir(parents=True)
    lines = [{"kind": "start", "plan": {"epochs": len(top1)}}]
    lines += [
        {
            "kind": "epoch",
            "epoch": epoch,
            "loss": 2.0 / epoch,
            "val_loss": 2.1 / epoch,
            "top1": value,
            "images_per_s": 512,
        }
        for epoch, value in enumerate(top1, 1)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.json").write_text(
        json.dumps({"name": "digits", "expect": {"top1": expect, "source": "three seeds"}})
    )
    return run


def an_artifact(folder: Path, name: str = "onnx-fp32", **changes: Any) -> Path:
    """An artifact folder with a sealed manifest, and none of the files that it lists."""
    artifact = folder / "artifacts" / name
    artifact.mkdir(parents=True)
    fields: dict[str, Any] = {
        "runtime": "onnx",
        "precision": "fp32",
        "model": "mobileone_s0",
        "fused": True,
        "drift": 4.14e-7,
        "input_shape": (3, 64, 64),
        "num_classes": 10,
        "dynamic_batch": True,
        "classes": None,
        "preprocessing": {},
        "parity": Parity(difference=1.2e-6, top1_agreement=1.0, tolerance=1e-4, images=2),
        "licence": "Apache-2.0",
        "source": None,
        "details": {},
        "made_with": {"torch": "2.13.0"},
        "files": {
            "model.onnx": StoredFile(num_bytes=8_410_000, sha256="a" * 64),
            "reference.npz": StoredFile(num_bytes=10**9, sha256="c" * 64),
        },
    }
    (artifact / "manifest.json").write_text(render_manifest(Artifact(folder=artifact, **{**fields, **changes})))
    return artifact


def results(folder: Path, *found: bench.Measurement | bench.Comparison, name: str = "machine.jsonl") -> Path:
    path = folder / "results" / name
    bench.append_results(path, found)
    return path


def report(folder: Path, **inputs: list[Path]) -> str:
    write_report(folder / "report.html", **inputs)
    return (folder / "report.html").read_bytes().decode("utf-8")


# ---- what it says ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A page of one run, one artifact, two measurements and one comparison."""
    folder = tmp_path_factory.mktemp("whole")
    file = results(
        folder, measured(6.0, 3, sha256="a" * 64, top1=71.4), measured(2.3, 4, precision="int8"), compared(6, 17)
    )
    return folder, report(folder, runs=[a_run(folder)], results=[file], artifacts=[an_artifact(folder)])


def test_the_figures_on_the_page_are_those_of_the_samples(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    quickest = sorted(samples(2.3, 4))
    median, p90 = statistics.median(quickest) / 1e6, quickest[-1 - 3] / 1e6  # of 100 samples, t = 4: three are left out
    assert f"median latency {median:.2f} ms, p90 {p90:.2f} ms, with 1 thread" in text
    known = f"71.4 % {statistics.median(samples(6.0, 3)) / 1e6:.2f} ms"
    assert f"mobileone_s0 onnx fp32 fused 1 thread, 1×3×64×64 {known}" in text
    assert "9.00 ms 100 quiet" in text  # the first call, the samples, the verdict


def test_what_was_reached_is_held_against_what_was_expected(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    assert "digits reached 97.5 % top-1, in epoch 2 of 3: 0.5 points above the expected 97.0 % (three seeds)" in text
    assert "digits 3 97.5 % 97.0 % 96.0 %" in text  # epochs, best, expected, last


def test_folding_is_told_as_a_ratio_with_its_interval(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    told = re.search(
        r"The fused network is ([\d.]+)x \(95 % CI ([\d.]+)-([\d.]+)\) faster than the unfused network", text
    )
    assert told
    value, low, high = map(float, told.groups())
    a, b = samples(6, 0), samples(17, 1)
    assert value == pytest.approx(math.exp(np.median(np.log(b) - np.log(a))), rel=0.005)
    assert low < value < high
    assert "the same network against itself differs by up to" in text


def test_an_unfused_network_is_called_so_loudly(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    assert "UNFUSED networks are among these: mobileone_s0 onnx fp32." in text
    assert "mobileone_s0 onnx fp32 UNFUSED 1 thread" in text
    assert "onnx fp32 UNFUSED, 1 thread" in text  # in the figure


def test_the_artifact_is_told_by_its_manifest(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    assert "onnx-fp32 fused mobileone_s0 onnx fp32 8.41 MB 4.1e-07 1.2e-06 71.4 % 10 Apache-2.0 aaaaaaaaaaaa" in text


def test_an_unknown_accuracy_is_said_to_be_unknown(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    assert "Not everything measured has a known accuracy; not drawn against it: mobileone_s0 onnx int8" in text


def test_machine_and_procedure_and_sources_are_there(whole: tuple[Path, str]) -> None:
    text = Page(whole[1]).text
    for said in (
        "Test Chip 9",
        "16.0 GiB",
        "onnxruntime 1.32.0",
        "20 calls and 1 s warm-up, then 100 samples",
        "seed 0",
    ):
        assert said in text
    assert "The raw samples are in machine.jsonl" in text
    assert "onefold bench onnx-fp32" in text


def deployed(folder: Path, **verdicts: str) -> str:
    """The page of onnx-fp32, 6 ms, and onnx-int8, 2 ms, of a deployment with these gates."""
    files = [StoredFile(num_bytes=8_410_000, sha256=letter * 64) for letter in "ab"]
    proof = {"reference.npz": StoredFile(num_bytes=10**9, sha256="c" * 64)}
    artifacts = [an_artifact(folder, "onnx-fp32", files={"model.onnx": files[0], **proof})]
    artifacts += [an_artifact(folder, "onnx-int8", precision="int8", files={"model.onnx": files[1], **proof})]
    gates = [
        Gate(name=f"onnx-{precision}", kind="accuracy", verdict=verdict, sentence=f"{precision} lost 2 points")  # type: ignore[arg-type]
        for precision, verdict in verdicts.items()
    ]
    write_gates(gates, folder / "artifacts" / "results")
    of_fp32 = measured(6.0, 3, sha256="a" * 64, top1=93.75, top1_count=48)
    of_int8 = measured(2.0, 4, precision="int8", sha256="b" * 64, top1=89.58, top1_count=48)
    file = results(folder, of_fp32, of_int8)
    page = folder / "artifacts" / "results" / "gates.json"
    return Page(report(folder, results=[file], artifacts=artifacts, gates=[page])).text


def test_the_headline_takes_what_keeps_its_accuracy(tmp_path: Path) -> None:
    """It did not look at gates: the fastest was the int8 artifact that had failed its own."""
    text = deployed(tmp_path / "failed", fp32="passed", int8="failed")
    assert "The fastest fused network is mobileone_s0 onnx fp32: median latency 6." in text
    assert re.search(r"mobileone_s0 onnx int8, median latency 2\.\d+ ms, failed its accuracy gate\.", text)
    assert "Lowest median latency, accuracy kept 6." in text
    assert "A gate FAILED: int8 lost 2 points." in text
    assert "mobileone_s0 onnx int8 fused 1 thread, 1×3×64×64 NO 89.6 % (77.8–95.5) 2." in text
    assert "onnx-fp32 fused yes mobileone_s0 onnx fp32" in text
    assert "mobileone_s0 onnx fp32: 93.8 % (83.2–97.9), 6." in text  # of the figure of accuracy against latency
    text = deployed(tmp_path / "undecided", fp32="passed", int8="undecided")
    assert "The fastest fused network is mobileone_s0 onnx fp32" in text
    assert "is undecided: whether it keeps its accuracy cannot be told by 48 photos." in text
    assert "Undecided: int8 lost 2 points." in text
    assert "onnx-int8 fused undecided mobileone_s0" in text
    text = deployed(tmp_path / "none", fp32="failed", int8="undecided")
    assert "None of the measured networks is known to keep its accuracy." in text
    assert "The fastest fused network" not in text
    assert "Lowest median latency – of the measured artifacts none is known" in text
    text = deployed(tmp_path / "both", fp32="passed", int8="passed")
    assert "The fastest fused network is mobileone_s0 onnx int8: median latency 2." in text


def test_what_several_deployments_call_alike_is_named_with_their_folders(tmp_path: Path) -> None:
    artifacts, gates, files = list[Path](), list[Path](), list[Path]()
    stored = {name: StoredFile(num_bytes=8, sha256="a" * 64) for name in ("model.onnx", "reference.npz")}
    for name, verdict in (("first", "passed"), ("second", "undecided"), ("third", "undecided")):
        artifacts.append(an_artifact(tmp_path / name, "onnx-int8", precision="int8", files=stored))
        gate = Gate(name="onnx-int8", kind="accuracy", verdict=verdict, sentence="onnx-int8 lost 1 point")  # type: ignore[arg-type]
        place = tmp_path / name / "artifacts" / "results"
        write_gates([gate], place)
        gates.append(place / "gates.json")
        files.append(results(tmp_path / name, compared(6.0, 17.0)))
    alone = Page(report(tmp_path, results=files[:1], artifacts=artifacts[:1], gates=gates[1:2])).text
    assert "Undecided: onnx-int8 lost 1 point." in alone
    assert ", in first" not in alone
    for name in ("first", "second", "third"):
        (tmp_path / name / "artifacts").rename(tmp_path / name / name)
    artifacts = [tmp_path / name / name / "onnx-int8" for name in ("first", "second", "third")]
    gates = [path.parent / "results" / "gates.json" for path in artifacts]
    text = Page(report(tmp_path, results=files, artifacts=artifacts, gates=gates)).text
    for name in ("second", "third"):
        assert f"Undecided: {name}: onnx-int8 lost 1 point." in text
    assert "several verdicts (first/onnx-int8 passed, second/onnx-int8 undecided, third/onnx-int8 undecided)" in text
    for name in ("first", "second", "third"):
        assert f"1 thread, in {name};" in text


def test_an_accuracy_is_drawn_below_100_percent(tmp_path: Path) -> None:
    """Where it is the same in all epochs, the axis went on to 102 %."""
    drawing = draw_curves("top1", "Top-1", [Curve("a", ((0.0, 97.9), (1.0, 97.9)))], "top-1, %", " %")
    ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", str(drawing.svg))]
    assert 98 in ticks
    assert max(ticks) <= 101
    assert "9\N{NO-BREAK SPACE}% of" in _with_unit("9 % of 100 %")


def test_noise_is_given_with_its_reasons(tmp_path: Path) -> None:
    noisy = bench.Measurement(
        subject=SUBJECT,
        machine=MACHINE,
        procedure=bench.Procedure(),
        samples_ns=samples(6),
        noise=bench.TimingNoise(steal=0.05),
    )
    text = Page(report(tmp_path, results=[results(tmp_path, noisy)])).text
    assert "1 of 1 measured latency came from a noisy machine" in text
    assert "mobileone_s0 onnx fp32: The hypervisor took 5.0 % of the time for others." in text


def test_repeated_measurements_are_one_row_of_process_medians(tmp_path: Path) -> None:
    single = [measured(ms, seed) for seed, ms in enumerate((5.0, 6.0, 9.0))]
    (group,) = group_by_subject(single, {})
    assert group.median_ns == sorted(each.median_ns for each in single)[1]
    assert group.p90_ns == sorted(each.p90_ns or 0 for each in single)[1]
    text = Page(report(tmp_path, results=[results(tmp_path, *single)])).text
    assert "300 in 3 runs" in text


def test_five_processes_are_pooled(tmp_path: Path) -> None:
    rounds = [compared(6, 17, seed) for seed in range(0, 15, 3)]
    inputs = load_report_inputs([], [results(tmp_path, *rounds)], [])
    (pair,) = group_inputs(inputs).pairs
    assert pair.num_processes == 5
    assert pair.sentence().endswith("faster than the unfused network. Over 5 processes.")
    assert 1 / pair.ratio.value == pytest.approx(17 / 6, rel=0.02)
    assert len(group_inputs(load_report_inputs([], [results(tmp_path, *rounds[:4], name="four.jsonl")], [])).pairs) == 4


def test_two_machines_do_not_share_a_figure(tmp_path: Path) -> None:
    other = bench.Machine(chip="Other Chip", architecture="aarch64", cores=8, usable_cores=8, system="Linux 6.1")
    elsewhere = bench.Measurement(
        subject=SUBJECT, machine=other, procedure=bench.Procedure(), samples_ns=samples(1), noise=bench.TimingNoise()
    )
    page = Page(report(tmp_path, results=[results(tmp_path, measured(6), elsewhere)]))
    assert page.tags["svg"] == 2
    assert {"On Test Chip 9, 4 cores", "On Other Chip, 8 cores"} <= set(page.said["h3"])


def test_an_artifact_that_nobody_has_run_is_told_so(tmp_path: Path) -> None:
    page = report(tmp_path, artifacts=[an_artifact(tmp_path, "coreml-fp16", runtime="coreml", parity=None)])
    assert "not run where it was exported" in Page(page).text


def test_accuracy_is_found_through_the_hash_of_the_artifact(tmp_path: Path) -> None:
    artifact = an_artifact(tmp_path, details={"top1": 70.25})
    found = group_inputs(
        load_report_inputs(
            [], [results(tmp_path, measured(6, sha256="a" * 64), measured(7, sha256="d" * 64))], [artifact]
        )
    )
    assert [group.top1 for group in found.groups] == [70.25, None]


def test_an_accuracy_alone_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"top1": 83.25, "top1_on": "photos (val)", "top1_count": 36}
    folder = tmp_path / "elsewhere" / "deep" / "res"
    folder.mkdir(parents=True)
    write_sealed_json(folder / "accuracy.json", {"a" * 64: kept})
    assert main(["report", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert re.search(r"top-1 83\.\d.%\son photos \(val\) \(36 images\)\.", page)
    assert "<title>Accuracy" in page
    said = capsys.readouterr()
    assert "1 file of accuracies" in said.out + said.err
    (folder / "accuracy.json").unlink()
    assert main(["report", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "r.html")]) == 3


def test_an_accuracy_that_was_evaluated_after_measuring_is_found(tmp_path: Path) -> None:
    path, digests = tmp_path / "results" / "accuracy.json", ("a" * 64, "d" * 64, "b" * 64)
    path.parent.mkdir()
    entries = {digest: {"top1": 60.5 + i, "top1_on": "photos"} for i, digest in enumerate(digests)}
    entries[digests[1]]["top1_trained_on"] = 7
    write_sealed_json(path, entries)
    assert find_inputs([tmp_path]).accuracies == [path]
    measured_as = [measured(5 + i, sha256=digest) for i, digest in enumerate(("a" * 64, "d" * 64, "e" * 64))]
    inputs = load_report_inputs([], [results(tmp_path, *measured_as)], [an_artifact(tmp_path)], accuracies=[path])
    assert [group.top1 for group in group_inputs(inputs).groups] == [60.5, 61.5, None]
    assert inputs.notes == ("The accuracy 61.5 % on photos is too high: 7 of these images were trained on.",)
    path.write_text(path.read_text().replace("60.5", "90.5"))
    damaged = load_report_inputs([], [], [], accuracies=[path])
    assert (damaged.accuracies, ["accuracy.json is damaged" in note for note in damaged.notes]) == ({}, [True])
    path.write_text(json.dumps(entries))
    assert "accuracy.json has no checksum" in load_report_inputs([], [], [], accuracies=[path]).notes[0]
    path.write_text("[]")
    damaged = load_report_inputs([], [], [], accuracies=[path])
    assert (damaged.accuracies, damaged.notes) == (
        {},
        ("accuracy.json is damaged and left out: it is not a JSON object that holds anything.",),
    )


# ---- what a run answered ---------------------------------------------------------------------------------------------

JPEG = base64.b64encode(b"\xff\xd8\xff" + bytes(40)).decode()


def answered(run: Path, *lines: object, classes: tuple[str, ...] = ("cat", "dog", "newt"), **head: object) -> Path:
    """predictions.jsonl in the run's folder."""
    first = {"kind": "predictions", "data": "photos (held out)", "classes": list(classes), "count": len(lines), **head}
    text = [line if isinstance(line, str) else json.dumps(line) for line in (first, *lines)]
    (run / "predictions.jsonl").write_text("\n".join(text) + "\n", errors="surrogatepass")
    return run


def an_answer(label: int, answer: int, confidence: float = 0.8, **more: object) -> dict[str, object]:
    return {"name": f"{label}/a.jpg", "label": label, "answer": answer, "rank": int(label != answer)} | (
        {"confidence": confidence, "own": confidence if label == answer else 0.1} | more
    )


def test_answers_are_counted_confused_and_shown(tmp_path: Path) -> None:
    """Ten answers by hand: 7 right; dog is taken for cat twice and newt for dog once."""
    lines = [an_answer(0, 0, 0.95)] * 4 + [an_answer(1, 1)] * 2 + [an_answer(1, 0, 0.6, picture=JPEG)] * 2
    lines += [an_answer(2, 2, 0.5), an_answer(2, 1, 0.99, picture=JPEG, name="newt/odd.jpg")]
    page = Page(report(tmp_path, runs=[answered(a_run(tmp_path), *lines, ece=12.34)]))
    # Wilson's interval of 7 of 10: 39.7 to 89.2 (Brown, Cai and DasGupta, 2001, have 0.397 and 0.892)
    assert "top-1 70.0 % (39.7–89.2), expected calibration error 12.3 %, on 10 images." in page.text
    assert "Most often, dog is predicted as cat: 2 images." in page.text
    assert "The most frequent confusions" not in page.text  # they are in the matrix
    assert "dog 4 50.0 % (15.0–85.0) newt 2 50.0 % (9.5–90.5) cat 4 100.0 % (51.0–100.0)" in page.text
    assert page.tags["img"] == 3
    assert [link for link in page.links if link.startswith("data:")] == [f"data:image/jpeg;base64,{JPEG}"] * 3
    assert "predicted dog, 99 % label newt, 10 % newt/odd.jpg" in page.text
    assert "img-src data:" in unescape(report(tmp_path, runs=[tmp_path / "runs" / "digits"]))


def test_many_classes_have_tables_in_place_of_a_matrix(tmp_path: Path) -> None:
    classes = tuple(f"class {c}" for c in range(50))
    lines = [an_answer(c, c if c % 5 else (c + 1) % 50) for c in range(50)]
    page = Page(report(tmp_path, runs=[answered(a_run(tmp_path), *lines, classes=classes)]))
    assert "Confusion matrix" not in page.text
    assert "The worst 30 of 50 classes." in page.text
    assert "10 of 10." not in page.text
    assert "class 5 class 6 1 100.0 %" in page.text


def test_what_stands_in_predictions_cannot_break_the_page(tmp_path: Path) -> None:
    hostile = [
        an_answer(0, 1, name=HOSTILE, picture=JPEG),
        an_answer(0, 1, picture='x" onerror="alert(1)'),
        an_answer(0, 1, picture=base64.b64encode(b"<svg onload=alert(1)>").decode()),
        an_answer(0, 1, picture=base64.b64encode(b"\xff\xd8\xff" + bytes(200_000)).decode()),
        an_answer(0, 1, picture=["a"]),
        an_answer(7, 1),
        an_answer(0, -2),
        an_answer(0, 1, confidence=math.nan),
        an_answer(0, 1, confidence=7),
        {"label": True, "answer": 0},
        {"label": "cat"},
        "{",
        "[]",
    ]
    text = report(tmp_path, runs=[answered(a_run(tmp_path), *hostile, classes=(HOSTILE, "dog"), data=HOSTILE)])
    page = Page(text)
    assert page.handlers == []
    assert page.tags["script"] == 0
    assert page.tags["svg"] == text.count("<svg viewBox")
    assert page.tags["img"] == 1
    assert "6 lines of the predictions of digits are damaged." in page.text


@pytest.mark.parametrize("first", ["", "{", '{"kind": "other"}', '{"kind": "predictions", "classes": 3}'])
def test_a_file_that_is_no_predictions_is_said(tmp_path: Path, first: str) -> None:
    run = a_run(tmp_path)
    (run / "predictions.jsonl").write_text(first + "\n")
    assert "The predictions of digits could not be used" in Page(report(tmp_path, runs=[run])).text


def test_what_the_first_look_found_is_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    (run / "check.json").write_text(json.dumps({"findings": [{"text": "3 images are black", "is_error": False}, 7]}))
    assert (
        "The check of the data before training found: digits: 3 images are black"
        in Page(report(tmp_path, runs=[run])).text
    )


@pytest.mark.parametrize("damage", [False, True])
def test_what_the_data_were_read_as_is_told(tmp_path: Path, damage: bool) -> None:
    run = a_run(tmp_path)
    info = DatasetInfo(
        place="photos",
        container="class folders",
        classes=("cat", "dog"),
        class_order="sorted by name",
        splits=(SplitInfo(name="train", source="train/", num_images=7, images_per_class=(3, 4)),),
        left_out=(LeftOut(count=3, what="images in test/", reason="no labels"),),
        notes=("val/ has no images of dog",),
    )
    values = {"dataset": info.to_dict()} if not damage else {"dataset": {"splits": 3, "notes": [7], "left_out": ["x"]}}
    (run / "data.json").write_text(json.dumps(values))
    text = Page(report(tmp_path, runs=[run])).text
    said = (
        "class folders, 2 classes sorted by name: train 7 images (train/)",
        "val/ has no images of dog",
        "left out: 3 images",
    )
    assert all((sentence in text) is not damage for sentence in said)


# ---- a page that holds -----------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_loads_nothing(whole: tuple[Path, str]) -> None:
    folder, text = whole
    page = Page(text)
    assert all(link.startswith("#") for link in page.links)
    targets = [link[1:] for link in page.links]
    assert set(targets) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags["script"] == page.tags["img"] == page.tags["link"] == page.tags["iframe"] == 0
    outside = [each for each in re.findall(r"https?://[^\s\"<]+|@import|url\((?!#)", text) if "www.w3.org" not in each]
    assert outside == []
    assert "default-src 'none'" in unescape(text)
    assert str(folder) not in text
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_figures_and_tables_can_be_read_without_eyes(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    assert page.tags["svg"] == 5  # accuracy, loss, ratios, latencies, accuracy against latency
    assert page.tags["desc"] == page.tags["figcaption"] == 5
    assert all(page.said["desc"])
    assert page.tags["title"] == 6  # the page's own too
    assert page.tags["caption"] == page.tags["table"] == 4
    assert "onnx int8, 1 thread: median" in " ".join(page.said["desc"]).replace("\N{NO-BREAK SPACE}", " ")


def test_axes_have_units_and_colours_come_from_the_page(whole: tuple[Path, str]) -> None:
    drawn = " ".join(Page(whole[1]).said["svg"])
    for unit in (
        "top-1 accuracy, %",
        "loss (cross-entropy), nats",
        "latency of one call, milliseconds",
        "median latency, milliseconds",
    ):
        assert unit in drawn
    used = set(re.findall(r"(?:fill|stroke): (#\w+|[a-z]+\([^)]*\)|\w+)", re.sub(r"<style>.*?</style>", "", whole[1])))
    assert all(colour == "none" or colour.startswith("var(--") for colour in used), used


def test_the_same_inputs_give_the_same_bytes_in_any_process(whole: tuple[Path, str], tmp_path: Path) -> None:
    """With another hash seed and another matplotlib style; and neither torch nor a runtime is imported on the way."""
    folder, text = whole
    (tmp_path / "matplotlibrc").write_text("svg.fonttype: path\nfont.size: 20\naxes.grid: False\n")
    code = (
        "import sys; from pathlib import Path; from onefold.report import write_report\n"
        "root, out = map(Path, sys.argv[1:])\n"
        "write_report(out, runs=[root / 'runs/digits'], results=[root / 'results/machine.jsonl'],"
        " artifacts=[root / 'artifacts/onnx-fp32'])\n"
        "assert not {'torch', 'onnxruntime', 'openvino', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    changed = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "again.html")], check=True, env=changed)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_no_name_can_break_the_page(tmp_path: Path) -> None:
    run = a_run(tmp_path, "r\udcff <script>alert(3)<script>")
    log = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**log, "name": HOSTILE, "expect": {"top1": 99.0, "source": HOSTILE}}))
    words = dict.fromkeys(("model", "runtime", "precision", "name"), HOSTILE)
    found = [measured(6, top1=70.0, **words), measured(7, 1, input_shape=[HOSTILE], sha256=HOSTILE)]
    hostile = bench.Machine(
        **{**MACHINE.to_dict(), "chip": HOSTILE, "versions": {HOSTILE: HOSTILE}, "features": (HOSTILE,)}
    )
    elsewhere = bench.Measurement(
        subject=words, machine=hostile, procedure=bench.Procedure(), samples_ns=samples(3), noise=bench.TimingNoise()
    )
    names = {HOSTILE: measured(3, name=HOSTILE), "b": measured(4, 1, name="b")}
    contest = bench.Comparison(measurements=names, twin=measured(3, 2))
    strange = dict.fromkeys(("model", "runtime", "precision", "licence", "source"), HOSTILE)
    artifact = an_artifact(tmp_path, "a <b>", classes=[HOSTILE] * 10, made_with={HOSTILE: HOSTILE}, **strange)
    page = Page(
        report(tmp_path, runs=[run], results=[results(tmp_path, *found, elsewhere, contest)], artifacts=[artifact])
    )
    assert page.tags["script"] == page.tags["img"] == 0
    assert page.handlers == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") for link in page.links)
    assert '"><script>alert(1)</script>' in page.text  # shown, as text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff]", page.text)


@given(st.text(max_size=40))
@settings(max_examples=15, deadline=None)
def test_text_comes_out_as_it_went_in(text: str) -> None:
    """A note with any text in it stands on the page as that text, less what cannot be shown, and adds no element."""
    data = group_inputs(ReportInputs())
    page, bare = Page(render_page(data, [f"[{text}]"])), Page(render_page(data, ["-"]))
    assert page.tags == bare.tags
    shown = page.said["main"][0][page.said["main"][0].index("[") + 1 : page.said["main"][0].rindex("]")]
    assert "".join(shown.split()) == "".join(printable(text).split())


def test_long_text_is_cut_in_its_middle() -> None:
    assert one_line("a" * 300 + "b" * 300, 21) == "a" * 10 + "…" + "b" * 10
    assert one_line("one\n two\t") == "one two"


def test_runs_with_the_same_images_are_compared_and_the_same_answers_told_once(tmp_path: Path) -> None:
    def lines(*answers: int) -> list[dict[str, object]]:
        return [an_answer(at % 3, answer, name=f"{at}.jpg") for at, answer in enumerate(answers)]

    runs = [a_run(tmp_path, name) for name in ("probe", "copy", "better")]
    for run, answers in zip(runs, ((0, 1, 1, 1), (0, 1, 1, 1), (0, 1, 2, 1)), strict=True):
        answered(run, *lines(*answers))
    page = Page(report(tmp_path, runs=runs))
    assert "3 runs compared on the same 4 images, the best first, with 95 % intervals" in page.text
    # Agresti and Min: (1 lost - 0 won) / 6, give or take 1.96 sqrt(2 / 6 - 1 / 36) / sqrt(6)
    assert "better 75.0 % (30.1–95.4) – – – – probe 50.0 % (15.0–85.0) 25.0 (−27.6 to 60.9) 0 1 –" in page.text
    assert page.text.count("Predictions of ") == 2
    assert "Predictions of probe and copy They predict the same class for every image" in page.text


def test_what_no_run_has_is_not_told_and_has_no_column(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, name, expect=None) for name in ("first", "second")]
    page = Page(report(tmp_path, runs=runs))
    assert page.text.count("expected") == 0
    assert page.text.count("first reached 97.5 % top-1, in epoch 2 of 3.") == 2  # the best, and each
    assert "first reached 97.5 % top-1, in epoch 2 of 3. second" in page.text
    assert "first 3 97.5 % 96.0 %" in page.text  # epochs, best, last
    runs.append(a_run(tmp_path, "third"))
    text = Page(report(tmp_path, runs=runs)).text
    assert "first reached 97.5 % top-1, in epoch 2 of 3. Its recipe states no expected accuracy." in text
    assert "first 3 97.5 % – 96.0 %" in text


def test_images_without_names_of_their_own_are_not_compared(tmp_path: Path) -> None:
    runs = [answered(a_run(tmp_path, name), an_answer(0, 0), an_answer(0, 1)) for name in ("a", "b")]
    page = Page(report(tmp_path, runs=runs))
    assert "compared on the same" not in page.text
    assert page.text.count("Predictions of ") == 2


def test_a_fitted_head_is_what_a_run_without_epochs_has_reached(tmp_path: Path) -> None:
    run = a_run(tmp_path, "probe")
    log = [{"kind": "start"}, {"kind": "evaluation", "epoch": 0, "step": 0, "top1": 85.0, "val_loss": 0.5}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    page = Page(report(tmp_path, runs=[run]))
    assert "probe reached 85.0 % top-1, before its first epoch, as the network it began with" in page.text
    assert "has not finished an epoch" not in page.text


def test_an_artifact_has_the_score_of_its_network_where_it_was_not_scored(tmp_path: Path) -> None:
    run = answered(a_run(tmp_path), *[an_answer(0, 0)] * 3, an_answer(0, 1), sha256="d" * 64)
    page = Page(report(tmp_path, runs=[run], artifacts=[an_artifact(tmp_path, details={"network": "d" * 64})]))
    assert "network: 75.0 % (30.1–95.4)" in page.text
    assert "Top-1 of the network: the run's own, where the artifact itself was not evaluated." in page.text


def test_mistakes_on_nearly_the_same_image_are_one_picture(tmp_path: Path) -> None:
    wrong = an_answer(0, 1, picture=JPEG, alike=["0/b.jpg", "0/c.jpg"])
    page = Page(report(tmp_path, runs=[answered(a_run(tmp_path), wrong)]))
    assert "and 2 nearly the same Nearly the same: 0/b.jpg, 0/c.jpg" in page.text


# ---- inputs that are not there ---------------------------------------------------------------------------------------


def test_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="something to report"):
        write_report(tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("only", ["runs", "results", "artifacts"])
def test_each_kind_of_input_is_enough(tmp_path: Path, only: str) -> None:
    given = {
        "runs": lambda: [a_run(tmp_path)],
        "results": lambda: [results(tmp_path, measured(6))],
        "artifacts": lambda: [an_artifact(tmp_path)],
    }
    text = Page(report(tmp_path, **{only: given[only]()})).text
    told = {"runs": "No training run was given.", "results": "No measured latency was given."}
    told["artifacts"] = "No exported artifact was given."
    for kind, sentence in told.items():
        assert (sentence in text) == (kind != only)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    empty, odd, bare = (tmp_path / name for name in ("empty", "odd", "bare"))
    for folder in (empty, odd, bare):
        folder.mkdir()
    (odd / "log.jsonl").write_text(
        '{"kind": "epoch", "epoch": 1}\n{"kind": "epoch", "epoch": 2, "top1": null, "loss": 1e999}\n'
        '{"kind": "epoch"}\n7\n{"kind": "epoch", "epoch": "x"}\n{"kind": "epo'
    )
    (odd / "recipe.json").write_text("[]")
    (bare / "manifest.json").write_text("{}")
    changed = an_artifact(tmp_path, "changed")
    manifest = changed / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fused": true', '"fused": false'))
    torn = results(tmp_path, measured(6))
    with torn.open("a") as file:
        file.write('{"kind": "measurement", "subj')
    rubbish = tmp_path / "rubbish.jsonl"
    rubbish.write_text("rubbish")
    blank = tmp_path / "blank.jsonl"
    blank.touch()
    text = Page(
        report(
            tmp_path,
            runs=[empty, odd, tmp_path / "nowhere"],
            results=[torn, rubbish, blank, tmp_path / "gone.jsonl"],
            artifacts=[empty, bare, changed],
        )
    ).text
    for said in (
        "The run empty has no log",
        "The run nowhere has no log",
        "2 lines of the log of odd are damaged.",
        "odd has no accuracy in its log.",
        "machine.jsonl, line 2: left out, it was cut off while being written, or is damaged.",
        "The results rubbish.jsonl could not be used",
        "blank.jsonl holds no results.",
        "The results gone.jsonl could not be used: cannot read results from gone.jsonl",
        "The artifact empty could not be used: empty is not an artifact: it has no manifest.json",
        "The artifact bare could not be used: bare/manifest.json is not the manifest of an artifact",
        "The artifact changed could not be used: changed/manifest.json was changed after the export",
        "Nothing measured has a known accuracy",
    ):
        assert said in text
    assert str(tmp_path) not in text


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"onefold\[report\]"):
        write_report(tmp_path / "r.html", runs=[a_run(tmp_path)])


# ---- finding them ----------------------------------------------------------------------------------------------------


def test_inputs_are_found_by_what_they_contain(tmp_path: Path) -> None:
    """Under any name and at any depth; what is no run, result or artifact is left alone."""
    run = a_run(tmp_path / "a" / "b" / "c")
    sealed = run / "best"  # a checkpoint has a manifest too
    sealed.mkdir()
    (sealed / "manifest.json").write_text('{"format": 1, "files": {}}')
    answered(run, an_answer(0, 0))
    artifact = an_artifact(tmp_path / "deploy" / "phones")
    bench.append_results(tmp_path / "measured" / "today.jsonl", [measured(6)])
    bench.append_results(tmp_path / "one.jsonl", [compared(6, 17)])
    other = tmp_path / "other" / "results"
    other.mkdir(parents=True)
    (other / "log.jsonl").write_text('{"level": "info"}\n')
    (other / "table.jsonl").write_text('{"kind": "int8-accuracy"}\n')
    found = find_inputs([tmp_path, tmp_path / "a"])
    assert (found.runs, found.artifacts) == ([run], [artifact])
    assert found.results == [tmp_path / "one.jsonl", tmp_path / "measured" / "today.jsonl"]
    assert str(found) == "1 run, 2 results files and 1 artifact"
    assert find_inputs([tmp_path / "one.jsonl"]).results == [tmp_path / "one.jsonl"]


def test_damaged_results_and_runs_are_not_left_out_in_silence(tmp_path: Path) -> None:
    """Whatever became of the start of a file by which it is found; other people's JSON lines are no results."""
    (tmp_path / "labels.jsonl").write_text('{"file_name": "a.jpg", "label": "cat"}\n')
    whole = results(tmp_path, measured(6)).read_bytes()
    for name, content in {
        "empty": b"",
        "other": b"\x89PNG\r\n",
        "list": b'["a"]\n',
        "deep": b'{"a":' * 20_000,
        "flipped": whole.replace(b'"kind"', b'"kinf"', 1),
        "zeros": bytes(len(whole)),
    }.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "recipe.json").write_text("{}")
    (tmp_path / "also" / "last").mkdir(parents=True)
    (tmp_path / "also" / "log.jsonl").write_bytes(b"\0" * 99)
    found = write_report_page([tmp_path], tmp_path / "r.html")
    assert [path.stem for path in found.damaged] == ["deep", "empty", "flipped", "list", "other", "zeros"]
    assert found.results == [tmp_path / "results" / "machine.jsonl"]
    assert found.runs == [tmp_path / "also", tmp_path / "run"]
    assert "; zeros.jsonl is left out: it has no line as `onefold bench` writes them" in str(found)
    text = Page((tmp_path / "r.html").read_text()).text
    assert "The report may lack results: flipped.jsonl is left out" in text
    assert "The run run has no log: log.jsonl is missing or cannot be read." in text
    with pytest.raises(BadData, match=r"there is no run, .*; empty\.jsonl is left out"):
        (tmp_path / "alone").mkdir()
        (tmp_path / "empty.jsonl").rename(tmp_path / "alone" / "empty.jsonl")
        write_report_page([tmp_path / "alone"], tmp_path / "r.html")


def test_what_is_not_searched_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results(tmp_path, measured(6))
    for name in (".git", ".cache/runs", "a/b/c/d/e/f/g/h/i/j", "locked"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    scan = os.scandir

    def locked(path: Path) -> Any:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    found = write_report_page([tmp_path], tmp_path / "r.html")
    assert str(found) == (
        "no runs, 1 results file and no artifacts; not searched: 1 folder more than 8 levels down, 1 folder that "
        "cannot be read, 2 hidden folders and 1 link to a folder"
    )
    text = Page((tmp_path / "r.html").read_text()).text
    assert (
        "may lack something: not searched: 1 folder more than 8 levels down and 1 folder that cannot be read." in text
    )
    assert "hidden" not in text


def test_nothing_found_is_an_error_that_says_what_was_not_searched(tmp_path: Path) -> None:
    (tmp_path / ".runs").mkdir()
    with pytest.raises(BadData, match=r"no run, result or artifact in .*, not searched: 1 hidden folder: give"):
        write_report_page([tmp_path], tmp_path / "r.html")


def test_a_page_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    results(tmp_path, measured(6))
    with pytest.raises(BadArgument, match=r"is a folder: give the name of the page"):
        write_report_page([tmp_path], tmp_path / "results")
    assert (tmp_path / "results" / "machine.jsonl").is_file()


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "no space to write"), (errno.EROFS, "cannot write")])
@pytest.mark.parametrize("where", ["mkdir", "write_text", "unlink"])
def test_a_full_or_read_only_disk_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    said: str,
    where: str,
) -> None:
    results(tmp_path, measured(6))

    def fails(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), None if where == "write_text" else str(path))

    monkeypatch.setattr(Path, where, fails)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 5
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_a_font_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """matplotlib gives up where it can write neither beside its configuration nor to a temporary folder."""

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "matplotlib.figure":
                raise OSError(errno.EROFS, "Read-only file system")

    results(tmp_path, measured(6))
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 5
    assert "set MPLCONFIGDIR to a folder you can write to" in capsys.readouterr().err


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nanoseconds", "said"),
    [
        (None, "–"),
        (850.4, "0.850 µs"),
        (45_600, "45.6 µs"),
        (123_456, "0.123 ms"),
        (3_416_000, "3.42 ms"),
        (34_160_000, "34.2 ms"),
        (1_234_000_000, "1234 ms"),
        (12_340_000_000, "12.3 s"),
    ],
)
def test_latencies_in_words(nanoseconds: float | None, said: str) -> None:
    assert format_latency(nanoseconds).replace("\N{NO-BREAK SPACE}", " ") == said


def test_other_words() -> None:
    assert [format_significant(each) for each in (0, 0.04123, 9.999, 412.7, 123456.0)] == [
        "0",
        "0.0412",
        "10.00",
        "413",
        "123456",
    ]
    assert [format_count(each, "run") for each in (0, 1, 2)] == ["no runs", "1 run", "2 runs"]
    assert [join_words(each) for each in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert [format_size(each).replace("\N{NO-BREAK SPACE}", " ") for each in (None, 999, 8_410_000)] == [
        "–",
        "0.999 kB",
        "8.41 MB",
    ]


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ({"model": "m", "runtime": "onnx", "precision": "fp32", "name": "onnx fp32"}, "m onnx fp32"),
        ({"model": "m", "name": "unfused"}, "m"),
        ({"model": "m", "runtime": "onnx", "name": "m onnx NOT FUSED"}, "m onnx"),
        ({"model": "m", "runtime": "onnx", "name": "m onnx #2"}, "m onnx (m onnx #2)"),
        ({"model": "m", "name": "planted"}, "m (planted)"),
        ({"name": "a"}, "a"),
        ({}, "unnamed"),
    ],
)
def test_a_label_says_what_is_known(subject: dict[str, str], said: str) -> None:
    assert subject_label(subject) == said
