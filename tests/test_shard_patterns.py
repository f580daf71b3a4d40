"""Tar shards and Parquet files as sources: the same images, names and classes as the folder they were made of."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onefold.data import Dataset, open_dataset, read_dataset
from onefold.data.crop import CropBox
from onefold.data.fingerprint import dataset_fingerprint
from onefold.data.parquet import ParquetImages
from onefold.data.remote_files import LocalFile
from onefold.data.tars import read_tar_index
from onefold.errors import BadData
from range_server import serving

RNG = np.random.default_rng(0)
CLASSES = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("ONEFOLD_KERNELS", "plain")  # what is compiled lies in the cache as well
    return folder


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def tarred(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, bytes]:
    """train/ and val/ as a folder tree, on disk under `tree`, and as names with bytes."""
    files = {}
    for side, count in (("train", 6), ("val", 3)):
        for i in range(count):
            name = f"{side}/{CLASSES[i % 3]}/{i}.jpg"
            files[name] = jpeg()
            path = tmp_path / "tree" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
    return files


def opened(spec: Path | str, side: str = "train", fraction: float = 0.3) -> Dataset:
    return open_dataset(spec, side, seed=1, val_fraction=fraction)  # type: ignore[arg-type]


def content(source: Dataset) -> dict[str, tuple[str, bytes]]:
    return {
        source.name(i): (source.classes[source.label(i)], np.asarray(source.image(i)).tobytes())
        for i in range(len(source))
    }


def test_a_folder_a_tar_and_a_tar_on_the_web_are_the_same_source(tmp_path: Path, tree: dict[str, bytes]) -> None:
    shards = tmp_path / "shards"
    for side in ("train", "val"):
        files = [(name, data) for name, data in sorted(tree.items()) if name.startswith(side)]
        tarred(shards / f"{side}.tar", files)
        for number in range(3):
            tarred(tmp_path / "many" / f"{side}-{number:02d}.tar", [(f"./{n}", d) for n, d in files[number::3]])
    with serving(tmp_path) as server:
        forms = [
            shards,
            tmp_path / "many",
            str(tmp_path / "many" / "{split}-{00..02}.tar"),
            str(tmp_path / "many" / "{split}-*.tar"),
            f"{server.url}/many/{{split}}-{{00..02}}.tar",
        ]
        for side in ("train", "val"):
            folder = opened(tmp_path / "tree", side)
            assert folder.classes == CLASSES
            for form in forms:
                packed = opened(form, side)
                assert packed.classes == CLASSES
                assert content(packed) == content(folder)
                if form is shards:
                    assert dataset_fingerprint(packed) == dataset_fingerprint(folder)
                crop = CropBox(size=8, place=lambda sides: (2, 3, 20, 17))
                name = packed.name(0)
                same = next(i for i in range(len(folder)) if folder.name(i) == name)
                np.testing.assert_array_equal(packed.crop(0, crop).resized(), folder.crop(same, crop).resized())


def test_one_tar_is_split_as_its_folder_is(tmp_path: Path, tree: dict[str, bytes]) -> None:
    inside = sorted((n, d) for n, d in tree.items() if n.startswith("train/"))
    tar = tarred(tmp_path / "all.tar", inside)
    for side in ("train", "val"):
        assert content(opened(tar, side)) == content(opened(tmp_path / "tree" / "train", side))


@pytest.mark.parametrize("kind", ["number", "name", "json number", "json name"])
def test_webdataset_members_say_the_class(tmp_path: Path, kind: str) -> None:
    files: list[tuple[str, bytes]] = []
    for i in range(6):
        files.append((f"{i:04d}.jpg", jpeg()))
        label: int | str = i % 2 if "number" in kind else ("ant", "bee")[i % 2]
        if "json" in kind:
            files.append((f"{i:04d}.json", json.dumps({"width": 24, "label": label}).encode()))
        else:
            files.append((f"{i:04d}.cls", f"{label}\n".encode()))
    source = opened(tarred(tmp_path / "x.tar", files), fraction=0.0)
    assert source.classes == (("0", "1") if "number" in kind else ("ant", "bee"))
    assert [source.label(i) for i in range(6)] == [0, 1] * 3
    assert source.name(2) == "0002.jpg"


def test_the_index_is_read_once_and_again_when_the_tar_changes(
    tmp_path: Path, tree: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    tar = tarred(tmp_path / "x.tar", sorted(tree.items()))
    first = read_tar_index(LocalFile(tar))
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda **_: pytest.fail("the tar was read again"))
        assert read_tar_index(LocalFile(tar)) == first
    (kept,) = (cache / "onefold" / "tars").iterdir()
    for damaged in ("", "[1, 2", '[{"name": "x"}]'):
        kept.write_text(damaged)
        assert read_tar_index(LocalFile(tar)) == first
    tarred(tar, [*sorted(tree.items()), ("train/cat/new.jpg", jpeg())])
    assert len(read_tar_index(LocalFile(tar)).members) == len(first.members) + 1


def test_what_cannot_be_used_is_explained(tmp_path: Path) -> None:
    good = [("a/1.jpg", jpeg()), ("b/1.jpg", jpeg())]
    whole = tarred(tmp_path / "good.tar", good).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    (tmp_path / "text.tar").write_bytes(b"hello" * 500)
    (tmp_path / "empty.tar").write_bytes(b"")
    cases = {
        "cut.tar": "cut.tar",
        "text.tar": "no tar that can be read",
        "empty.tar": "no tar that can be read",
        "absent.tar": "not there",
        tarred(tmp_path / "flat.tar", [("1.jpg", jpeg())]).name: "in no class folder",
        tarred(tmp_path / "none.tar", [("readme.txt", b"x")]).name: "holds no images",
        tarred(tmp_path / "some.tar", [("1.jpg", jpeg()), ("2.jpg", jpeg()), ("2.cls", b"0")]).name: "have no .cls",
        tarred(tmp_path / "odd.tar", [("1.jpg", jpeg()), ("1.json", b"{")]).name: "is not JSON",
        tarred(tmp_path / "nan.tar", [("1.jpg", jpeg()), ("1.json", b'{"label": 1.5}')]).name: "expected in 1.json",
        tarred(tmp_path / "one.tar", [("a/1.jpg", jpeg()), ("a/2.jpg", jpeg())]).name: "one class only",
    }
    for name, sentence in cases.items():
        with pytest.raises(BadData, match=sentence):
            opened(tmp_path / name)
    both = tmp_path / "both"
    tarred(both / "train.tar", good)
    tarred(both / "val.tar", [*good, ("c/1.jpg", jpeg())])
    with pytest.raises(BadData, match="the classes differ; only in val: c"):
        opened(both)


def test_the_class_of_a_tar_with_one_class_is_the_innermost_folder(tmp_path: Path) -> None:
    tar = tarred(tmp_path / "x.tar", [(f"photos/owl/{i}.jpg", jpeg()) for i in range(2)])
    source = opened(tar, "val", 1.0)
    assert (source.classes, source.name(1)) == (("owl",), "1.jpg") or source.name(1) == "owl/1.jpg"
    assert opened(tarred(tmp_path / "y.tar", [("val/owl/1.jpg", jpeg())]), "val").classes == ("owl",)


def test_metadata_beside_a_class_is_no_class_and_two_classes_of_a_sample_are_refused(tmp_path: Path) -> None:
    both = [(f"{i}.{kind}", data) for i in range(4) for kind, data in
            (("jpg", jpeg()), ("cls", str(i % 2).encode()), ("json", b'{"width": 32, "url": "u"}'))]  # fmt: skip
    assert len(opened(tarred(tmp_path / "both.tar", both), "val", 1.0)) == 4
    for order in (("cls", "json"), ("json", "cls")):
        given = {"cls": b"1", "json": b'{"label": 0}'}
        files = [("0.jpg", jpeg()), *((f"0.{kind}", given[kind]) for kind in order)]
        with pytest.raises(BadData, match=r"0\.cls, 0\.json say different classes, 0, 1"):
            opened(tarred(tmp_path / f"{order[0]}.tar", files), "val", 1.0)
    same = [("0.jpg", jpeg()), ("0.json", b'{"category": "1"}'), ("0.cls", b"1")]
    assert opened(tarred(tmp_path / "same.tar", same), "val", 1.0).classes == ("1",)


def test_unlabelled_rows_of_test_are_left_out(tmp_path: Path, tree: dict[str, bytes]) -> None:
    images = [{"bytes": data, "path": None} for data in tree.values()]
    parquet(tmp_path / "hub/train-0.parquet", images, [0, 1, 2] * 3, CLASSES)
    parquet(tmp_path / "hub/test-0.parquet", images[:3], [-1, -1, -1], CLASSES)
    splits = read_dataset(tmp_path / "hub", seed=0, val_fraction=0.3)
    assert set(splits.datasets) == {"train", "val"}
    assert [(one.count, one.what) for one in splits.info.left_out] == [(3, "images of test")]


def test_a_tar_that_goes_or_shrinks_while_it_is_used_is_bad_data(tmp_path: Path) -> None:
    tar = tarred(tmp_path / "x.tar", [(f"{kind}/{i}.jpg", jpeg()) for kind in "ab" for i in range(3)])
    source = opened(tar, fraction=0.0)
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(BadData, match="truncated"):
        source.image(5)
    tar.unlink()
    with pytest.raises(BadData, match="cannot read"):
        source.image(0)


def test_links_and_hidden_members_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a/1.jpg", "b/1.jpg", "a/._1.jpg", "__/../.x/2.jpg"):
            data = jpeg()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("a/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert [member.name for member in read_tar_index(LocalFile(tmp_path / "x.tar")).members] == ["a/1.jpg", "b/1.jpg"]


def test_a_server_without_ranges_or_without_the_file(tmp_path: Path) -> None:
    with serving(tmp_path) as server, pytest.raises(BadData, match="404"):
        opened(f"{server.url}/absent.tar")


def parquet(
    path: Path, images: Sequence[object], labels: Sequence[object], names: Sequence[str] = (), rows: int = 2
) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": list(images), "label": list(labels)})
    if names:
        told = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def test_an_index_in_the_cache_is_believed_as_long_as_it_is_what_was_written(
    tmp_path: Path, tree: dict[str, bytes], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped byte in a name, or the index of another tar, would be other images and classes in silence."""
    path = tarred(tmp_path / "x.tar", list(tree.items()))
    first = read_tar_index(LocalFile(path))
    (kept,) = (cache / "onefold" / "tars").glob("*.json")
    whole = kept.read_text()
    read_tar_index(LocalFile(tarred(tmp_path / "y.tar", list(tree.items())[1:])))
    (other,) = (each for each in kept.parent.glob("*.json") if each != kept)
    damaged = [whole.replace("/cat/", "/cab/", 1), whole[:-2], "", other.read_text(), "[" * 9000]
    for text in damaged:
        kept.write_text(text)
        caplog.clear()
        assert read_tar_index(LocalFile(path)) == first
        assert "in the cache is not used, and made anew" in caplog.text
        assert kept.read_text() == whole
    caplog.clear()
    assert read_tar_index(LocalFile(path)) == first
    assert not caplog.messages


