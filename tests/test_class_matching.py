"""Which class is which output: by name, by WordNet id, by number, by order; and what cannot be decided."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from onefold.commands.class_matching import match_all_classes, match_classes, read_class_names
from onefold.commands.initial_weights import _move_head_
from onefold.commands.teachers import Student, Teacher, TeacherAdapter
from onefold.data import Preprocessing
from onefold.data.imagenet_variants import wordnet_ids
from onefold.errors import BadArgument, BadData
from onefold.models import Classifier, create_model
from onefold.models.load_model import Card

TEXT_ORDER = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...
IDS = wordnet_ids()
WORDS = ["tench, Tinca tinca", "goldfish", *(f"word {i}" for i in range(2, 1000))]


@pytest.mark.parametrize(
    ("wanted", "known", "num_outputs", "expected"),
    [
        (["cat", "dog"], ["dog", "cat"], 2, [1, 0]),
        (["cat", "dog"], ["ape", "cat", "dog"], 3, [1, 2]),
        (["cat", "yak"], ["dog", "cat"], 2, [1, None]),
        (["ape", "yak"], ["dog", "cat"], 2, [None, None]),
        (["caf\u00e9"], ["x", "cafe\u0301"], 2, [1]),
        # names that are numbers are names first
        (["0", "1", "2"], TEXT_ORDER, 12, [0, 1, 4]),
        (["0", "1", "10"], TEXT_ORDER, 12, [0, 1, 2]),
        (TEXT_ORDER, TEXT_ORDER, 12, list(range(12))),
        # then numbers, never in the order of texts
        (TEXT_ORDER, None, 12, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
        ([f"{i:02d}" for i in range(12)], None, 12, list(range(12))),
        ([f"{i:02d}" for i in range(10)], [str(i) for i in range(10)], 10, list(range(10))),
        ([f"{i:02d}" for i in range(12)], TEXT_ORDER, 12, [TEXT_ORDER.index(str(i)) for i in range(12)]),
        (["1", "0"], ["cat", "dog"], 2, [1, 0]),
        # then WordNet ids
        ([IDS[7], IDS[2]], None, 1000, [7, 2]),
        ([IDS[7], IDS[2]], WORDS, 1000, [7, 2]),
        ([IDS[7]], list(reversed(IDS)), 1000, [992]),
        # then the order
        (["cat", "dog"], None, 2, [0, 1]),
    ],
)
def test_each_class_has_its_output(wanted, known, num_outputs, expected) -> None:
    assert match_classes(wanted, known, num_outputs, "the network") == expected


@pytest.mark.parametrize(
    ("wanted", "known", "num_outputs", "message"),
    [
        ([str(i) for i in range(1, 13)], None, 12, "12 numbers ('1', '2', '3', ...), not 0 to 11 as the network"),
        (["0", "1", "2"], None, 12, "3 numbers ('0', '1', '2'), not 0 to 11"),
        (["0", "1", "01"], None, 3, "not 0 to 2"),
        (["cat", "dog"], None, 3, "the data have 2 classes and the network has 3, without names"),
        (["crane", "dog"], ["crane", "dog", "crane"], 3, "two outputs each for 1 of the classes: 'crane'"),
        (["cat", "yak"], ["cat", "dog"], 2, "does not know: 'yak' (it knows 'cat', 'dog')"),
        ([IDS[7]], [f"own {i}" for i in range(1000)], 1000, "does not know"),
        (["0", "1", "2"], ["cat", "dog"], 2, "does not know"),
    ],
)
def test_what_cannot_be_decided_is_refused_with_what_to_type(wanted, known, num_outputs, message) -> None:
    with pytest.raises(BadData, match=re.escape(message)) as caught:
        match_all_classes(wanted, known, num_outputs, "the network")
    assert "classes=FILE" in str(caught.value)


def test_a_network_without_a_last_layer_knows_no_class() -> None:
    with pytest.raises(BadData, match="has no last layer"):
        match_classes(["cat"], None, 0, "the network")


def test_what_is_assumed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "onefold")
    match_classes(["ape", "cat"], None, 2, "w.pth")
    assert "w.pth does not name its classes: its outputs are taken for the data's classes in their order" in caplog.text
    caplog.clear()
    match_classes(["0", "1"], ["cat", "dog"], 2, "w.pth")
    assert "the data number their classes, and w.pth names them: 0 for 'cat', 1 for 'dog'" in caplog.text
    caplog.clear()
    match_classes(["cat", "dog"], ["dog", "cat"], 2, "w.pth")
    match_classes(["0", "1"], None, 2, "w.pth")
    assert caplog.text == ""


# ------------------------------------------------------------------------------------------- heads


def head_after(classes: tuple[str, ...], known: tuple[str, ...] | None, rows: int) -> nn.Linear:
    """The last layer of a network whose rows are filled with 0, 1, 2, ... after it was made for `classes`."""
    model = create_model("mobilenetv1_025", num_classes=rows)
    assert isinstance(model, Classifier)
    head = model.get_classifier()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(torch.arange(float(rows))[:, None].expand_as(head.weight))
        head.bias.copy_(torch.arange(float(rows)))
    _move_head_(model, Card(model="mobilenetv1_025", num_classes=rows, classes=known), classes)
    moved = model.get_classifier()
    assert isinstance(moved, nn.Linear)
    return moved


def test_rows_of_a_kept_head_go_to_the_classes_of_their_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "onefold")
    head = head_after(("cat", "dog"), ("dog", "cat"), 2)
    assert head.bias.tolist() == [1.0, 0.0]
    assert head.weight[:, 5].tolist() == [1.0, 0.0]
    assert "2 rows go to the classes of their names" in caplog.text
    head = head_after(("ape", "cat"), ("dog", "cat", "yak"), 3)
    assert head.bias[1] == 1.0
    assert head.weight[0].std() > 0  # random, not a row of somebody else's
    assert "1 rows go to the classes of their names; 1 classes that it does not know begin at random (ape); 2 of" in (
        caplog.text
    )
    assert head_after(TEXT_ORDER_TUPLE, None, 12).bias.tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


TEXT_ORDER_TUPLE = tuple(TEXT_ORDER)


def test_a_head_that_fits_is_left_alone_and_one_without_names_is_kept_only_where_it_may_fit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "onefold")
    assert head_after(("cat", "dog"), ("cat", "dog"), 2).bias.tolist() == [0.0, 1.0]
    assert caplog.text == ""
    assert head_after(("cat", "dog"), None, 2).bias.tolist() == [0.0, 1.0]
    assert "does not name its classes" in caplog.text
    assert head_after(("cat", "dog"), None, 3).weight.std() > 0
    assert "do not name 3 classes: the last layer for 2 is random" in caplog.text
    with pytest.raises(BadData, match="fit a new last layer: head='probe'"):
        head_after(("1", "2"), None, 2)


def test_a_teacher_is_matched_by_the_same_rule() -> None:
    def adapter(classes: tuple[str, ...], known: tuple[str, ...] | None, num_classes: int) -> TeacherAdapter:
        teacher = Teacher(
            title="t",
            network=lambda images: torch.arange(float(num_classes)).expand(len(images), -1),
            preprocessing=Preprocessing(size=4),
            num_classes=num_classes,
            classes=known,
        )
        own = Student(classes=classes, preprocessing=Preprocessing(size=4), device=torch.device("cpu"))
        return TeacherAdapter.between(teacher, own)

    answers = adapter(TEXT_ORDER_TUPLE, None, 12)(torch.zeros(1, 3, 4, 4))
    assert answers.tolist() == [[0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert adapter(("cat", "dog"), ("dog", "cat"), 2)(torch.zeros(1, 3, 4, 4)).tolist() == [[1, 0]]
    with pytest.raises(BadArgument, match="does not know: 'yak'"):
        adapter(("cat", "yak"), ("dog", "cat"), 2)


# ------------------------------------------------------------------------------ files of class names

FILES = {
    "plain": b"cat\ndog\n",
    "from Notepad": b"\xef\xbb\xbfcat\r\ndog\r\n\r\n",
    "UTF-16": "cat\ndog\n".encode("utf-16"),
    "blanks": b" cat \ndog\t\n",
    "old Mac": b"cat\rdog",
    "JSON list": json.dumps(["cat", "dog"]).encode(),
    "JSON of numbers": json.dumps({"1": "dog", "0": "cat"}).encode(),
    "numbered": b"0 cat\n1 dog\n",
    "numbered from 1, in another order": b"2. dog\n1. cat\n",
    "numbers and colons": b"1: dog\n0: cat\n",
    "numbers behind": b"dog\t1\ncat\t0\n",
    "table": b"id,name\n1,dog\n0,cat\n",
    "YAML, inline": b"nc: 2\nnames: ['cat', 'dog']\n",
    "YAML, numbered": b"path: x\nnames:\n  1: dog\n  0: cat\ntrain: images\n",
    "YAML, listed": b"names:\n- cat\n- dog\nnc: 2\n",
    "YAML, over lines": b"names: [\n  cat,\n  dog ]\n",
    "JSON of ids and names": json.dumps({"0": ["n01440764", "cat"], "1": ["n01443537", "dog"]}).encode(),
    "JSON of names": json.dumps({"dog": 1, "cat": 0}).encode("utf-8-sig"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_class_names_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(FILES[kind])
    assert read_class_names(tmp_path / "c.txt", 2, "w") == ("cat", "dog")


def test_numbers_in_names_are_no_numbers_of_lines(tmp_path: Path) -> None:
    for names in (
        ("1 euro", "2 euro"),
        ("1.5 mm", "2.7 mm"),
        ("type 1", "type 2"),
        ("0 cat", "cat"),
        ("3 cats", "5 dogs"),
    ):
        (tmp_path / "c.txt").write_text("\n".join(names))
        assert read_class_names(tmp_path / "c.txt", 2, "w") == names


def test_a_file_that_names_others_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ("cat\n", "names 1 classes, one per line; w has 2"),
        ('["cat"]', "has 1 entries that do not name 2 classes"),
        ("[cat", "begins as JSON and is none"),
    ):
        (tmp_path / "c.txt").write_text(text)
        with pytest.raises(BadData, match=message):
            read_class_names(tmp_path / "c.txt", 2, "w")


def test_a_list_that_contradicts_the_names_of_the_network_is_refused_unless_it_numbers_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, path = ("blue", "green", "red"), tmp_path / "c.txt"
    for text in ("red\ngreen\nblue\n", '["red", "green", "blue"]', "green\nx\ny\n"):
        path.write_text(text)
        with pytest.raises(BadData, match=r"w calls its output [012] so \('blue', 'green', 'red'\): leave .* away"):
            read_class_names(path, 3, "w", own)
        assert len(read_class_names(path, 3, "w")) == 3
    for text, names in (
        ("blau\ngr\u00fcn\nrot\n", ("blau", "gr\u00fcn", "rot")),
        ("blue\ngreen\nrot", ("blue", "green", "rot")),
    ):
        path.write_text(text, encoding="utf-8")
        assert read_class_names(path, 3, "w", own) == names
    assert not caplog.text
    for text in ("0 red\n1 green\n2 blue\n", '{"0": "red", "1": "green", "2": "blue"}'):
        path.write_text(text)
        caplog.clear()
        assert read_class_names(path, 3, "w", own) == ("red", "green", "blue")
        assert "c.txt has 'red' at output 0, and w calls its output 2 so" in caplog.text
