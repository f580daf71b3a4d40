"""Accuracy against latency: fronts by hand, labels that keep off each other, and the columns of what was measured."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onefold import bench
from onefold.report.grouping import MeasurementGroup, group_by_subject, group_inputs, subject_key
from onefold.report.load_results import Accuracy, ReportInputs
from onefold.report.page import render_page
from onefold.report.pareto_figure import (
    Box,
    Label,
    ParetoFigure,
    leader_line,
    pareto_figures,
    pareto_front,
    pareto_points,
    place_labels,
)

MACHINE = bench.Machine(chip="Test Chip 9", architecture="x86_64", cores=4, usable_cores=4, system="Linux 6.1")
AREA = Box(0, 0, 500, 300)


def measured(model: str, precision: str, ms: float, top1: float | None, **more: object) -> bench.Measurement:
    subject = {"model": model, "runtime": "onnx", "precision": precision, "fused": True, **more}
    return bench.Measurement(
        subject=subject if top1 is None else {**subject, "top1": top1},
        machine=MACHINE,
        procedure=bench.Procedure(),
        samples_ns=(int(ms * 1e6),) * 64,
    )


def groups_of(*found: bench.Measurement) -> list[MeasurementGroup]:
    accuracies = {subject_key(m.subject): Accuracy(float(m.subject["top1"])) for m in found if "top1" in m.subject}
    return group_by_subject(found, accuracies)


def figure_of(*found: bench.Measurement) -> tuple[ParetoFigure, str]:
    """The one figure, and what matplotlib drew of it."""
    (figure,) = pareto_figures(groups_of(*found), "pareto")
    return figure, str(figure.drawing.svg).partition("</desc>")[2]


def page_of(*found: bench.Measurement | bench.Comparison) -> str:
    """The page's part about latency."""
    measurements = tuple(each for each in found if isinstance(each, bench.Measurement))
    comparisons = tuple(each for each in found if isinstance(each, bench.Comparison))
    page = render_page(group_inputs(ReportInputs(measurements=measurements, comparisons=comparisons)))
    latency = page[page.index('<section id="latency">') :]
    return latency[: latency.index("</section>")].replace("&nbsp;", " ").replace("\N{NO-BREAK SPACE}", " ")


# ---- the fronts ------------------------------------------------------------------------------------------------------


def test_each_precision_has_its_front_and_all_have_one() -> None:
    """int8's first beats all of fp32 but the most accurate."""
    points = pareto_points(
        groups_of(
            measured("a", "fp32", 2, 70.0),
            measured("b", "fp32", 4, 75.0),
            measured("c", "fp32", 5, 74.0),
            measured("a", "int8", 1, 71.0),
            measured("b", "int8", 3, 70.5),
        )
    )
    told = {(p.label, p.group.subject["precision"]): (p.on_front, p.on_precision_front) for p in points}
    assert told == {
        ("a", "fp32"): (False, True),
        ("b", "fp32"): (True, True),
        ("c", "fp32"): (False, False),
        ("a", "int8"): (True, True),
        ("b", "int8"): (False, False),
    }
    assert {p.series for p in points} == {0, 1}  # colours and markers do not depend on what else was measured
    assert {p.series for p in pareto_points(groups_of(measured("a", "int8", 1, 71.0)))} == {1}


def test_sixty_points_have_a_figure_with_every_precision_in_its_legend() -> None:
    found = [
        measured(
            f"model_{m}", precision, (m + 1) * pace * (1 + 0.05 * r), 60 + 2 * m - loss - 0.1 * r, runtime=f"runtime{r}"
        )
        for m in range(6)
        for r in range(4)
        for precision, pace, loss in (("fp32", 3, 0), ("int8", 1, 0.6), ("bf16", 2, 0.1))
    ]
    figure, drawn = figure_of(*found)
    assert [entry.text for entry in figure.drawing.legend] == ["fp32", "int8", "bf16"]
    labels = re.findall(r"model_\d runtime0", drawn)
    assert len(labels) == 18  # the fastest runtime of each model leads in each precision, and all of them have room
    assert (len(figure.front), len(figure.dominated)) == (18, 54)
    page = page_of(*found)
    assert page.count('<li><span class="swatch series-0">') == 24
    assert "54 points behind the fronts" in page


def test_no_accuracy_beyond_all_is_on_the_scale() -> None:
    _, drawn = figure_of(measured("a", "fp32", 2, 99.4), measured("b", "fp32", 3, 99.9))
    ticks = [float(text) for text in re.findall(r">(\d+\.\d)</text>", drawn)]
    assert len(ticks) >= 3
    assert max(ticks) <= 100


def test_what_was_slowed_on_purpose_is_called_so_and_not_drawn() -> None:
    plain, slow = (measured("a", "fp32", ms, 70.0, sha256="x", **more) for ms, more in ((2, {}), (3, {"planted": 0.5})))
    contest = bench.Comparison(measurements={"a": plain, "a made 50 % slower": slow}, twin=plain)
    page = page_of(contest)
    assert "a onnx fp32 made 50 % slower" in page
    assert page.count('<li><span class="swatch') == 1  # one point in the list below the figure


