"""Layouts drawn by hypothesis: the same photos are the same dataset in whatever they lie, and nothing goes unsaid."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from onefold.data import read_dataset
from onefold.data.dataset import DatasetSplits
from onefold.data.decode import SUFFIXES
from onefold.data.splits import SPLIT_WORDS, parse_split_name
from onefold.data.table_columns import is_class_index_column, is_split_column, rank_class_column, rank_image_column
from onefold.errors import BadData

WORDS = {
    "train": ("train", "training", "Train", "TRAIN", "Training", "trn"),
    "val": ("val", "valid", "validation", "dev", "eval", "Val", "VALID", "Validation", "evaluation"),
    "test": ("test", "testing", "Test", "TESTING", "holdout", "held-out", "tst"),
}
FORMS = ("{}", "{}_set", "{}-images", "images_{}", "{}2017", "{} data", "{}set", "seg_{}", "my-photos-{}")
CLASSES = st.one_of(
    st.lists(
        st.sampled_from(
            [
                "cat",
                "Dog",
                "bald eagle",
                "caf\u00e9",
                "na\u00efve \u00fc",
                "\u732b",
                "n01440764",
                "test tube",
                "x.y",
                "mask",
            ]
        ),
        min_size=2,
        max_size=4,
        unique=True,
    ),
    st.integers(2, 12).map(lambda count: [str(number) for number in range(count)]),
)


def encoded(suffix: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (9, 8, 7)).save(out, suffix)
    return out.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


@dataclass(frozen=True)
class Photos:
    """Which class has how many photos in which split (None where the layout says none), and the words for these."""

    classes: tuple[str, ...]
    counts: Mapping[str | None, tuple[int, ...]]  # split -> photos of each class
    words: Mapping[str | None, str]  # split -> as its folder, shard or table is called
    values: Mapping[str | None, str]  # split -> as a column says it

    def __iter__(self) -> Iterator[tuple[str | None, str, str]]:
        """Split, class and file name of each photo; no two are called the same."""
        for split, counts in self.counts.items():
            for name, count in zip(self.classes, counts, strict=True):
                for i in range(count):
                    yield split, name, f"{split or 'all'}_{self.classes.index(name)}_{i}.jpg"


@st.composite
def photos(draw: st.DrawFn) -> Photos:
    classes = tuple(draw(CLASSES))
    splits: tuple[str | None, ...] = draw(
        st.sampled_from([(None,), ("train",), ("train", "val"), ("train", "test"), ("train", "val", "test"), ("val",)])
    )
    form = draw(st.sampled_from(FORMS if len(splits) > 1 else FORMS[:7]))
    values = {split: draw(st.sampled_from(WORDS[split])) if split else "" for split in splits}
    counts = {split: tuple(draw(st.integers(1, 4)) for _ in classes) for split in splits}
    words = {split: form.format(word.replace("-", "")) if split else "" for split, word in values.items()}
    return Photos(classes, counts, words, values)


def put(path: Path, data: bytes | None = None) -> None:
    """Write data, or a photo; what follows a JPEG's end makes no two files the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JPEG + os.fsencode(path) if data is None else data)


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


# ---- containers: each writes the photos to a folder, and gives the place


def split_folders(root: Path, photos: Photos) -> Path:
    for split, name, file in photos:
        put(root / photos.words[split] / (decomposed(name) if split == "val" else name) / file)
    return root


def wrapped_folders(root: Path, photos: Photos) -> Path:
    split_folders(root / "archive-main" / "data", photos)
    return root


def folders_in_classes(root: Path, photos: Photos) -> Path:
    for split, name, file in photos:
        put(root / name / photos.words[split] / file)
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def tar_for_each_split(root: Path, photos: Photos) -> Path:
    root.mkdir(exist_ok=True)
    for split in photos.counts:
        with tarfile.open(root / f"{photos.words[split] or 'photos'}-00000.tar", "w") as tar:
            for one, name, file in photos:
                if one == split:
                    add(tar, f"{decomposed(name) if split == 'val' else name}/{file}", JPEG)
    return root


def one_tar(root: Path, photos: Photos) -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "archive.tar", "w") as tar:
        for split, name, file in photos:
            add(tar, f"./{photos.words[split]}/{name}/{file}".replace("//", "/"), JPEG)
    return root / "archive.tar"


