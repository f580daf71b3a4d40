"""Lists of classes in a text: with numbers or without, below names of columns or not; and what cannot be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from onefold.commands.class_matching import read_class_names
from onefold.data import read_dataset
from onefold.data.class_lists import read_class_lists
from onefold.errors import BadData

OWLS = ("owl", "emu", "asp")

TABLES = {
    "a name": "name\nowl\nemu\nasp\n",
    "a word in another language, and as many": "owl\nemu\nasp\n",
    "a name and its kind": "name,description\nowl,a bird\nemu,a bird\nasp,a snake\n",
    "semicolons": "name;latin\nowl;Strix\nemu;Dromaius\nasp;Vipera\n",
    "tabs": "id\tname\n2\tasp\n0\towl\n1\temu\n",
    "numbers in the middle": "name,id,color\nowl,0,red\nemu,1,blue\nasp,2,green\n",
    "categories above": "id,name,supercategory\n0,owl,bird\n1,emu,bird\n2,asp,snake\n",
    "sizes behind": "class_index,class,height,width,scale by\n0,owl,224,224,1\n1,emu,225,224,1\n2,asp,226,224,1\n",
    "colors": "name,r,g,b\nowl,128,0,0\nemu,0,128,1\nasp,7,5,2\n",
    "quotes and commas": 'id,name\n0,"owl"\n1,"emu"\n2,"asp"\n',
    "signs": "ClassId,SignName\n0,owl\n1,emu\n2,asp\n",
    "no line of names": "2,asp\n1,emu\n0,owl\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_classes_is_read_by_its_columns(kind: str, tmp_path: Path) -> None:
    """Beside a table and by --classes the same; the first line is no class, and a cell beside a name no part of it."""
    (tmp_path / "classes.csv").write_text(TABLES[kind])
    assert read_class_names(tmp_path / "classes.csv", 3, "w") == OWLS
    rows = [f"{i}.jpg,{i % 3}" for i in range(6)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,class_id", *rows]))
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0%d" % i)
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert info.classes == OWLS, info.lines()
    assert any("classes.csv names the classes: 0 is owl" in note for note in info.notes)


@pytest.mark.parametrize(
    "text",
    [
        "red 2\nblue 0\ngreen 1\n",
        "red,2\nblue,0\ngreen,1\n",
        "2. red\n0. blue\n1. green\n",
        "# of the paper\nname\nblue\ngreen\nred\n",
        "names:\n  2: red  # the last\n  0: blue\n  1: green\n",
        "class 3\nblue 1\ngreen 2\nred 3\n",
    ],
)
def test_numbers_and_names_are_told_apart_whatever_is_between_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(text)
    if text.startswith("class 3"):  # four lines that are all alike: four names, which no network of three has
        with pytest.raises(BadData, match="w has 3"):
            read_class_names(tmp_path / "c.txt", 3, "w")
    else:
        assert read_class_names(tmp_path / "c.txt", 3, "w") == ("blue", "green", "red")


def test_a_list_with_a_line_too_many_names_no_class_where_that_may_be_a_heading(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("Vogelart\nowl\nemu\nasp\nkiwi\n")
    (tmp_path / "labels.csv").write_text("file,class_id\n" + "".join(f"{i}.jpg,{i % 3}\n" for i in range(6)))
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0%d" % i)
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert info.classes == ("0", "1", "2")
    said = "classes.csv may name the classes: it cannot be told which of its 5 names is 0, 1, 2"
    assert said in info.notes


def test_columns_that_may_all_be_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("alpha,beta\nowl,bird\nasp,snake\n")
    assert read_class_lists((tmp_path / "c.csv").read_text(), is_table=True) == []
    with pytest.raises(BadData, match="cannot be told which column names the classes: call it `name`"):
        read_class_names(tmp_path / "c.csv", 2, "w")


def test_names_with_commas_and_words_for_columns_are_names(tmp_path: Path) -> None:
    for names in (("tench, Tinca tinca", "goldfish, Carassius auratus"), ("species", "breed"), ("cat, wild", "dog")):
        (tmp_path / "c.txt").write_text("\n".join(names))
        assert read_class_names(tmp_path / "c.txt", 2, "w") == names


def test_a_list_of_fewer_classes_than_there_are_is_said(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("owl\nemu\n")
    (tmp_path / "labels.csv").write_text("file,class_id\n" + "".join(f"{i}.jpg,{i % 3}\n" for i in range(6)))
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff\xe0%d" % i)
    info = read_dataset(tmp_path, seed=0, val_fraction=0.5).info
    assert info.classes == ("0", "1", "2")
    assert "classes.txt is not used: it has 2 names, and the classes are 0, 1, 2" in info.notes
