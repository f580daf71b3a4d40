"""Accuracy against latency: fronts by hand, labels that keep off each other, and the columns of what was measured."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onefold import bench
from onefold.report.aggregate import Group, grouped
from onefold.report.evidence import evidence
from onefold.report.latencies import latencies
from onefold.report.load import Inputs
from onefold.report.pareto import points_of, tradeoffs
from onefold.report.placing import Box, Tag, leader, placed

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


def groups_of(*found: bench.Measurement) -> list[Group]:
    keys = {key: float(each.subject["top1"]) for each in found for key in [group_key(each)] if "top1" in each.subject}
    return grouped(found, keys)


def group_key(each: bench.Measurement) -> str:
    from onefold.report.aggregate import subject_key

    return subject_key(each.subject)


def page_of(*found: bench.Measurement | bench.Comparison) -> str:
    measurements = tuple(each for each in found if isinstance(each, bench.Measurement))
    comparisons = tuple(each for each in found if isinstance(each, bench.Comparison))
    inputs = Inputs(runs=(), exports=(), measurements=measurements, comparisons=comparisons, sources=(), notes=())
    return latencies(evidence(inputs)).replace("\N{NO-BREAK SPACE}", " ")


# ---- the fronts ------------------------------------------------------------------------------------------------------


def test_each_precision_has_its_front_and_all_have_one() -> None:
    """int8's first beats all of fp32 but the most accurate."""
    points = points_of(
        groups_of(
            measured("a", "fp32", 2, 70.0),
            measured("b", "fp32", 4, 75.0),
            measured("c", "fp32", 5, 74.0),
            measured("a", "int8", 1, 71.0),
            measured("b", "int8", 3, 70.5),
        )
    )
    told = {(p.label, p.group.subject["precision"]): (p.leads, p.leads_kind) for p in points}
    assert told == {
        ("a", "fp32"): (False, True),
        ("b", "fp32"): (True, True),
        ("c", "fp32"): (False, False),
        ("a", "int8"): (True, True),
        ("b", "int8"): (False, False),
    }
    assert {p.kind for p in points} == {0, 1}  # colours and markers do not depend on what else was measured
    assert {p.kind for p in points_of(groups_of(measured("a", "int8", 1, 71.0)))} == {1}


def test_sixty_points_have_a_figure_with_every_precision_in_its_legend() -> None:
    found = [
        measured(
            f"model_{m}", precision, (m + 1) * pace * (1 + 0.05 * r), 60 + 2 * m - loss - 0.1 * r, runtime=f"runtime{r}"
        )
        for m in range(6)
        for r in range(4)
        for precision, pace, loss in (("fp32", 3, 0), ("int8", 1, 0.6), ("bf16", 2, 0.1))
    ]
    (figure,) = tradeoffs(groups_of(*found), 0)
    drawn = figure[figure.index("</desc>") : figure.index("</svg>")]
    for precision in ("fp32", "int8", "bf16"):
        assert re.search(rf"</i> {precision}</span>", figure)
    labels = re.findall(r"model_\d runtime0", drawn)
    assert len(labels) == 18  # the quickest runtime of each model leads in each precision, and all of them have room
    assert figure.count("<li>") == 72
    assert "54 points behind the fronts" in figure


def test_no_accuracy_beyond_all_is_on_the_scale() -> None:
    (figure,) = tradeoffs(groups_of(measured("a", "fp32", 2, 99.4), measured("b", "fp32", 3, 99.9)), 0)
    drawn = figure[figure.index("</desc>") : figure.index("</svg>")]
    ticks = [float(text) for text in re.findall(r">(\d+\.\d)</text>", drawn)]
    assert len(ticks) >= 3
    assert max(ticks) <= 100


def test_what_was_slowed_on_purpose_is_called_so_and_not_drawn() -> None:
    plain, slow = (measured("a", "fp32", ms, 70.0, sha256="x", **more) for ms, more in ((2, {}), (3, {"planted": 0.5})))
    contest = bench.Comparison(measurements={"a": plain, "a made 50 % slower": slow}, twin=plain)
    page = page_of(contest)
    assert "a onnx fp32 made 50 % slower" in page
    assert page.count("<li>") - page.count("<strong>a made") == 1  # one point in the list below the figure


# ---- labels ----------------------------------------------------------------------------------------------------------

spots = st.tuples(st.floats(20, 480), st.floats(20, 280))


@given(st.lists(st.tuples(spots, st.integers(3, 25)), min_size=1, max_size=24), st.lists(spots, max_size=40))
@settings(max_examples=40, deadline=None)
def test_no_label_lies_on_another_on_a_point_or_outside(named: list, others: list) -> None:
    tags = [Tag(spot, 4.5 * letters, 9.0) for spot, letters in named]
    dots = [*(spot for spot, _ in named), *others]
    boxes = [box for box in placed(tags, dots, [], AREA) if box is not None]
    for at, box in enumerate(boxes):
        assert box.is_inside(AREA)
        assert not any(box.left < x < box.right and box.bottom < y < box.top for x, y in dots)
        assert not any(box.overlaps(other) for other in boxes[:at])


def test_a_lonely_label_stands_above_to_the_left_of_its_point() -> None:
    tag = Tag((200.0, 150.0), 50.0, 9.0)
    (box,) = placed([tag], [tag.spot], [], AREA)
    assert box is not None
    assert box.right < 200
    assert box.bottom > 150
    assert leader(tag, box) is None


def test_a_label_goes_elsewhere_where_there_is_no_room() -> None:
    corner = Tag((10.0, 290.0), 50.0, 9.0)
    (box,) = placed([corner], [corner.spot], [], AREA)
    assert box is not None
    assert box.left >= 0
    assert placed([Tag((10.0, 10.0), 600.0, 9.0)], [], [], AREA) == [None]


def test_a_label_far_off_is_tied_to_its_point() -> None:
    tag = Tag((100.0, 100.0), 50.0, 9.0)
    line = leader(tag, Box(130, 130, 180, 139))
    assert line is not None
    assert line[1] == (130, 130)


def test_a_label_keeps_off_the_lines() -> None:
    tag = Tag((200.0, 150.0), 50.0, 9.0)
    (free,) = placed([tag], [tag.spot], [], AREA)
    assert free is not None
    middle = (free.bottom + free.top) / 2
    (box,) = placed([tag], [tag.spot], [[(0.0, middle), (199.0, middle)]], AREA)
    assert box is not None
    assert not box.bottom < middle < box.top or box.left > 199


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_row_tells_the_limit_the_size_the_memory_and_the_start() -> None:
    from dataclasses import replace

    whole = replace(
        measured("a", "fp32", 2, 70.0, num_bytes=8_410_000),
        bound=bench.Bound(compute_ns=1.24e6, memory_ns=1e5),
        cold=bench.ColdStart(open_ns=200_000_000, first_ns=50_000_000, warm_ns=1, peak_bytes=71_800_000),
    )
    page = page_of(whole)
    for said in ("62 % compute", "8.41 MB", "71.8 MB", "250 ms", "12.3 mJ"):
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
    (figure,) = tradeoffs(groups_of(measured("a", precision, 2, 70.0), measured("b", "fp32", 3, 71.0)), 0)
    assert (precision or "precision not stated") in figure