def webdataset(root: Path, photos: Photos) -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "samples.tar", "w") as tar:
        for split, name, file in photos:
            label = {"category": name, "width": 2} | ({"split": photos.values[split]} if split else {})
            add(tar, file, JPEG)
            add(tar, file.replace(".jpg", ".json"), json.dumps(label).encode())
    return root


def parquet(root: Path, photos: Photos, column: bool) -> Path:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (root / "data").mkdir(parents=True, exist_ok=True)
    for split in [None] if column else list(photos.counts):
        rows = [one for one in photos if column or one[0] == split]
        columns = {
            "image": [{"bytes": JPEG, "path": file} for *_, file in rows],
            "label": [name for _, name, _ in rows],
        }
        if column and None not in photos.counts:
            columns["split"] = [photos.values[one] for one, *_ in rows]
        pq.write_table(
            arrow.table(columns), root / "data" / f"{photos.words.get(split) or 'all'}-00000-of-00001.parquet"
        )
    return root


def numbered_parquet(root: Path, photos: Photos, named: bool) -> Path:
    """Number the classes, with names in the schema of each file, in the other order in all but the first; or beside."""
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root.mkdir(exist_ok=True)
    order = [*photos.classes] if photos.classes[0] == "0" else sorted(photos.classes)
    if not named:
        (root / "classes.txt").write_text("\n".join(order), encoding="utf-8")
    for i, split in enumerate(photos.counts):
        names = order[::-1] if named and i else order
        rows = [one for one in photos if one[0] == split]
        columns = {
            "image": [{"bytes": JPEG, "path": file} for *_, file in rows],
            "label": [names.index(name) for _, name, _ in rows],
        }
        features = {"label": {"names": names, "_type": "ClassLabel"}} if named else {}
        table = arrow.table(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
        pq.write_table(table, root / f"{photos.words.get(split) or 'all'}-00000-of-00001.parquet")
    return root


def tar_for_each_class(root: Path, photos: Photos) -> Path:
    for split in photos.counts:
        folder = root / photos.words[split]
        folder.mkdir(parents=True, exist_ok=True)
        for name in photos.classes:
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                for file in (file for one, label, file in photos if (one, label) == (split, name)):
                    add(tar, file, JPEG + os.fsencode(file))
    return root


def parquet_of_names(root: Path, photos: Photos) -> Path:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split in photos.counts:
        rows = [one for one in photos if one[0] == split]
        for *_, file in rows:
            put(root / photos.words[split] / file)
        columns = {"file_name": [file for *_, file in rows], "label": [name for _, name, _ in rows]}
        pq.write_table(arrow.table(columns), root / photos.words[split] / "metadata.parquet")
    return root


def table(root: Path, photos: Photos) -> Path:
    rows = [("image_id", "breed", "split")[: 2 if None in photos.counts else 3]]
    for split, name, file in photos:
        put(root / "pictures" / "a" / file)
        rows.append((file.removesuffix(".jpg"), name, photos.values[split])[: len(rows[0])])
    write_csv(root / "metadata.csv", rows, "utf-8-sig", "\r\n")
    return root


def table_for_each_split(root: Path, photos: Photos) -> Path:
    for split in photos.counts:
        rows = [("Filename", "Class")]
        for one, name, file in photos:
            if one == split:
                put(root / "images" / file)
                rows.append((f"images/{file}", decomposed(name)))
        write_csv(root / f"{photos.words[split] or 'labels'}.csv", rows, "utf-16", "\n")
    return root


def table_in_each_split(root: Path, photos: Photos) -> Path:
    for split in photos.counts:
        lines = []
        for one, name, file in photos:
            if one == split:
                put(root / photos.words[split] / file)
                lines.append(json.dumps({"file_name": file, "label": name}))
        (root / photos.words[split] / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return root


def json_array(root: Path, photos: Photos) -> Path:
    records = []
    for split, name, file in photos:
        put(root / "data" / file)
        record = {"filepath": f"data/{file}", "ground_truth": {"label": name}, "predictions": {"label": "owl"}}
        records.append(record | ({"tags": [photos.values[split]], "split": photos.values[split]} if split else {}))
    (root / "samples.json").write_text(json.dumps({"samples": records}), encoding="utf-8")
    return root


def vertex(root: Path, photos: Photos) -> Path:
    lines = []
    for split, name, file in photos:
        put(root / file)
        record: dict[str, object] = {"imageGcsUri": f"gs://b/{file}", "classificationAnnotation": {"displayName": name}}
        if split:
            record["dataItemResourceLabels"] = {"aiplatform.googleapis.com/ml_use": photos.values[split]}
        lines.append(json.dumps(record))
    (root / "import.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return root


def list_of_splits(root: Path, photos: Photos) -> Path:
    rows = [("image_name", "evaluation_status")]
    for split, name, file in photos:
        put(root / name / file)
        rows.append((f"{name}/{file}", photos.values[split]))
    if None not in photos.counts:
        write_csv(root / "list_eval_partition.csv", rows, "utf-8", "\n")
    return root


def initials(root: Path, photos: Photos) -> Path:
    for split, name, file in photos:
        put(root / photos.words[split] / name[0] / name / file)
    return root


def write_csv(path: Path, rows: list[tuple[str, ...]], encoding: str, end: str) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    path.write_bytes((text.getvalue() + end).encode(encoding))


CONTAINERS: dict[str, Callable[[Path, Photos], Path]] = {
    "split folders": split_folders,
    "split folders inside another": wrapped_folders,
    "split folders in class folders": folders_in_classes,
    "a tar for each split": tar_for_each_split,
    "one tar": one_tar,
    "WebDataset": webdataset,
    "Parquet for each split": lambda root, photos: parquet(root, photos, column=False),
    "one Parquet file": lambda root, photos: parquet(root, photos, column=True),
    "Parquet that names its numbers": lambda root, photos: numbered_parquet(root, photos, named=True),
    "Parquet of numbers beside a list": lambda root, photos: numbered_parquet(root, photos, named=False),
    "Parquet of names in each split": parquet_of_names,
    "a tar for each class": tar_for_each_class,
    "a table": table,
    "a table for each split": table_for_each_split,
    "a table in each split": table_in_each_split,
    "JSON": json_array,
    "Vertex AI": vertex,
    "a list of splits": list_of_splits,
    "initials": initials,
}
CLASS_FOLDERS = ("split folders", "split folders inside another", "a tar for each split", "one tar")

STRAYS: dict[str, tuple[str, bytes]] = {
    "a hidden file": (".DS_Store", b"x"),
    "a note": ("README.txt", b"hello"),
    "an archive": ("backup.zip", b"PK\x03\x04"),
    "an old tar": ("old.tar", b""),
    "a Parquet file": ("metadata.parquet", b"PAR1"),
    "a submission": ("sample_submission.csv", b"id,label\n1,cat\n"),
    "a table of something else": ("prices.csv", b"item,price\n1,2\n"),
    "a picture of no class": ("cover.png", PNG),
    "raw photos": ("IMG_1.NEF", b"MM"),
    "weights": ("runs/model.onnx", b"\x08"),
}


def is_defined(container: str, photos: Photos) -> bool:
    """Whether a layout can hold these splits at all."""
    if container == "split folders in class folders":
        return len(photos.counts) > 1 or None in photos.counts
    if container == "a tar for each class":
        return all(name.isalpha() for name in photos.classes)
    if container == "Parquet of numbers beside a list":
        return photos.classes[0] != "0"
    if container in ("a table in each split", "Parquet of names in each split"):
        return None not in photos.counts
    if container == "a tar for each split":
        return "train" in photos.counts or None in photos.counts or len(photos.counts) == 1
    if container == "initials":
        initial = {name[0].casefold() for name in photos.classes}
        return len(initial) > 1 and all(name[:2].isalpha() and len(name) > 1 for name in photos.classes)
    return True


def expected_counts(photos: Photos) -> dict[str, tuple[int, ...]]:
    counts = {split or "train": each for split, each in photos.counts.items()}
    if "val" not in counts and "train" in counts:
        val = tuple(min(max(round(0.25 * n), 1), n - 1) for n in counts["train"])
        counts["train"] = tuple(n - v for n, v in zip(counts["train"], val, strict=True))
        counts["val"] = val
    return {split: each for split, each in counts.items() if sum(each)}


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Keep the indexes of tars here: a fixture would be one for all examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


def names_of(splits: DatasetSplits) -> dict[str, set[str]]:
    return {
        split: {dataset.name(i).rpartition("/")[2] for i in range(len(dataset))}
        for split, dataset in splits.datasets.items()
    }


@settings(max_examples=int(os.environ.get("ONEFOLD_LAYOUTS", "80")))
@given(photos(), st.sampled_from(sorted(CONTAINERS)), st.sets(st.sampled_from(sorted(STRAYS))))
def test_the_same_photos_are_the_same_dataset_in_any_container(photos: Photos, container: str, strays: set[str]):
    assume(is_defined(container, photos))
    with TemporaryDirectory() as folder, cache_in(Path(folder) / "cache"):
        place = CONTAINERS[container](Path(folder) / "place", photos)
        if not place.is_dir():
            strays = set()
        if "tar" in container or "Parquet" in container or container == "WebDataset":
            strays -= {"an old tar", "a Parquet file"}
        for stray in strays:
            put(place / STRAYS[stray][0], STRAYS[stray][1])
        splits = read_dataset(place, seed=5, val_fraction=0.25)
    info, names = splits.info, names_of(splits)
    is_numbered = photos.classes[0] == "0"
    order = sorted(range(len(photos.classes)), key=lambda i: i if is_numbered else photos.classes[i])
    assert info.classes == tuple(photos.classes[i] for i in order), info.lines()
    expected = {split: tuple(each[i] for i in order) for split, each in expected_counts(photos).items()}
    assert {split.name: split.images_per_class for split in info.splits} == expected, info.lines()
    assert sum(one.count for one in info.left_out) == len(strays), info.lines()
    assert set().union(*names.values()) == {file for *_, file in photos} or "Parquet" in container
    for split, files in names.items():
        kept = {"train"} if split not in photos.counts else {split}
        assert None in photos.counts or "Parquet" in container or {file.split("_")[0] for file in files} <= kept


@settings(max_examples=int(os.environ.get("ONEFOLD_LAYOUTS", "20")) // 2)
@given(photos())
def test_what_is_cut_out_by_seed_is_the_same_in_any_container_of_class_folders(photos: Photos):
    assume("val" not in photos.counts)
    with TemporaryDirectory() as folder, cache_in(Path(folder) / "cache"):
        containers = {name: CONTAINERS[name](Path(folder) / name, photos) for name in CLASS_FOLDERS}
        names = [names_of(read_dataset(place, seed=5, val_fraction=0.25)) for place in containers.values()]
    assert all(each == names[0] for each in names)


# ---- docs/data.md: each row of its tables

DOCS = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
SPANS = re.compile(r"`([^`]+)`")
ROWS = [
    (SPANS.findall(row.split(" | `")[0]), row.split(" | `")[1].split("`")[0])
    for row in re.findall(r"^\| (`.*)$", DOCS, re.M)
]


def braces(text: str) -> list[str]:
    """Expand a{b,c}d to abd, acd."""
    match = re.search(r"\{([^{}\"]*)\}", text)
    if not match:
        return [text]
    return [
        each for inner in match[1].split(",") for each in braces(text[: match.start()] + inner + text[match.end() :])
    ]


def make(place: Path, span: str) -> None:
    """Write what a code span of the tables says: files, `name = lines / of text`, tars, Parquet."""
    name, equals, text = span.partition(" = ")
    if equals:
        for each in braces(name):
            put(place / each, text.replace(" / ", "\n").encode())
        return
    name, bracket, inner = span.partition("(")
    for each in braces(name):
        path = place / each
        if not bracket:
            put(path)
        elif path.suffix == ".tar":
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for member in re.findall(r"\S+", inner.removesuffix(")")):
                    file, _, value = member.partition("=")
                    for one in braces(file):
                        add(tar, one, value.encode() or JPEG + f"{each} {one}".encode())
        else:
            arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            inner, _, files = inner.removesuffix(")").partition(";")  # 0 1 1: cat dog are numbers, and their names
            cells, _, names = inner.partition(":")
            labels = [int(cell) if re.fullmatch(r"-?\d+", cell) else cell for cell in cells.split()]
            images = {"image": [{"bytes": JPEG, "path": None} for _ in labels]}
            table = arrow.table({**({"file_name": files.split()} if files else images), "label": labels})
            if names:
                features = {"label": {"names": names.split(), "_type": "ClassLabel"}}
                table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)


@pytest.mark.parametrize(("spans", "result"), ROWS, ids=[" ".join(spans)[:60] for spans, _ in ROWS])
def test_each_row_of_the_page_on_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: list[str], result: str):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "place"
    for span in spans:
        make(place, span)
    if result.startswith("refused: "):
        with pytest.raises(BadData) as caught:
            read_dataset(place, seed=0, val_fraction=0.5).open("train")
        assert result.removeprefix("refused: ") in str(caught.value)
        return
    counts, classes, *left_out = result.split("; ")
    info = read_dataset(place, seed=0, val_fraction=0.5).info
    assert ", ".join(f"{split.name} {split.num_images}" for split in info.splits) == counts, info.lines()
    assert info.classes == tuple(classes.split(", ") if ", " in classes else classes.split())
    assert sum(one.count for one in info.left_out) == int((left_out or ["left out 0"])[0].split()[-1]), info.lines()


def test_the_words_of_the_page_on_data_are_those_of_the_reader():
    words = {split: re.search(rf"^\| {split} \| ([a-z, ]+) \|$", DOCS, re.M) for split in ("train", "val", "test")}
    listed = {word: split for split, found in words.items() if found for word in found[1].split(", ")}
    assert listed == SPLIT_WORDS
    columns = {
        kind: SPANS.findall(row)
        for kind, row in re.findall(r"^\| (image|class|number of the class|split) \| (`.*)$", DOCS, re.M)
    }
    assert len(columns) == 4
    for name in columns["image"]:
        assert rank_image_column(name) is not None, name
    for name in columns["class"]:
        assert rank_class_column(name) is not None, name
        assert rank_image_column(name) is None, name
    for name in columns["number of the class"]:
        assert is_class_index_column(name), name
    for name in columns["split"]:
        assert is_split_column(name), name
    assert (
        set(re.findall(r"\.[a-z]+\b", DOCS[DOCS.index("Images are files") : DOCS.index("The suffix decides")]))
        - {".heic", ".heif", ".hif"}
        == SUFFIXES
    )


@pytest.mark.parametrize(
    "name",
    [
        "test tube",
        "bullet_train",
        "evaluator",
        "training shoe",
        "validated",
        "devon rex",
        "train_val",
        "tester",
        "latest",
        "contest",
        "constrain",
        "1",
    ],
)
def test_words_that_only_hold_a_split_are_none(name: str):
    said = parse_split_name(name)
    assert said is None or said.stem or said.word == "trainval"


@pytest.mark.parametrize("in_tar", [False, True])
def test_splits_and_masks_of_segmentation_are_no_classes(tmp_path: Path, in_tar: bool):
    for name in ("train/a.jpg", "trainannot/a.png", "val/b.jpg", "valannot/b.png"):
        put(tmp_path / "seg" / name)
    place = tmp_path / "seg"
    if in_tar:
        place = tmp_path / "seg.tar"
        with tarfile.open(place, "w") as tar:
            for name in ("train/a.jpg", "trainannot/a.png", "val/b.jpg", "valannot/b.png"):
                add(tar, name, JPEG)
    with pytest.raises(BadData, match="class folder"):
        read_dataset(place, seed=0, val_fraction=0.2)


def test_a_file_of_boxes_beside_all_images_is_left_out(tmp_path: Path):
    with cache_in(tmp_path), tarfile.open(tmp_path / "boxes.tar", "w") as tar:
        for name in ("cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg"):
            add(tar, name, JPEG)
        add(tar, "instances_train.json", json.dumps({"images": [], "annotations": [], "categories": []}).encode())
    with cache_in(tmp_path):
        info = read_dataset(tmp_path / "boxes.tar", seed=0, val_fraction=0.5).info
    assert info.classes == ("cat", "dog")
    assert [(each.what, each.count) for each in info.left_out] == [(".json members", 1)]
