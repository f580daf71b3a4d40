"""Metrics: calibration against its definition, and ImageNet's sisters on made-up trees with a known predictor."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onefold.commands.evaluate import evaluate_suite, group_misclassified, open_suite
from onefold.commands.predictor import Predictor
from onefold.commands.validation_loop import Evaluator
from onefold.data import Dataset, Preprocessing, Subset, open_dataset
from onefold.data.folders import read_class_folders
from onefold.data.imagenet_variants import (
    ALEXNET_ERRORS,
    corruption_folders,
    imagenet_variant,
    mean_corruption_error,
    read_real_labels,
    wordnet_ids,
)
from onefold.errors import BadData
from onefold.models import create_model
from onefold.models.load_model import Card
from onefold.recipes import make_recipe
from onefold.train import World, compute_accuracy
from onefold.train.evaluate import NUM_BINS, calibration_error, merge_accuracies

SIZE = 32


# ------------------------------------------------------------------------------------ calibration


def expected(confidences: list[float], right: list[bool]) -> float:
    """The definition, bin by bin: sum over bins of |share right - mean confidence| times the bin's share of images."""
    total = 0.0
    for k in range(NUM_BINS):
        inside = [i for i, c in enumerate(confidences) if k / NUM_BINS < c <= (k + 1) / NUM_BINS]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([confidences[i] for i in inside])
            total += len(inside) / len(confidences) * abs(gap)
    return 100 * total


def test_calibration_error_is_its_definition():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.01, 1, 500)
    right = rng.random(500) < confidences**2
    ours = calibration_error(confidences, right)
    assert ours == pytest.approx(expected(confidences.tolist(), right.tolist()), abs=1e-9)


@pytest.mark.parametrize(
    ("confidences", "right", "error"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 100.0),
        ([0.75, 0.75, 0.75, 0.75], [True, True, True, False], 0.0),
        ([0.9, 0.3], [True, True], 40.0),  # (0.1 + 0.7) / 2
        ([np.nan, 1.0], [False, True], 0.0),  # an answer that is not finite is in no bin
    ],
)
def test_calibration_error_by_hand(confidences: list[float], right: list[bool], error: float):
    assert calibration_error(np.array(confidences), np.array(right)) == pytest.approx(error, abs=1e-9)


def test_confidence_is_the_greatest_softmax_share():
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(40) % 7
    score = compute_accuracy(lambda _: logits.numpy(), [(torch.zeros(40, 3, 2, 2), labels)])
    shares = logits.double().softmax(1)
    assert np.allclose(score.predictions.confidences, shares.max(1).values.numpy(), atol=1e-9)
    assert score.ece == pytest.approx(expected(shares.max(1).values.tolist(), (shares.argmax(1) == labels).tolist()))
    assert score.metrics()["ece"] == score.ece


def test_parts_together_are_the_whole():
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(30) % 6
    part = [
        compute_accuracy(lambda _, s=s: logits[s].numpy(), [(torch.zeros(15, 3, 2, 2), labels[s])])
        for s in (slice(15), slice(15, 30))
    ]
    whole = compute_accuracy(lambda _: logits.numpy(), [(torch.zeros(30, 3, 2, 2), labels)])
    assert merge_accuracies(part).metrics() == whole.metrics()
    assert (merge_accuracies(part).confusion == whole.confusion).all()


# ------------------------------------------------------------------------- a predictor that is known