def test_hugging_faces_parquet_is_the_same_source(tmp_path: Path, tree: dict[str, bytes]) -> None:
    for side, file in (("train", "train-00000-of-00001"), ("val", "validation-00000-of-00001")):
        names = sorted(name for name in tree if name.startswith(side + "/"))
        images = [{"bytes": tree[name], "path": None} for name in names]
        labels = [CLASSES.index(name.split("/")[1]) for name in names]
        parquet(tmp_path / "hub" / "data" / f"{file}.parquet", images, labels, CLASSES)
    for side in ("train", "val"):
        source, folder = opened(tmp_path / "hub", side), opened(tmp_path / "tree", side)
        assert source.classes == CLASSES
        assert sorted(content(source).values()) == sorted(content(folder).values())


def test_a_row_group_of_many_rows_is_read_once_and_one_of_too_many_bytes_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = jpeg()
    path = parquet(tmp_path / "train.parquet", [{"bytes": image, "path": None}] * 30_000, [0, 1] * 15_000, rows=30_000)
    images = ParquetImages(path)
    assert images.read(29_999) == image
    monkeypatch.setattr(images, "_read_row_group", None)  # it is kept as Arrow has it: no object for each row
    assert images.read(0) == image
    monkeypatch.setattr("onefold.data.parquet._MAX_ROW_GROUP_BYTES", 1 << 9)
    with pytest.raises(BadData, match=r"MiB of images in a row group of 30000 rows, .* again with row_group_size=100"):
        ParquetImages(path).read(0)


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    good = {"bytes": jpeg(), "path": "x.jpg"}
    source = opened(
        parquet(tmp_path / "p.parquet", [{"bytes": None, "path": "x"}, good, good], ["a", "b", "a"]), "val", 1
    )
    with pytest.raises(BadData, match="only a path"):
        source.image(0)
    assert source.image(1).size == (24, 20)
    parquet(tmp_path / "odd.parquet", [good], [1.5])
    (tmp_path / "no.parquet").write_bytes(b"PAR1" * 9)
    for name, sentence in (("odd", "expected a number or a name"), ("no", "cannot read")):
        with pytest.raises(BadData, match=sentence):
            opened(tmp_path / f"{name}.parquet")


