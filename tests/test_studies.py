"""Studies: run, kept, gone on with, shown; on networks of a few channels, and without a word about their times."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from onefold import bench
from onefold.bench import Machine, Measurement, Procedure, Ratio
from onefold.cli import main
from onefold.commands import study as command
from onefold.errors import BadArgument, BadData, MissingExtra
from onefold.report.study_figures import draw_study_figure, standalone_svg
from onefold.report.study_results import Conclusion, read_study
from onefold.studies import find_study, study_names
from onefold.studies.correlation import NETWORKS, network_points, table_9_correlations
from onefold.studies.networks import prepare
from onefold.studies.pareto import front
from onefold.studies.plain_network import ACTIVATIONS, plain_network
from onefold.studies.published import TABLE_9
from onefold.studies.rank_correlation import average_ranks, rank_correlation, spearman_p_value
from onefold.studies.resolution import find_crossing
from onefold.studies.run_study import StudyOptions
from onefold.studies.study import (
    Measured,
    Point,
    Published,
    Row,
    Study,
    StudySummary,
    Target,
    grouped_by_baseline,
    latency_tables,
    order_conclusion,
    order_verdict,
    ratio_figure,
    ratio_verdict,
)
from onefold.studies.width_resolution import exponents

QUICK = {"samples": 16, "warmup": 0.0}
SHAPE = (3, 32, 32)


def _tiny(width: int):
    from torch import nn

    from onefold.models.layers import PooledHead, conv_norm

    return nn.Sequential(conv_norm(3, width, 3, 2), nn.ReLU(), PooledHead(width, 4))


def _points() -> list[Point]:
    paper = {4: Published(1.0), 6: Published(1.5), 8: Published(2.5, confirmed=False)}
    return [
        Point(
            name=f"width {width}",
            build=lambda width=width: _tiny(width),
            shape=SHAPE,
            published={"paper ms": paper[width]},
        )
        for width in (4, 6, 8)
    ]


def _summarize(measured: Measured) -> StudySummary:
    paper = {"width 4": 1.0, "width 6": 1.5, "width 8": 2.5}
    return StudySummary(
        tables=latency_tables(measured),
        figures=(ratio_figure(measured, "Widths", paper, "the paper"),),
        conclusions=tuple(order_conclusion(target, rows, paper) for target, rows in measured.rows.items()),
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study of three tiny networks, found under its name; the machine's limits are not measured."""
    study = Study(
        name="tiny",
        question="What does a width cost?",
        source="nobody",
        groups=lambda: grouped_by_baseline(_points()),
        summarize=_summarize,
    )
    monkeypatch.setattr(command, "find_study", lambda name: study)
    monkeypatch.setattr(command, "load_or_measure_roofline", lambda *_, **__: bench.Roofline(limits=(), features=()))
    return study


def test_a_study_is_measured_kept_and_not_measured_again(tiny: Study, tmp_path: Path):
    said: list[str] = []
    first = command.study("tiny", results=tmp_path, say=said.append, **QUICK)
    assert "3 rows of a network in a runtime, about" in said[0]
    (table,) = first.result.tables
    assert (table.caption, [row[0] for row in table.rows]) == ("onnx fp32", ["width 4", "width 6", "width 8"])
    assert table.rows[2][table.columns.index("paper ms")] == "2.5 (not confirmed)"
    (row,) = [json.loads(line) for line in first.samples.read_text().splitlines()]
    assert len(row["measurements"]["width 8"]["samples_ns"]) == 16
    assert row["measurements"]["width 8"]["subject"]["measured_on"] == first.result.date
    kept = first.samples.read_bytes()
    again = command.study("tiny", results=tmp_path, **QUICK)
    assert first.samples.read_bytes() == kept
    assert again.result == first.result
    command.study("tiny", results=tmp_path, samples=17, warmup=0.0)  # another procedure: other rows
    assert len(first.samples.read_text().splitlines()) == 2


def test_a_row_that_was_lost_is_measured_beside_the_baseline_again(tiny: Study, tmp_path: Path):
    first = command.study("tiny", results=tmp_path, **QUICK)
    first.samples.write_text(first.samples.read_text().replace("width 6", "width 7"))  # its checksum fails
    again = command.study("tiny", results=tmp_path, **QUICK)
    assert [row[0] for row in again.result.tables[0].rows] == ["width 4", "width 6", "width 8"]