def colour_of(code: int) -> tuple[int, int, int]:
    """A colour that says a number below 1000: ten steps a channel."""
    return tuple(20 + 24 * digit for digit in (code // 100, code // 10 % 10, code % 10))  # type: ignore[return-value]


def painted(path: Path, code: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour_of(code)).save(path)


@dataclass
class Reads:
    """Answers what `code_to_logits` makes of the number that an image's colour says."""

    logits_of: Callable[[int], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        levels = images[:, :, SIZE // 2, SIZE // 2] * 255
        codes = np.rint((levels - 20) / 24).astype(int) @ np.array([100, 10, 1])
        return np.stack([self.logits_of(int(code)) for code in codes]).astype(np.float32)

    def close(self) -> None:
        pass


def one_hot(*best: int, among: int = 1000) -> np.ndarray:
    logits = np.zeros(among)
    for place, index in enumerate(best):
        logits[index] = 10.0 - place
    return logits


def predictor(
    logits_of: Callable[[int], np.ndarray], classes: tuple[str, ...] | None = None, count: int = 1000
) -> Predictor:
    plain = Preprocessing(size=SIZE, crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    facts = {"model": "known", "runtime": "none", "precision": "fp32", "fused": True}
    return Predictor(session=Reads(logits_of), classes=classes, num_classes=count, preprocessing=plain, facts=facts)


# ------------------------------------------------------------------------------------ the layouts


def subset(kind: str) -> list[str]:
    """The 200 ids of ImageNet-A or -R, as timm lists them."""
    timm = pytest.importorskip("timm.data", reason="needs timm for the lists of ids", exc_type=ImportError)
    folder = Path(timm.__file__).parent / "_info"
    return (folder / f"imagenet_{kind}_synsets.txt").read_text().split()


def test_the_ids_are_the_published_ones():
    ids = wordnet_ids()
    assert len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    assert (ids[0], ids[1], ids[207], ids[999]) == ("n01440764", "n01443537", "n02099601", "n15075141")


@pytest.mark.parametrize(("kind", "name"), [("a", "ImageNet-A"), ("r", "ImageNet-R")])
def test_two_hundred_classes_are_answered_among_themselves(timm, tmp_path: Path, kind: str, name: str):
    """The network's first choice lies outside of the subset, its second is right: right, as the authors score."""
    ids = subset(kind)
    outside = next(i for i, wnid in enumerate(wordnet_ids()) if wnid not in ids)
    for wnid in ids:
        painted(tmp_path / wnid / "0.png", wordnet_ids().index(wnid))
    wrong = wordnet_ids().index(ids[7])
    other = wordnet_ids().index(ids[8])

    def logits_of(code: int) -> np.ndarray:
        return one_hot(outside, other if code == wrong else code)

    (found,) = evaluate_suite(predictor(logits_of), open_suite("anything", str(tmp_path)))
    assert name in found.data
    assert found.score.count == 200
    assert found.score.top1 == pytest.approx(99.5)
    assert found.score.confusion.shape == (200, 200)
    assert found.score.confusion[sorted(ids).index(ids[7]), sorted(ids).index(ids[8])] == 1


def test_sketch_and_parts_of_imagenet_are_answered_among_all(tmp_path: Path):
    ids = wordnet_ids()
    assert imagenet_variant(tmp_path / "ImageNet-Sketch", ids) == "ImageNet-Sketch"
    assert imagenet_variant(tmp_path / "val", ids) == "ImageNet"
    assert imagenet_variant(tmp_path, ("cat", "dog")) is None
    for wnid in (ids[3], ids[500], ids[999]):
        painted(tmp_path / "some" / wnid / "0.png", ids.index(wnid))
    (found,) = evaluate_suite(
        predictor(lambda code: one_hot(0 if code == 999 else code)), open_suite("x", str(tmp_path / "some"))
    )
    assert "part of ImageNet" in found.data
    assert found.score.top1 == pytest.approx(200 / 3)
    assert found.score.confusion[999, 0] == 1


def test_real_labels_leave_out_what_has_none(tmp_path: Path):
    """Three images: right by ReaL alone, wrong by both, and one without labels, which does not count."""
    ids = wordnet_ids()
    for c, wnid in enumerate(ids):
        if c < 3:
            painted(tmp_path / "val" / wnid / f"ILSVRC2012_val_0000000{c + 1}.png", c)
        else:
            painted(tmp_path / "val" / wnid / f"ILSVRC2012_val_{c + 1:08d}.png", c)
    real = [[5, 0], [7], []] + [[c] for c in range(3, 1000)]
    (tmp_path / "real.json").write_text(json.dumps(real))
    (found,) = evaluate_suite(
        predictor(lambda code: one_hot(5 if code < 3 else code)), open_suite("x", str(tmp_path)), batch_size=250
    )
    assert found.score.top1 == pytest.approx(99.7)
    assert found.extra["ReaL images"] == 999
    assert found.extra["ReaL top-1 %"] == pytest.approx(100 * 998 / 999)


@pytest.mark.parametrize("text", ["{", "{}", "[1, 2]", '[["a"]]', "[[1000]]", "[[true]]"])
def test_a_file_that_is_not_real_labels_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "real.json"
    path.write_text(text)
    with pytest.raises(BadData, match=r"real\.json"):
        read_real_labels(path, ["ILSVRC2012_val_00000001.JPEG"])


def test_a_name_without_its_number_has_no_real_labels(tmp_path: Path):
    path = tmp_path / "real.json"
    path.write_text("[[1]]")
    for name in ("cat.jpg", "ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        with pytest.raises(BadData, match="has no ReaL labels"):
            read_real_labels(path, [name])


def corrupted(folder: Path, grouped: bool = False, levels: int = 5) -> Path:
    """ImageNet-C's folders with three classes; the colour says class, severity and corruption."""
    for k, name in enumerate(ALEXNET_ERRORS):
        for severity in range(1, levels + 1):
            for c, wnid in enumerate(wordnet_ids()[:2]):
                place = folder / ("blur" if grouped else "") / name / str(severity) / wnid
                painted(place / "0.png", c + 10 * severity + 100 * (k % 5))
    return folder


@pytest.mark.parametrize("grouped", [False, True])
def test_corruptions_are_summed_up_as_published(tmp_path: Path, grouped: bool):
    """Severities 4 and 5 are answered wrongly: an error of 40 % everywhere; at severity 1 of every fifth, 20 % more."""

    def logits_of(code: int) -> np.ndarray:
        corruption, severity, label = code // 100, code // 10 % 10, code % 10
        is_wrong = severity >= 4 or (severity == 1 and corruption == 0)
        return one_hot(1 - label if is_wrong else label)

    corrupted(tmp_path, grouped)
    found = evaluate_suite(predictor(logits_of), open_suite("x", str(tmp_path)))
    total, parts = found[0], found[1:]
    assert len(parts) == 75
    assert total.score.count == 150
    errors = {name: 60.0 if k % 5 == 0 else 40.0 for k, name in enumerate(ALEXNET_ERRORS)}
    assert total.extra["mean error %"] == pytest.approx(np.mean(list(errors.values())))
    assert total.extra["mCE % (over AlexNet's errors)"] == pytest.approx(
        100 * np.mean([errors[name] / ALEXNET_ERRORS[name] for name in errors])
    )
    assert total.extra["snow error %"] == pytest.approx(errors["snow"])


def test_mce_of_alexnet_itself_is_one_hundred_and_needs_all_corruptions(tmp_path: Path):
    assert mean_corruption_error(ALEXNET_ERRORS) == pytest.approx(100.0)
    assert mean_corruption_error({"snow": 50.0}) is None
    found = evaluate_suite(
        predictor(lambda code: one_hot(code % 10)), open_suite("x", str(corrupted(tmp_path, levels=2)))
    )
    assert not any(name.startswith("mCE") for name in found[0].extra)  # two severities of five
    assert found[0].extra["mean error %"] == 0.0


def test_classes_that_are_called_one_to_five_are_no_severities(tmp_path: Path):
    for split in ("train", "val"):
        for name in ("1", "2"):
            painted(tmp_path / split / name / "a.png", int(name) - 1)
    assert corruption_folders(tmp_path) == {}


def test_class_folders_are_no_corruptions(tmp_path: Path):
    for name in ("0", "1", "2"):
        painted(tmp_path / name / "a.png", int(name))
    assert corruption_folders(tmp_path) == {}
    (found,) = evaluate_suite(predictor(lambda code: one_hot(code, among=3), count=3), open_suite("x", str(tmp_path)))
    assert found.score.top1 == 100.0


def test_a_networks_own_corrupted_classes_are_matched_by_name(tmp_path: Path):
    for severity in (1, 2):
        painted(tmp_path / "fog" / str(severity) / "dog" / "0.png", 0)
    found = evaluate_suite(predictor(lambda _: one_hot(1, among=2), ("cat", "dog"), 2), open_suite("x", str(tmp_path)))
    assert [each.data for each in found[1:]] == ["fog 1", "fog 2"]
    assert found[0].score.top1 == 100.0


def test_eval_scores_the_split_that_is_asked_for(tmp_path: Path):
    for split, codes in (("train", (0, 1)), ("valid", (0, 0)), ("test", (1, 1))):
        for name, code in zip(("0", "1"), codes, strict=True):
            painted(tmp_path / split / name / "a.png", code)

    def scores(split: str | None) -> dict[str, float]:
        suite = open_suite("x", str(tmp_path), split=split)
        return {
            each.data: each.score.top1
            for each in evaluate_suite(predictor(lambda c: one_hot(c, among=2), count=2), suite)
        }

    assert scores(None) == {f"{tmp_path} (val)": 50.0, f"{tmp_path} (test)": 50.0}
    assert scores("test") == {f"{tmp_path} (test)": 50.0}
    assert scores("train") == {f"{tmp_path} (train)": 100.0}
    with pytest.raises(BadData, match="has train/, valid/ and no test/"):
        shutil.rmtree(tmp_path / "test")
        open_suite("x", str(tmp_path), split="test")


# --------------------------------------------------------------------- the validation of a training


def test_equal_errors_on_nearly_the_same_image_are_one_group(tmp_path: Path):
    """Two frames of one scene are one; another scene, another label or another answer is not."""
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 256, (6, 6, 3)).repeat(8, axis=0).repeat(8, axis=1) for _ in range(2)]
    frames = [np.clip(scene + rng.normal(0, 3, scene.shape), 0, 255).astype(np.uint8) for scene in (*scenes, *scenes)]
    for name, frame in zip(("a/0", "a/1", "a/2", "b/3"), (frames[0], frames[1], frames[2], frames[2]), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    images = read_class_folders(tmp_path)
    assert group_misclassified(images, [2, 1, 0, 3], np.array([1, 1, 1, 0]), None) == {2: [0], 1: [], 3: []}
    assert group_misclassified(images, [2, 1, 0, 3], np.array([1, 1, 2, 0]), None) == {2: [], 1: [], 0: [], 3: []}


@dataclass(frozen=True)
class Holed:
    """A dataset some of whose images cannot be read."""

    source: Dataset
    holes: tuple[int, ...]

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int, **how: Any) -> Image.Image:
        if i in self.holes:
            raise BadData(f"image {i} is damaged")
        return self.source.image(i, **how)


@pytest.mark.parametrize("size", [2, 7])
def test_processes_validate_as_one_does(size: int):
    """All figures, to the bit, wherever batches end, with images that cannot be read, and more ranks than batches."""
    recipe = make_recipe("photos:scratch", {"model": "mobilenetv1_025", "plan.batch_size": "8"}, size=32)
    card = Card(model=recipe.model, num_classes=10, preprocessing=recipe.preprocessing.to_dict())
    torch.manual_seed(0)
    model = create_model(recipe.model, num_classes=10).eval()
    validation = Holed(Subset(open_dataset("digits", "val", seed=0, val_fraction=0.2), range(44)), holes=(3, 17))
    one = Evaluator(card=card, validation=validation, recipe=recipe)
    alone = one.combine([one(copy.deepcopy(model))])
    worlds = [World(rank=rank, size=size) for rank in range(size)]
    shares = [replace(one, world=world)(copy.deepcopy(model)) for world in worlds]
    assert one.combine(shares) == alone
    assert alone["top1"] == pytest.approx(100 * round(alone["top1"] * 42 / 100) / 42)  # of the 42 that can be read
    assert sum(len(share.unreadable) for share in shares) == 2
    many = replace(shares[0], unreadable={str(i): f"image {i} is damaged" for i in range(11)})
    with pytest.raises(BadData, match=r"more than 10 of 44 images are bad, the last: image"):
        one.combine([many, *shares[1:]])