def test_imagenettes_tars_open(shared_data: Path) -> None:
    folder = shared_data / "imagenette-224-subset"
    train, val = opened(folder), opened(folder, "val")
    assert (len(train), len(val), len(train.classes)) == (2000, 1000, 10)
    assert train.classes == val.classes
    assert train.image(1999).size == (224, 224)
    assert not {train.name(i) for i in range(2000)} & {val.name(i) for i in range(1000)}


def test_copies_of_tars_and_of_folders_in_tars_are_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "place"
    place.mkdir()
    with tarfile.open(place / "photos.tar", "w") as tar:
        for folder in ("", "animals/"):
            for i, kind in enumerate(("cat", "cat", "dog", "dog")):
                member = tarfile.TarInfo(f"{folder}{kind}/{i}.png")
                data = b"picture %d" % i
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shutil.copy(place / "photos.tar", place / "photos (1).tar")
    info = read_dataset(place, seed=0, val_fraction=0.5).info
    assert info.classes == ("cat", "dog")
    assert sum(split.num_images for split in info.splits) == 4
    said = [str(one) for one in info.left_out]
    assert any("photos (1).tar): a copy of photos.tar" in one for one in said), said
    assert any("4 images in animals/: copies of those beside it" in one for one in said), said


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, kind: bytes) -> None:
    """Names and times that a tar keeps in headers of their own are read into memory at once, several times over."""
    member = tarfile.TarInfo("a/x.png")
    member.type, member.size = kind, 3 << 30
    with (tmp_path / "d.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(3 << 30)  # a hole
    with pytest.raises(BadData, match=r"is no tar that can be read, or damaged: a member's header has 3072 MiB"):
        read_tar_index(LocalFile(tmp_path / "d.tar"))


def test_of_two_columns_of_classes_in_parquet_the_one_that_counts_is_said(tmp_path: Path) -> None:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"fine_label": list("abcabc"), "coarse_label": list("xxyxxy")}
    columns["split"] = ["train", "train", "train", "test", "unlabeled", ""]
    images = [{"bytes": jpeg(), "path": None} for _ in range(6)]
    pq.write_table(arrow.table({"img": images, **columns}), tmp_path / "x.parquet")
    info = read_dataset(tmp_path / "x.parquet", seed=0, val_fraction=0.0).info
    assert info.classes == ("a", "b", "c")
    assert "the classes are the column fine_label, not coarse_label" in info.notes
    assert {split.name: split.num_images for split in info.splits} == {"train": 3, "test": 1}
    assert [(one.count, one.reason) for one in info.left_out] == [(2, "no split in split")]