def test_what_the_minutes_do_not_allow_is_named_and_done_by_the_same_command(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    monkeypatch.setattr("onefold.studies.run_study._EXPORT_S", 100.0)  # of which there is time for two
    some = command.study("tiny", results=tmp_path, minutes=4.8, say=said.append, **QUICK)
    assert "it ends after about 4.8 min (--minutes)" in said[0]
    assert [row[0] for row in some.result.tables[0].rows] == ["width 4", "width 6"]
    assert "Not measured for want of time: width 8 in onnx fp32." in some.result.notes
    assert "left out for want of time: 1 row; the same command goes on" in said[-1]
    rest = command.study("tiny", results=tmp_path, **QUICK)
    assert [row[0] for row in rest.result.tables[0].rows] == ["width 4", "width 6", "width 8"]


def test_a_network_that_cannot_be_exported_is_named_and_the_others_are_measured(tiny: Study, tmp_path: Path):
    from torch import nn

    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _tiny(4)

        def forward(self, x):
            return 0 * self.net(x)  # nothing could be compared with it

    points = [_points()[0], Point(name="refused", build=Refused, shape=SHAPE), _points()[1]]
    object.__setattr__(tiny, "groups", lambda: [points])
    found = command.study("tiny", results=tmp_path, **QUICK)
    assert [row[0] for row in found.result.tables[0].rows] == ["width 4", "width 6"]
    assert any(note.startswith("refused was not measured in onnx fp32: ") for note in found.result.notes)


def test_a_network_whose_package_is_missing_is_named(tiny: Study, tmp_path: Path):
    def missing():
        raise MissingExtra("timm:x needs timm", "timm")

    object.__setattr__(tiny, "groups", lambda: [[*_points(), Point(name="theirs", build=missing)]])
    found = command.study("tiny", results=tmp_path, **QUICK)
    assert any(note.startswith("theirs was not measured: timm:x needs timm") for note in found.result.notes)


def test_int8_and_unfused_networks_are_studied(tiny: Study, tmp_path: Path):
    unfused = Point(name="unfused", build=lambda: _tiny(4), shape=SHAPE, is_fused=False)
    object.__setattr__(tiny, "groups", lambda: [[_points()[0], unfused]])
    found = command.study("tiny", results=tmp_path, precision=["fp32", "int8"], **QUICK)
    assert [table.caption for table in found.result.tables] == ["onnx fp32", "onnx int8"]
    lines = [json.loads(line) for line in found.samples.read_text().splitlines()]
    assert [line["measurements"]["unfused"]["subject"]["fused"] for line in lines[:1]] == [False]


def test_the_report_has_a_section_of_the_study_and_its_times_are_nowhere_else(tiny: Study, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    found = command.study("tiny", results=tmp_path / "results", **QUICK)
    assert all(path.read_text().startswith("<svg") for path in found.figures)
    assert len(found.figures) == 1
    assert read_study(found.outcome) == found.result
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "tiny: What does a width cost?" in page
    assert "2.5 (not confirmed)" in page
    assert "No measured latency was given." in page
    assert "1 study" in capsys.readouterr().out
    found.outcome.write_text(found.outcome.read_text().replace("width 4", "width 5", 1))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    assert "could not be used" in (tmp_path / "page.html").read_text()


# ------------------------------------------------------------------------------------ on the command line


def test_the_studies_are_listed_and_a_mistyped_one_is_told(capsys):
    assert main(["study", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:]] == list(study_names())
    assert main(["study", "activation"]) == 2
    assert "did you mean activations" in capsys.readouterr().err
    assert main(["study"]) == 2
    assert "onefold study --list" in capsys.readouterr().err


def test_the_command_prints_the_table_and_the_conclusion(tiny: Study, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("onefold.studies.find_study", lambda name: tiny)
    given = ["study", "tiny", "--results", str(tmp_path), "--samples", "16", "--warmup", "0"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "x width 4 (95 % CI)" in out
    assert "onnx fp32: the paper: width 4 1.00x, width 6 1.50x and width 8 2.50x; here: " in out
    assert main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "tiny"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"samples": 8}, "16 samples or more"),
        ({"minutes": 0.0}, "minutes must be above 0"),
        ({"to": "nowhere"}, "nowhere"),
        ({"precision": "fp16"}, "onnx has none of these precisions"),
        ({"to": ()}, "no runtime to measure in"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(tiny: Study, tmp_path: Path, given: dict, says: str):
    with pytest.raises(BadArgument, match=says):
        command.study("tiny", results=tmp_path, **{**QUICK, **given})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ the studies


@pytest.mark.parametrize("name", study_names())
def test_every_study_has_groups_of_two_or_more_under_names_of_their_own(name: str):
    study = find_study(name)
    assert study.name == name
    for group in study.groups():
        names = [point.name for point in group]
        assert len(names) > 1
        assert len(set(names)) == len(names)
    assert StudyOptions(runtimes=["onnx"]).targets(study)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_have_the_same_convolutions_and_finite_answers(activation: str):
    import torch
    from torch import nn

    net = plain_network(activation).eval()
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) == 30
    widths = [3, *[32] * 8, *[64] * 8, *[128] * 8, *[256] * 6]
    assert [(c.in_channels, c.out_channels) for c in convs] == list(itertools.pairwise(widths))
    with torch.inference_mode():
        assert net(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_dynamic_activations_as_initialized_are_near_relu():
    """Their coefficients are 1 and 0 plus a small number: with all of those 0 they are ReLU."""
    import torch
    from torch import nn

    x = torch.randn(2, 8, 4, 4)
    for name in ("DynamicReLU-A", "DynamicReLU-B", "Dynamic Shift-Max"):
        act = ACTIVATIONS[name](8)
        for parameter in act.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(act(x), torch.relu(x)), name


def test_a_point_is_built_alike_each_time_and_its_digest_is_of_its_structure():
    first, second, other = (prepare(point) for point in (_points()[0], _points()[0], _points()[1]))
    assert first.digest == second.digest != other.digest
    assert first.is_fused
    assert first.cost.params == 3 * 9 * 4 + 4 + 4 * 4 + 4
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(bool((a == b).all()) for a, b in pairs)


def test_the_correlation_has_25_networks_or_more_with_the_papers_numbers():
    points = {point.name: point for point in network_points()}
    assert len(points) >= 25
    assert sum(not name.startswith("timm:") for name in NETWORKS.values()) == 16
    assert str(points["MobileOne-S0"].published["paper, CPU ms"]) == "10.55"
    assert points["Mobile-Former-294M"].published["top-1 %"].value == 77.9


def test_table_9_gives_other_correlations_than_table_1():
    """By scipy's spearmanr of the 30 rows: the CPU's 0.43 and 0.47, where Table 1 states 0.06 and 0.07."""
    assert len(TABLE_9) == 30
    found = table_9_correlations()
    assert found["CPU"]["MACs"].rho == pytest.approx(0.42514, abs=1e-5)
    assert found["CPU"]["MACs"].p_value == pytest.approx(0.019181, abs=1e-6)
    assert found["CPU"]["parameters"].rho == pytest.approx(0.47263, abs=1e-5)
    assert found["iPhone"]["parameters"].p_value == pytest.approx(0.0955196, abs=1e-6)


def test_branches_are_measured_unfused_beside_the_one_fused_network():
    fused, *unfused = find_study("branches").groups()[0]
    assert prepare(fused).cost.macs == 275_110_400
    four = prepare(unfused[3])
    assert (four.is_fused, four.cost.macs) == (False, 1_051_935_232)


def test_layers_cost_what_the_papers_table_3_says():
    group = next(group for group in find_study("standard-vs-separable").groups() if len(group) == 4)
    for point in group:
        cost = prepare(point).cost
        assert cost.macs / 1e6 == pytest.approx(point.published["paper, MACs M"].value, rel=5e-3)
        assert cost.params / 1e6 == pytest.approx(point.published["paper, params M"].value, rel=3e-2)


def test_depth_and_width_cost_what_the_papers_tables_4_and_5_say():
    for group in find_study("depth-width").groups():
        for point in group:
            cost = prepare(point).cost
            assert cost.macs / 1e6 == pytest.approx(point.published["paper, MACs M"].value, rel=3e-3)
            assert cost.params / 1e6 == pytest.approx(point.published["paper, params M"].value, rel=2e-2)


def test_mobileformer_loses_the_part_and_keeps_the_rest():
    from torch import nn

    from onefold.models.layers import DynamicReLU
    from onefold.models.mobileformer_blocks import Former, FormerToMobile, MobileToFormer
    from onefold.studies.tokens import _build

    def count(without: tuple[str, ...]) -> list[int]:
        kinds: tuple[type[nn.Module], ...] = (MobileToFormer, Former, FormerToMobile, DynamicReLU)
        modules = list(_build(6, 192, without).modules())
        return [sum(isinstance(module, kind) for module in modules) for kind in kinds]

    assert count(()) == [12, 11, 11, 22]  # the head has a bridge of its own
    assert count(("former",)) == [12, 0, 11, 22]
    assert count(("to_former", "to_mobile")) == [1, 11, 0, 22]
    assert count(("act",)) == [12, 11, 11, 0]
    with pytest.raises(ValueError, match="no part"):
        count(("nothing",))


def test_mobileformer_with_tokens_of_another_kind_is_prepared():
    names = {point.name: point for group in find_study("tokens").groups() for point in group}
    assert str(names["1 token of 192"].published["top-1 %"]) == "77.1"
    assert str(names["6 tokens of 64"].published["top-1 %"]) == "76.8 (not confirmed)"
    whole, one = (prepare(names[name]).cost for name in ("6 tokens of 192", "1 token of 192"))
    assert whole.params - one.params == 5 * 192
    assert one.macs < whole.macs


def test_a_crossing_is_found_where_the_lines_cross_and_nowhere_else():
    sizes = [128, 256, 512, 1024]
    exact = [(2.0, 2.0, 2.0), (2**0.5, 2**0.5, 2**0.5), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)]
    found = find_crossing(sizes, exact)
    assert found is not None
    assert (found.size, found.share) == (pytest.approx(512), 1.0)
    wide = find_crossing(sizes, [(value, value / 1.1, value * 1.1) for value, _, _ in exact])
    assert wide is not None
    assert 400 < wide.low < 512 < wide.high < 620
    assert find_crossing(sizes, [(2.0, 1.9, 2.1)] * 4) is None


def test_a_front_leaves_out_what_is_dominated():
    points = [("slow", 3.0, 70.0), ("best", 2.0, 75.0), ("quick", 1.0, 60.0), ("same", 2.0, 74.0)]
    assert front(points) == ["quick", "best"]


def test_pareto_takes_the_rows_of_correlation():
    study = find_study("pareto")
    assert study.file_name == "correlation"
    names = [[point.name for point in group] for group in study.groups()]
    assert names == [[point.name for point in group] for group in find_study("correlation").groups()]


def _invented(study: Study) -> Measured:
    """Rows of all of a study's networks, with times that were invented: what a study says must not depend on them."""
    target, rows = Target(runtime="onnx", precision="fp32"), {}
    for group in study.groups():
        for number, point in enumerate(group):
            subject = {"macs": 1e6 * (3 + number), "params": 1e6 + number, "num_bytes": 4_000_000, "precision": "fp32"}
            measurement = Measurement(
                subject=subject, machine=Machine.detect(()), procedure=Procedure(), samples_ns=(1_000_000 + number,)
            )
            value = 1 + 0.1 * number
            ratio = Ratio(value=value, low=0.99 * value, high=1.01 * value)
            row = Row(point=point, baseline=group[0].name, measurement=measurement, ratio=ratio)
            rows.setdefault(point.name, row)
    return Measured(rows={target: rows})


@pytest.mark.parametrize("name", study_names())
def test_every_study_concludes_from_rows_and_from_none(name: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    study = find_study(name)
    summary = study.summarize(_invented(study))
    assert summary.tables
    assert summary.conclusions
    for number, figure in enumerate(summary.figures):
        drawn = draw_study_figure(str(number), figure)
        assert drawn.svg is not None
        assert ElementTree.fromstring(standalone_svg(drawn)).tag.endswith("svg")
    nothing = study.summarize(Measured(rows={Target(runtime="onnx", precision="fp32"): {}}))
    assert not nothing.conclusions
    assert all(draw_study_figure("0", figure).svg is None or figure.series for figure in nothing.figures)


# ------------------------------------------------------------------------------------------- statistics


def _row(name: str, value: float, low: float, high: float, macs: float = 1.0, **values: float) -> Row:
    measurement = Measurement(
        subject={"macs": macs, "params": 1}, machine=Machine.detect(()), procedure=Procedure(), samples_ns=(1000,)
    )
    point = Point(name=name, build=lambda: _tiny(4), values=values)
    return Row(point=point, baseline="a", measurement=measurement, ratio=Ratio(value=value, low=low, high=high))


def test_an_order_is_decided_by_intervals_that_lie_apart():
    rows = {"a": _row("a", 1, 1, 1), "b": _row("b", 1.5, 1.4, 1.6), "c": _row("c", 1.55, 1.45, 1.7)}
    found = order_conclusion(Target(runtime="onnx", precision="fp32"), rows, {"a": 1.0, "b": 3.0, "c": 2.0})
    assert "2 of 3 pairs in the paper's order, 0 in the other, 1 not decided" in found.here
    assert found.verdict == "agrees"
    assert [order_verdict(*each) for each in ((0, 0), (3, 1), (1, 1), (0, 2))] == [
        "not decided",
        "agrees in part",
        "does not agree",
        "does not agree",
    ]


def test_the_noise_of_the_machine_leaves_an_order_undecided():
    noisy = Row(
        point=Point(name="b", build=lambda: _tiny(4)),
        baseline="a",
        measurement=_row("b", 1, 1, 1).measurement,
        ratio=Ratio(value=1.5, low=1.4, high=1.6, noise=2.0),
    )
    assert noisy.bounds == (0.7, 3.2)
    rows = {"a": _row("a", 1, 1, 1), "b": noisy}
    target = Target(runtime="onnx", precision="fp32")
    assert order_conclusion(target, rows, {"a": 1.0, "b": 3.0}).verdict == "not decided"


def test_a_ratio_on_a_noisy_machine_agrees_with_nothing():
    quiet, noisy = _row("b", 8.0, 4.0, 20.0), _row("b", 8.0, 4.0, 20.0)
    noisy = replace(noisy, ratio=replace(noisy.ratio, noise=1.5))
    assert [ratio_verdict(quiet, expected) for expected in (8.4, 25.0)] == ["agrees", "does not agree"]
    assert [ratio_verdict(noisy, expected) for expected in (8.4, 25.0, 40.0)] == [
        "not decided",
        "not decided",
        "does not agree",
    ]


def test_noise_and_limits_that_were_beaten_are_said():
    target = Target(runtime="onnx", precision="fp32")
    scattered = Row(
        point=_points()[0],
        baseline="a",
        measurement=replace(_row("a", 1, 1, 1).measurement, samples_ns=(1000, 9000) * 40),
        ratio=Ratio(value=1.0, low=1.0, high=1.0),
    )
    measured = Measured(rows={target: {"a": scattered}})
    said = [Conclusion(where=where, paper="", here="", verdict="agrees") for where in ("onnx fp32", "onnx int8")]
    assert [each.verdict for each in command._with_noise(said, measured)] == ["agrees, on a noisy machine", "agrees"]
    assert command._limit_notes(measured) == []
    bound = bench.LatencyBound(compute_ns=2000.0, memory_ns=None, how="by hand")
    assert command._limit_notes(measured.with_bounds(lambda _: bound))[0].startswith("1 row had calls quicker than")


def test_exponents_are_found_where_the_law_is_exact():
    rows = [
        _row("", 1.0, 1, 1, macs=width**1.9 * size**2, width=width, resolution=size)
        for width in (0.25, 0.5, 0.75, 1.0)
        for size in (128, 160, 192, 224)
    ]
    found = exponents(rows, lambda row: row.macs)
    assert found["width"] == pytest.approx((1.9, 1.9, 1.9))
    assert found["resolution"] == pytest.approx((2.0, 2.0, 2.0))


def test_spearmans_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(1)
    for count in (4, 9, 40):
        x = random.integers(0, 6, count).astype(float)  # with ties
        y = x + random.normal(0, 2, count)
        found, expected = rank_correlation(list(x), list(y)), stats.spearmanr(x, y)
        assert found.rho == pytest.approx(expected.statistic)
        assert found.p_value == pytest.approx(expected.pvalue, abs=1e-12)
        assert average_ranks(x) == pytest.approx(stats.rankdata(x))
        assert found.low <= found.rho <= found.high


def test_spearmans_correlation_of_a_known_table():
    """Ten pairs of IQ and hours of television, of textbooks: rho = -29 / 165, p = 0.627188."""
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    found = rank_correlation(iq, hours)
    assert found.rho == pytest.approx(-29 / 165)
    assert found.p_value == pytest.approx(0.627188, abs=1e-6)
    assert spearman_p_value(1.0, 10) == 0.0
    assert not math.isnan(found.low)


def test_a_correlation_of_nothing_is_refused():
    for x, y in (([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), ([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])):
        with pytest.raises(BadData):
            rank_correlation(x, y)


def test_a_conclusion_is_one_line():
    line = str(Conclusion(where="onnx fp32", paper="2x", here="3x", verdict="does not agree"))
    assert line == "onnx fp32: the paper: 2x; here: 3x; does not agree"