@given(st.lists(st.tuples(st.integers(1, 6), st.one_of(st.none(), st.integers(1, 6))), max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int | None]]) -> None:
    def at(milliseconds: int, top1: int | None) -> MeasurementGroup:
        one = bench.Measurement(
            subject={},
            machine=MACHINE,
            procedure=bench.Procedure(),
            samples_ns=(milliseconds,),
            noise=bench.TimingNoise(),
        )
        return MeasurementGroup(measurements=(one,), accuracy=None if top1 is None else Accuracy(top1))

    front = {(int(group.median_ns), group.top1) for group in pareto_front([at(*point) for point in points])}
    known = {(ms, top1) for ms, top1 in points if top1 is not None}

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    assert front == {point for point in known if not any(beats(other, point) for other in known)}


# ---- labels ----------------------------------------------------------------------------------------------------------

spots = st.tuples(st.floats(20, 480), st.floats(20, 280))


@given(st.lists(st.tuples(spots, st.integers(3, 25)), min_size=1, max_size=24), st.lists(spots, max_size=40))
@settings(max_examples=40, deadline=None)
def test_no_label_lies_on_another_on_a_point_or_outside(named: list, others: list) -> None:
    labels = [Label(spot, 4.5 * letters, 9.0) for spot, letters in named]
    dots = [*(spot for spot, _ in named), *others]
    boxes = [box for box in place_labels(labels, dots, [], AREA) if box is not None]
    for at, box in enumerate(boxes):
        assert box.is_inside(AREA)
        assert not any(box.left < x < box.right and box.bottom < y < box.top for x, y in dots)
        assert not any(box.overlaps(other) for other in boxes[:at])


def test_a_lonely_label_stands_above_to_the_left_of_its_point() -> None:
    label = Label((200.0, 150.0), 50.0, 9.0)
    (box,) = place_labels([label], [label.position], [], AREA)
    assert box is not None
    assert box.right < 200
    assert box.bottom > 150
    assert leader_line(label, box) is None


def test_a_label_goes_elsewhere_where_there_is_no_room() -> None:
    corner = Label((10.0, 290.0), 50.0, 9.0)
    (box,) = place_labels([corner], [corner.position], [], AREA)
    assert box is not None
    assert box.left >= 0
    assert place_labels([Label((10.0, 10.0), 600.0, 9.0)], [], [], AREA) == [None]


def test_a_label_far_off_is_tied_to_its_point() -> None:
    label = Label((100.0, 100.0), 50.0, 9.0)
    line = leader_line(label, Box(130, 130, 180, 139))
    assert line is not None
    assert line[1] == (130, 130)


def test_a_label_keeps_off_the_lines() -> None:
    label = Label((200.0, 150.0), 50.0, 9.0)
    (free,) = place_labels([label], [label.position], [], AREA)
    assert free is not None
    middle = (free.bottom + free.top) / 2
    (box,) = place_labels([label], [label.position], [[(0.0, middle), (199.0, middle)]], AREA)
    assert box is not None
    assert not box.bottom < middle < box.top or box.left > 199


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_row_tells_the_limit_the_size_the_memory_and_the_start() -> None:
    from dataclasses import replace

    whole = replace(
        measured("a", "fp32", 2, 70.0, num_bytes=8_410_000),
        bound=bench.LatencyBound(compute_ns=1.24e6, memory_ns=1e5),
        cold=bench.ColdStart(open_ns=200_000_000, first_ns=50_000_000, warm_ns=1, peak_bytes=71_800_000),
    )
    page = page_of(whole)
    for said in ("62 % compute", "8.41 MB", "71.8 MB", "250 ms"):
        assert f">{said}</td>" in page, said
    assert "first call</th>" not in page
    bare = page_of(measured("a", "fp32", 2, 70.0))
    for column in ("of the limit", "peak memory", "cold start"):
        assert column not in bare


def test_findings_do_not_tell_subjects_apart() -> None:
    small, large = (measured("a", "fp32", 2, None, num_bytes=size, macs=5, params=7) for size in (1, 2))
    assert len(groups_of(small, large)) == 1


def test_a_self_test_is_told_with_its_floor() -> None:
    one = measured("a", "fp32", 2, 70.0, name="a onnx fp32")
    page = page_of(bench.Comparison(measurements={"a onnx fp32": one}, twin=one))
    assert "Self-test: a onnx fp32 with 1 thread differs by up to 0.0 % from itself." in page


@pytest.mark.parametrize("precision", ["fp64", ""])
def test_an_unusual_precision_is_drawn_too(precision: str) -> None:
    figure, _ = figure_of(measured("a", precision, 2, 70.0), measured("b", "fp32", 3, 71.0))
    assert (precision or "precision not stated") in {entry.text for entry in figure.drawing.legend}