@pytest.mark.parametrize("name", ["d.tar", "d.parquet"])
def test_a_pipe_is_no_shard(tmp_path: Path, name: str) -> None:
    """It would be waited for until somebody wrote to it."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadData):
        read_dataset(str(tmp_path / name), seed=0, val_fraction=0.5)
    with pytest.raises(BadData, match="it is not a plain file"):
        LocalFile(tmp_path / name).read(0, 1)


def shard(path: Path, labels: Sequence[object], names: Sequence[str] = ()) -> Path:
    """Write Parquet whose images have the number of their row as size."""
    return parquet(path, [{"bytes": jpeg(), "path": None} for _ in labels], labels, names)


def classes_by_row(place: Path, side: str = "train") -> list[str]:
    source = read_dataset(place, seed=0, val_fraction=0.0).datasets[side]  # type: ignore[index]
    return [source.classes[source.label(i)] for i in range(len(source))]


def test_each_parquet_file_numbers_its_classes_as_its_own_schema_names_them(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", [0, 0, 1, 1], ["cat", "dog"])
    shard(tmp_path / "train-1.parquet", [0, 1, 2], ["dog", "cat", "eel"])
    shard(tmp_path / "validation-0.parquet", [0, 0], ["dog", "cat"])
    shard(tmp_path / "test-0.parquet", ["dog", "cat", "eel"])
    assert classes_by_row(tmp_path) == ["cat", "cat", "dog", "dog", "dog", "cat", "eel"]
    assert classes_by_row(tmp_path, "val") == ["dog", "dog"]
    assert classes_by_row(tmp_path, "test") == ["dog", "cat", "eel"]
    info = read_dataset(tmp_path, seed=0, val_fraction=0.0).info
    assert info.classes == ("cat", "dog", "eel")
    said = "the schemas of train-0.parquet, train-1.parquet number the classes differently: the names of each count"
    assert said in info.notes


def test_numbers_without_names_have_those_of_the_other_files_where_these_agree(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", [0, 1], ["cat", "dog"])
    shard(tmp_path / "train-1.parquet", [1, 0, 1])
    assert classes_by_row(tmp_path) == ["cat", "dog", "dog", "cat", "dog"]
    notes = read_dataset(tmp_path, seed=0, val_fraction=0.0).info.notes
    assert "train-1.parquet has no names for its numbers: they are called as in train-0.parquet" in notes
    shard(tmp_path / "train-2.parquet", [0, 1], ["dog", "cat"])
    with pytest.raises(BadData, match=r"train-1\.parquet numbers the classes without names, and .* different orders"):
        read_dataset(tmp_path, seed=0, val_fraction=0.0)


@pytest.mark.parametrize("chosen", [".", "train-0.tar", "train-*.tar"])
def test_a_list_of_classes_beside_shards_names_their_numbers(tmp_path: Path, chosen: str) -> None:
    members = [
        (f"{i}.{end}", jpeg() if end == "jpg" else str(i % 3).encode()) for i in range(6) for end in ("jpg", "cls")
    ]
    tarred(tmp_path / "train-0.tar", members)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    place = str(tmp_path / chosen)
    info = read_dataset(place, seed=0, val_fraction=0.5).info
    assert info.classes == ("red", "green", "blue")
    assert "classes.txt names the classes: 0 is red, 1 is green, 2 is blue" in info.notes
    assert not info.left_out


def test_shards_that_are_not_there_or_empty_are_said(tmp_path: Path) -> None:
    shard(tmp_path / "train-00000-of-00003.parquet", [0, 1], ["cat", "dog"])
    shard(tmp_path / "test-00001-of-00002.parquet", [0, 1], ["cat", "dog"])
    whole = shard(tmp_path / "validation-00000-of-00001.parquet", [0], ["cat", "dog"])
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pq.read_table(whole).slice(0, 0), whole)
    notes = read_dataset(tmp_path, seed=0, val_fraction=0.0).info.notes
    assert "2 of 3 shards are not there: train-00001-of-00003.parquet, train-00002-of-00003.parquet" in notes
    assert "validation-00000-of-00001.parquet has no rows" in notes
    assert "1 of 2 shards is not there: test-00000-of-00002.parquet" in notes


def sides_of(place: Path, group: Callable[[str], str]) -> set[str]:
    """Give the groups of which images are in train and in val."""
    splits = read_dataset(place, seed=0, val_fraction=0.34).datasets
    train, val = ({group(part.name(i)) for i in range(len(part))} for part in (splits["train"], splits["val"]))
    return train & val


def test_photos_of_one_patient_in_shards_are_on_one_side_of_val(tmp_path: Path) -> None:
    members = []
    for i in range(24):
        told = json.dumps({"label": "ab"[i % 2], "Patient ID": f"p{i // 4}"}).encode()
        members += [(f"{i:02d}.jpg", jpeg()), (f"{i:02d}.json", told)]
    assert not sides_of(tarred(tmp_path / "s.tar", members), lambda name: str(int(name[:2]) // 4))
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": jpeg(), "path": None} for _ in range(24)]
    patients = [f"p{i // 4}" for i in range(24)]
    table = arrow.table({"image": images, "label": ["a", "b"] * 12, "patient_id": patients})
    (tmp_path / "p").mkdir()
    pq.write_table(table.slice(0, 10), tmp_path / "p/train-0.parquet")
    pq.write_table(table.slice(10), tmp_path / "p/train-1.parquet")

    def patient(name: str) -> str:
        file, row = name.split("/")
        return str((int(row) + (10 if "-1" in file else 0)) // 4)

    assert not sides_of(tmp_path / "p", patient)
    pq.write_table(table.slice(0, 3), tmp_path / "p/test-0.parquet")
    notes = "\n".join(read_dataset(tmp_path / "p", seed=0, val_fraction=0.34).info.notes)
    assert "images of train-0.parquet, train-1.parquet are of 6 of the column patient_id" in notes
    assert "1 of the 1 patient_id of test-0.parquet are in train-0.parquet, train-1.parquet too (p0)" in notes


def test_images_of_one_sample_and_versions_of_one_photo_in_shards_are_on_one_side_of_val(tmp_path: Path) -> None:
    for shard_number in range(2):  # each numbers its samples from 0
        members = []
        for i in range(12):
            members += [(f"{i}.left.jpg", jpeg()), (f"{i}.right.jpg", jpeg()), (f"{i}.cls", b"%d" % (i % 2))]
        tarred(tmp_path / f"s/all-{shard_number}.tar", members)
    info = read_dataset(tmp_path / "s", seed=0, val_fraction=0.34).info
    assert "the 48 images of all-0.tar, all-1.tar are of 24 of the column sample" in "\n".join(info.notes)
    one = tmp_path / "s/all-0.tar"
    assert not sides_of(one, lambda name: name.partition(".")[0])
    paths = [f"{i}{end}.jpg" for i in range(12) for end in ("", "_flipLR")]
    images = [{"bytes": jpeg(), "path": path} for path in paths]
    parquet(tmp_path / "p.parquet", images, [i // 2 % 2 for i in range(24)])
    assert not sides_of(tmp_path / "p.parquet", lambda name: str(int(name.rpartition("/")[2]) // 2))
    parquet(tmp_path / "q.parquet", [{"bytes": jpeg(), "path": "image.jpg"} for _ in range(8)], [0, 1] * 4)
    info = read_dataset(tmp_path / "q.parquet", seed=0, val_fraction=0.5).info
    assert [split.num_images for split in info.splits] == [4, 4]
    assert not info.notes


@pytest.mark.parametrize("chosen", [".", "labels.parquet"])
def test_parquet_that_names_images_is_a_table_of_these(tmp_path: Path, chosen: str) -> None:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for i in range(8):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / f"pictures/{i}.jpg").write_bytes(jpeg())
    columns = {
        "file_name": [f"pictures/{i}.jpg" for i in range(8)],
        "label": [i // 4 for i in range(8)],
        "patient": [f"p{i // 2}" for i in range(8)],
        "embedding": [{"x": 1.0}] * 8,
    }
    told = {"info": {"features": {"label": {"names": ["owl", "cat"], "_type": "ClassLabel"}}}}
    table = arrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(table, tmp_path / "labels.parquet")
    splits = read_dataset(tmp_path / chosen, seed=0, val_fraction=0.5)
    assert splits.info.classes == ("cat", "owl")
    assert [split.images_per_class for split in splits.info.splits] == [(2, 2), (2, 2)]
    assert "are of 4 of the column patient" in "\n".join(splits.info.notes)
    assert not splits.info.left_out


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (".", "1 of 4 shards is not there: s-001.tar"),
        ("s-{000..005}.tar", "3 of 6 shards are not there: s-001.tar, s-004.tar, s-005.tar"),
        ("s-*.tar", "1 of 4 shards is not there: s-001.tar"),
        ("s-{002..003}.tar", ""),
    ],
)
def test_a_gap_among_numbered_shards_is_said(tmp_path: Path, place: str, said: str) -> None:
    for i in (0, 2, 3):
        tarred(tmp_path / f"s-{i:03d}.tar", [(f"{kind}/{i}.jpg", jpeg()) for kind in "ab"])
    notes = read_dataset(str(tmp_path / place), seed=0, val_fraction=0.5).info.notes
    assert said in notes if said else not notes


def test_shards_that_are_there_and_were_not_chosen_are_not_missed(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"train-0000{i}-of-00003.parquet", ["cat", "dog"])
    for chosen in ("train-00000-of-00003.parquet", "train-0000[02]-of-*.parquet"):
        assert not read_dataset(str(tmp_path / chosen), seed=0, val_fraction=0).info.notes


def test_numbers_that_are_keys_count_no_shards(tmp_path: Path) -> None:
    for key in ("999999999999", "1", "3"):
        tarred(tmp_path / f"s-{key}.tar", [(f"{kind}/{key}.jpg", jpeg()) for kind in "ab"])
    assert not read_dataset(tmp_path, seed=0, val_fraction=0.5).info.notes


@pytest.mark.parametrize(
    ("file", "column", "values", "message"),
    [
        (
            "train-0",
            "split",
            ["train", "val"] * 2,
            "train-0.parquet is train by its name, and its column split says train",
        ),
        ("validation-0", "split", ["train"] * 4, "is val by its name, and its column split says train"),
        ("train-0", "is_valid", [False] * 4, ""),
        ("validation-0", "is_train", [False] * 4, ""),
        ("train-0", "fold", [0, 1, 2, 3], ""),
    ],
)
def test_a_parquet_file_whose_column_says_another_split_than_its_name_is_refused(
    tmp_path: Path, file: str, column: str, values: list[object], message: str
) -> None:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"image": [jpeg() for _ in range(4)], "label": ["a", "b"] * 2, column: values})
    pq.write_table(table, tmp_path / f"{file}.parquet")
    if message:
        with pytest.raises(BadData, match=message):
            read_dataset(tmp_path, seed=0, val_fraction=0.5)
    else:
        read_dataset(tmp_path, seed=0, val_fraction=0.5)


def test_a_column_of_splits_in_some_files_alone_is_refused(tmp_path: Path) -> None:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": [jpeg() for _ in range(4)], "label": ["a", "b"] * 2}
    pq.write_table(arrow.table(columns), tmp_path / "x.parquet")
    pq.write_table(arrow.table({**columns, "split": ["train", "val"] * 2}), tmp_path / "y.parquet")
    with pytest.raises(BadData, match=r"y\.parquet has the column split, and x\.parquet has none"):
        read_dataset(tmp_path, seed=0, val_fraction=0.5)


def test_a_shard_that_is_in_two_splits_is_said(tmp_path: Path) -> None:
    files = [(f"{kind}/{i}.jpg", jpeg()) for kind in "ab" for i in range(3)]
    for name in ("train", "test"):
        tarred(tmp_path / f"photos/{name}.tar", files)
    said = "photos/train.tar and photos/test.tar have the same bytes: the images of test are in train too"
    assert any(note.startswith(said) for note in read_dataset(tmp_path / "photos", seed=0, val_fraction=0.5).info.notes)


def test_two_numbers_of_one_name_are_one_class_and_that_is_said(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.parquet", [0, 1, 2, 1], ["bat", "owl", "bat"])
    assert classes_by_row(tmp_path) == ["bat", "owl", "bat", "owl"]
    info = read_dataset(tmp_path, seed=0, val_fraction=0.0).info
    assert info.classes == ("bat", "owl")
    assert "a schema calls several numbers bat: they are one class" in info.notes
