"""Batches: labels, ranks, workers, resume, the cache, bad images; and the curriculum."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from image_fixtures import (
    CROP_AND_FLIP,
    CURRICULUM,
    PLAIN,
    SMALL,
    Shades,
    batches,
    everything,
    image_numbers,
    noise,
    photos,
    same_batches,
)
from onefold.data import (
    CachedDataset,
    Dataset,
    ImageFiles,
    ImageLoader,
    Mixing,
    MixupLoader,
    ProgressiveAugment,
    open_dataset,
)
from onefold.data.crop import Crop, CropBox
from onefold.data.decode import decode_image
from onefold.data.fingerprint import dataset_fingerprint
from onefold.data.preprocessing import ValueRange
from onefold.errors import BadArgument, BadData


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 60),
    share=st.integers(1, 8),
    world=st.integers(1, 5),
    epoch=st.integers(0, 9),
)
def test_over_the_ranks_every_sample_comes_exactly_once(n: int, share: int, world: int, epoch: int) -> None:
    ranks = [ImageLoader(Shades(n), PLAIN, batch_size=share * world, rank=r, world=world) for r in range(world)]
    assert sorted(i for b in ranks for images, _ in b.epoch(epoch) for i in image_numbers(images)) == list(range(n))
    assert all(len(list(b.epoch(epoch))) == len(b) for b in ranks)
    whole = [image_numbers(images) for images, _ in replace(ranks[0], rank=0, world=1).epoch(epoch)]
    for rank, loader in enumerate(ranks):  # whole batches, in turn
        assert [image_numbers(images) for images, _ in loader.epoch(epoch)] == whole[rank::world]
    if n < share * world:
        return
    ranks = [replace(loader, shuffle=True, seed=4) for loader in ranks]
    alone = replace(ranks[0], rank=0, world=1)
    together = [
        sorted(i for images, labels in step for i in image_numbers(images))
        for step in zip(*(b.epoch(epoch) for b in ranks), strict=True)
    ]
    assert together == [sorted(image_numbers(images)) for images, _ in alone.epoch(epoch)]
    assert all(len(step) == share * world for step in together)
    assert len({i for step in together for i in step}) == n // (share * world) * share * world


def test_labels_go_with_their_images() -> None:
    for images, labels in ImageLoader(Shades(300), PLAIN, batch_size=32, shuffle=True).epoch(1):
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape == (32, 3, 8, 8)
        assert labels.tolist() == [i % 2 for i in image_numbers(images)]


def test_batches_do_not_depend_on_workers_cache_start_or_world(tmp_path: Path) -> None:
    source = photos(tmp_path)
    inline = ImageLoader(source, CROP_AND_FLIP, batch_size=4, shuffle=True, seed=7)
    whole = list(inline.epoch(2))
    assert len(whole) == len(inline) == 6
    for start in range(7):
        assert same_batches(list(inline.epoch(2, start)), whole[start:])
    cached = CachedDataset(source)
    for workers, held in ((1, source), (3, source), (2, cached), (2, cached)):
        threaded = ImageLoader(held, CROP_AND_FLIP, batch_size=4, shuffle=True, seed=7, num_workers=workers)
        assert same_batches(list(threaded.epoch(2)), whole)
        assert same_batches(list(threaded.epoch(2, 4)), whole[4:])
    for rank in (0, 1):
        share = list(
            ImageLoader(source, CROP_AND_FLIP, batch_size=4, shuffle=True, seed=7, rank=rank, world=2).epoch(2)
        )
        assert same_batches(share, [(images[rank::2], labels[rank::2]) for images, labels in whole])
    assert not same_batches(list(inline.epoch(3)), whole)
    assert not same_batches(
        list(ImageLoader(source, CROP_AND_FLIP, batch_size=4, shuffle=True, seed=8).epoch(2)), whole
    )


def test_a_cache_decodes_once_and_keeps_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = photos(tmp_path, 6)
    asked: list[str] = []
    original = ImageFiles.image
    monkeypatch.setattr(ImageFiles, "image", lambda self, i, **k: asked.append(self.name(i)) or original(self, i, **k))
    cached, none = CachedDataset(source), CachedDataset(source, limit_mib=0)
    for _ in range(3):
        for i in range(6):
            np.testing.assert_array_equal(cached.image(i), none.image(i))
    assert Counter(asked) == dict.fromkeys(asked, 4)  # one, and three without room
    assert dataset_fingerprint(cached) == dataset_fingerprint(source)


def test_threads_end_with_the_epoch(tmp_path: Path) -> None:
    batches = ImageLoader(photos(tmp_path), CROP_AND_FLIP, batch_size=2, num_workers=3)
    epoch = batches.epoch(0)
    next(epoch)
    assert any(t.name.startswith("onefold-data") for t in threading.enumerate())
    epoch.close()  # type: ignore[attr-defined]
    assert not any(t.name.startswith("onefold-data") for t in threading.enumerate())
    (tmp_path / "a/00.png").unlink()
    with pytest.raises(BadData) as caught:
        list(batches.epoch(0))
    assert caught.tb is not None  # which holds on to the frames
    assert not any(t.name.startswith("onefold-data") for t in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_left_out_and_not_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    source = photos(tmp_path)
    clean = list(ImageLoader(source, CROP_AND_FLIP, batch_size=6, shuffle=True).epoch(0))
    order = ImageLoader(source, CROP_AND_FLIP, batch_size=6, shuffle=True).sample_indices(0, 1)
    name = source.name(int(order[2]))
    (tmp_path / name).write_bytes(b"<html>404</html>")
    batches = ImageLoader(source, CROP_AND_FLIP, batch_size=6, shuffle=True, on_bad="skip", num_workers=workers)
    with caplog.at_level(logging.WARNING, "onefold.data"):
        first, second = list(batches.epoch(0)), list(batches.epoch(1))
    kept = [0, 1, 3, 4, 5]
    assert same_batches(first, [clean[0], (clean[1][0][kept], clean[1][1][kept]), *clean[2:]])
    assert sum(len(labels) for _, labels in second) == 23
    assert list(batches.bad) == [name]
    assert "is an HTML page" in batches.bad[name]
    assert [name in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(BadData, match="is an HTML page"):
        list(ImageLoader(source, CROP_AND_FLIP, batch_size=6, shuffle=True, num_workers=workers).epoch(0))


def test_too_many_bad_images_stop_the_run(tmp_path: Path) -> None:
    source = photos(tmp_path)
    for i in (3, 11, 12):
        (tmp_path / source.name(i)).write_bytes(b"")
    assert sum(len(y) for _, y in ImageLoader(source, SMALL, batch_size=6, on_bad="skip", max_bad=3).epoch(0)) == 21
    with pytest.raises(BadData, match=r"more than 2 of 24 images are bad, the last: .* is empty"):
        list(ImageLoader(source, SMALL, batch_size=6, on_bad="skip", max_bad=2).epoch(0))


def test_a_batch_of_bad_images_only(tmp_path: Path) -> None:
    source = photos(tmp_path, 4)
    (tmp_path / source.name(3)).unlink()
    assert [len(y) for _, y in ImageLoader(source, SMALL, batch_size=3, on_bad="skip").epoch(0)] == [3]
    loader = ImageLoader(source, CROP_AND_FLIP, batch_size=1, shuffle=True, on_bad="skip")
    sizes = [(len(y), tuple(x.shape[1:])) for x, y in loader.epoch(0)]
    assert sorted(sizes) == [(0, (3, SMALL.size, SMALL.size)), *[(1, (3, SMALL.size, SMALL.size))] * 3]
    mixed = MixupLoader(loader, Mixing(mixup=0.2, cutmix=1.0), num_classes=2)
    assert sorted(tuple(y.shape) for _, y in mixed.epoch(0)) == [(0, 2), *[(1, 2)] * 3]


def test_an_image_that_goes_while_training_is_reported(tmp_path: Path) -> None:
    source = photos(tmp_path)
    batches = ImageLoader(source, SMALL, batch_size=4, on_bad="skip")
    epoch = batches.epoch(0)
    next(epoch)
    (tmp_path / source.name(9)).unlink()
    (tmp_path / source.name(10)).write_bytes((tmp_path / source.name(10)).read_bytes()[:300])
    assert sum(len(y) for _, y in epoch) == 18
    assert list(batches.bad) == [source.name(9), source.name(10)]
    assert ["No such file" in why or "truncated" in why for why in batches.bad.values()] == [True, True]


def test_batches_refuse_what_cannot_be() -> None:
    source = Shades(10)
    for wrong in (
        {"batch_size": 0},
        {"batch_size": 3, "world": 2, "shuffle": True},
        {"batch_size": 4, "world": 2, "rank": 2},
        {"batch_size": 4, "num_workers": -1},
        {"batch_size": 4, "on_bad": "ignore"},
    ):
        with pytest.raises(BadArgument):
            ImageLoader(source, PLAIN, **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadData, match="10 images do not fill one batch of 11: choose a smaller batch size"):
        ImageLoader(source, PLAIN, batch_size=11, shuffle=True)
    batches = ImageLoader(source, CROP_AND_FLIP, batch_size=4, shuffle=True)
    for n, start in ((-1, 0), (0, -1), (0, 3)):
        with pytest.raises(BadArgument):
            batches.epoch(n, start)
    assert batches.fingerprint() == dataset_fingerprint(source)


def test_training_decodes_large_photos_small_and_evaluation_does_not(tmp_path: Path) -> None:
    for kind in "ab":
        (tmp_path / kind).mkdir()
        noise(600, 800).save(tmp_path / kind / "1.jpg")
    source = open_dataset(tmp_path, "train", seed=0, val_fraction=0.0)
    assert CROP_AND_FLIP.min_decode_side == 17  # 8 / sqrt(0.3 * 3 / 4), rounded up
    sizes: list[tuple[int, int]] = []

    @dataclass(frozen=True)
    class Seen:
        source: Dataset
        classes: tuple[str, ...] = ("a", "b")

        def __len__(self) -> int:
            return 2

        def label(self, i: int) -> int:
            return i

        def name(self, i: int) -> str:
            return str(i)

        def num_bytes(self, i: int) -> int:
            return 0

        def digest(self, i: int) -> str:
            return ""

        def image(self, i: int, *, min_side: int = 0, value_range: ValueRange | None = None) -> Image.Image:
            image = self.source.image(i, min_side=min_side)
            sizes.append(image.size)
            return image

        def crop(self, i: int, crop_box: CropBox) -> Crop:
            cut = self.source.crop(i, crop_box)
            sizes.append((cut.pixels.shape[1], 0))  # rows below the crop may be missing
            return cut

    list(ImageLoader(Seen(source), CROP_AND_FLIP, batch_size=2).epoch(0))
    list(ImageLoader(Seen(source), SMALL, batch_size=2).epoch(0))
    assert sizes == [(100, 0)] * 2 + [(800, 600)] * 2
    np.testing.assert_array_equal(decode_image(tmp_path / "a/1.jpg"), np.asarray(source.image(0)))


def test_workers_starts_and_ranks_change_no_picture() -> None:
    for n in (1, 2):
        whole = list(batches().epoch(n))
        threaded = list(batches(num_workers=3).epoch(n, 1))
        for (a, b), (c, d) in zip(whole[1:], threaded, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
        shares = [list(batches(rank=rank, world=2).epoch(n)) for rank in (0, 1)]
        for (a, _), (even, _), (odd, _) in zip(whole, *shares, strict=True):
            assert torch.equal(a[0::2], even)
            assert torch.equal(a[1::2], odd)


def test_a_curriculum_is_a_function_of_the_epoch() -> None:
    assert [CURRICULUM.stage_at(n).size for n in range(5)] == [16, 16, 24, 24, 24]
    grows = ProgressiveAugment(augment=everything(), curriculum=CURRICULUM)
    steps = grows.at_epoch(1).steps
    assert (steps[0].size, steps[2].strength, steps[3].strength) == (16, 0.3, 0.3)  # type: ignore[attr-defined]
    assert grows.at_epoch(2) == everything()
    assert [next(iter(batches().epoch(n)))[0].shape[-1] for n in (0, 1, 2)] == [16, 16, 24]
