"""Streams of shards: every image once a pass, any start, any number of processes, and whatever a server does."""

from __future__ import annotations

import hashlib
import io
import resource
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onefold.data import Preprocessing
from onefold.data.blocks import BlockOrder
from onefold.data.manifest import Manifest, read_manifest, write_manifest
from onefold.data.patience import Patience
from onefold.data.remote import BlobFile, open_blob
from onefold.data.stream import Stream
from onefold.errors import BadArgument, BadData
from range_server import RangeServer, seldom, serving

PLAIN = Preprocessing(size=8, crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
QUICK = Patience(tries=6, timeout_s=0.4, pause_s=0.001)
NUM_IMAGES = 150


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 500),
    block=st.integers(1, 40),
    workers=st.integers(1, 7),
    window=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_every_sample_comes_once_a_pass_over_all_workers(
    n: int, block: int, workers: int, window: int, seed: int
) -> None:
    order = BlockOrder(num_samples=n, block=block, workers=workers, window=window, seed=seed)
    windows = -(-2 * order.num_blocks // (workers * window)) + 1  # two passes, and what follows
    seen = np.zeros((2, n), int)
    for v in range(workers):
        passes, samples = order.at(v, 0, windows * window * block)
        for e in (0, 1):
            np.add.at(seen[e], samples[passes == e], 1)
    assert (seen == 1).all()
    for w in range(min(windows, 3)):
        numbered, blocks = order.window_of(0, w * window * block)
        assert numbered == w
        assert {i // block for i in order.at(0, w * window * block, window * block)[1].tolist()} == set(blocks.tolist())


def test_slots_are_the_same_from_any_start() -> None:
    order = BlockOrder(num_samples=1003, block=16, workers=4, window=3, seed=5)
    whole = np.stack([order.at(2, slot, 1)[1].sum() for slot in range(300)])
    for first in (0, 1, 47, 48, 200):
        got = order.at(2, first, 40)[1]
        expected = [int(whole[s]) for s in range(first, first + 40) if len(order.at(2, s, 1)[1])]
        assert got.tolist() == expected


def test_the_order_of_five_thousand_million_needs_no_memory() -> None:
    small = BlockOrder(num_samples=1_000_000, block=128, workers=4096, window=16, seed=1)
    large = BlockOrder(num_samples=5_000_000_000, block=128, workers=4096, window=16, seed=1)
    small.at(7, 0, 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slots = 128 * 16
    passes, samples = large.at(4095, 500 * slots, slots)
    assert (passes == 0).all()
    assert len(np.unique(samples)) == slots  # a whole window: every sample of its blocks once
    assert len(np.unique(samples // 128)) == 16
    assert samples.max() > 4_000_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB


def test_samples_of_far_blocks_are_mixed() -> None:
    order = BlockOrder(num_samples=100_000, block=100, workers=1, window=20, seed=3)
    samples = order.at(0, 0, 256)[1]
    assert len(np.unique(samples // 100)) >= 19  # of the twenty blocks of the window
    assert abs(np.corrcoef(np.arange(256), samples)[0, 1]) < 0.25


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of different lengths; image i is a shade that tells its number."""
    folder = tmp_path_factory.mktemp("shards")
    i = 0
    for number, count in enumerate((40, 7, 61, 42)):
        with tarfile.open(folder / f"s{number}.tar", "w") as tar:
            for _ in range(count):
                out = io.BytesIO()
                Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(out, "PNG")
                entry = tarfile.TarInfo(f"{('even', 'odd')[i % 2]}/{i:04d}.png")
                entry.size = len(out.getvalue())
                tar.addfile(entry, io.BytesIO(out.getvalue()))
                i += 1
    write_manifest(folder)
    return folder


def who(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def stream(manifest: Manifest, **given: object) -> Stream:
    own: dict[str, object] = {"batch_size": 12, "block": 8, "window": 3, "seed": 4}
    return Stream(manifest, PLAIN, **{**own, **given})  # type: ignore[arg-type]


def test_a_manifest_knows_its_shards(shards: Path) -> None:
    manifest = read_manifest(str(shards))
    assert (manifest.num_samples, manifest.classes) == (NUM_IMAGES, ("even", "odd"))
    assert manifest.shards_of(38, 50) == [(0, 38, 40), (1, 0, 7), (2, 0, 3)]
    records = manifest.index(2)
    assert len(records) == 61
    assert records["label"].tolist() == [(47 + i) % 2 for i in range(61)]


def test_a_stream_gives_every_image_once_a_pass_with_its_label(shards: Path) -> None:
    batches = stream(read_manifest(str(shards)), batch_size=10)
    assert len(batches) == 15
    seen: list[tuple[int, int]] = []
    for n in range(4):
        for step, (images, labels) in enumerate(batches.epoch(n)):
            passes, samples = batches.samples(n, step)
            assert who(images) == samples.tolist()
            assert labels.tolist() == [i % 2 for i in samples.tolist()]
            seen += zip(passes.tolist(), samples.tolist(), strict=True)
    for e in range(3):  # the fourth pass has begun, and some of it is for the fifth epoch
        assert sorted(i for n, i in seen if n == e) == list(range(NUM_IMAGES))


def test_a_stream_goes_on_anywhere_and_over_any_processes(shards: Path) -> None:
    manifest = read_manifest(str(shards))
    for rank in (0, 3):
        whole = list(stream(manifest, rank=rank, world=4).epoch(1))
        for start in (0, 1, 5, 11, 12):
            rest = list(stream(manifest, rank=rank, world=4, num_workers=1).epoch(1, start))
            assert len(rest) == len(whole) - start
            for (a, la), (b, lb) in zip(rest, whole[start:], strict=True):
                assert torch.equal(a, b)
                assert torch.equal(la, lb)


@pytest.fixture
def server(shards: Path):
    with serving(shards) as running:
        yield running


def digest(batches: Stream) -> str:
    told = hashlib.sha256()
    for images, labels in batches.epoch(0):
        told.update(images.numpy().tobytes() + labels.numpy().tobytes())
    return told.hexdigest()


def test_a_misbehaving_server_changes_nothing(shards: Path, server: RangeServer) -> None:
    plain = digest(stream(read_manifest(str(shards))))
    assert digest(stream(read_manifest(server.url, QUICK))) == plain
    calm = sum(server.requests.values())
    server.fault = seldom(0.3, ("503", "short", "corrupt", "slow"), seed=2)
    server.requests.clear()
    many = Patience(tries=12, timeout_s=0.3, pause_s=0.001)
    assert digest(stream(read_manifest(server.url, many))) == plain
    assert sum(server.requests.values()) > calm


def test_a_block_is_asked_for_once(shards: Path, server: RangeServer) -> None:
    batches = stream(read_manifest(server.url, QUICK))
    list(batches.epoch(0))
    tars = sum(count for path, count in server.requests.items() if path.endswith(".tar"))
    windows = -(-len(batches) * 12 // 24) + 1  # the one that is fetched ahead too
    blocks = [block for w in range(windows) for block in batches.order.window_of(0, 24 * w)[1].tolist()]
    shards_of = batches.manifest.shards_of
    parts = sum(len(shards_of(8 * block, min(8 * block + 8, NUM_IMAGES))) for block in blocks)
    assert parts - 6 <= tars <= parts  # the last window was perhaps not wanted any more
    assert sum(server.requests.values()) - tars <= 2 + 4 * 2  # the manifest; an index, perhaps by two threads at once


@pytest.mark.parametrize("fault", ["corrupt", "404"])
def test_what_stays_broken_stops_the_run_or_is_left_out_by_name(shards: Path, server: RangeServer, fault: str) -> None:
    server.fault = lambda path, number: fault if path == "/s1.tar" else ""  # images 40 to 46
    few = Patience(tries=2, timeout_s=0.3, pause_s=0.001)
    manifest = read_manifest(server.url, few)
    with pytest.raises(BadData, match=r"s1\.tar"):
        list(stream(manifest, batch_size=30).epoch(0))
    skipping = stream(manifest, batch_size=30, on_bad="skip")
    seen = [i for images, _ in skipping.epoch(0) for i in who(images)]
    lost = set(map(int, skipping.bad))
    planned = [i for step in range(len(skipping)) for i in skipping.samples(0, step)[1].tolist()]
    assert lost == (set(range(40, 47)) & set(planned) if fault == "404" else {43})  # the one that holds the wrong byte
    assert seen == [i for i in planned if i not in lost]  # none is put in the place of another
    again = stream(manifest, batch_size=30, on_bad="skip")
    assert [i for images, _ in again.epoch(0) for i in who(images)] == seen
    with pytest.raises(BadData, match="more than 0 of 150"):
        list(stream(manifest, batch_size=30, on_bad="skip", max_bad=0).epoch(0))


def test_a_shard_that_is_changed_is_noticed(shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(str(copy), Patience(tries=1))
    assert manifest.fingerprint() == read_manifest(str(shards)).fingerprint()
    index = bytearray((copy / "s0.tar.index").read_bytes())
    index[3] ^= 1
    (copy / "s0.tar.index").write_bytes(index)
    with pytest.raises(BadData, match="SHA-256"):
        manifest.index(0)
    with pytest.raises(BadData, match=r"s0\.tar\.index"):
        list(stream(manifest).epoch(0))


def listing(shards: str) -> str:
    return '{"format": "onefold shards 1", "classes": ["a"], "shards": [' + shards + "]}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other"}',
        "\0" * 99,
        listing(""),
        listing('{"name": "../x", "images": 1, "index_sha256": ""}'),
        listing('{"name": "x", "images": -1, "index_sha256": ""}'),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadData, match="manifest"):
        read_manifest(str(tmp_path))


def test_impossible_streams_are_refused(shards: Path) -> None:
    manifest = read_manifest(str(shards))
    for wrong in ({"batch_size": 10, "world": 4}, {"rank": 1}, {"num_workers": 0}, {"on_bad": "hide"}):
        with pytest.raises(BadArgument):
            stream(manifest, **wrong)
    with pytest.raises(BadData, match="do not fill"):
        stream(manifest, batch_size=151)
    with pytest.raises(BadArgument):
        write_manifest(shards / "nowhere")
    assert stream(manifest).describe()["images"] == NUM_IMAGES


def test_threads_end_with_the_stream(shards: Path) -> None:
    import threading

    going = stream(read_manifest(str(shards))).epoch(0)
    next(going)
    going.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("onefold-")]


def test_a_blob_as_a_file_over_the_web(shards: Path, server: RangeServer) -> None:
    whole = (shards / "s1.tar").read_bytes()
    file = io.BufferedReader(BlobFile(open_blob(f"{server.url}/s1.tar", QUICK)), 700)
    assert file.read(1000) == whole[:1000]
    file.seek(-100, io.SEEK_END)
    assert file.read() == whole[-100:]
    assert open_blob(f"{server.url}/s1.tar?secret=1", QUICK).name.endswith("/s1.tar")


def test_objects_through_obstore(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = pytest.importorskip("obstore.store")
    monkeypatch.setattr(stores, "from_url", lambda url: stores.LocalStore(str(shards)))
    whole = (shards / "s1.tar").read_bytes()
    blob = open_blob("s3://bucket/s1.tar", QUICK)
    assert blob.num_bytes == len(whole)
    assert blob.read(100, 50) == whole[100:150]
    with pytest.raises(BadData, match="s3://bucket/none"):
        open_blob("s3://bucket/none", QUICK).read(0, 5)
    assert digest(stream(read_manifest("s3://bucket", QUICK))) == digest(stream(read_manifest(str(shards))))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch):
    """moto's S3, as a server of its own: `pip install "moto[s3,server]"` anywhere, and moto_server on the PATH."""
    pytest.importorskip("obstore")
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("needs moto_server on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    told = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "REGION": "us-east-1"}
    for name, value in {**told, "ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                with suppress(OSError), urllib.request.urlopen(endpoint, timeout=1):
                    break
                time.sleep(0.1)
            yield endpoint
        finally:
            server.terminate()


@pytest.mark.slow
def test_a_stream_out_of_s3(shards: Path, s3: str) -> None:
    stores = pytest.importorskip("obstore.store")
    make = urllib.request.Request(f"{s3}/photos", method="PUT")
    urllib.request.urlopen(make, timeout=10).close()
    store = stores.from_url("s3://photos")
    for path in shards.iterdir():
        store.put(path.name, path.read_bytes())
    assert digest(stream(read_manifest("s3://photos", QUICK))) == digest(stream(read_manifest(str(shards))))
    with pytest.raises(BadData, match="s3://photos/none"):
        open_blob("s3://photos/none", QUICK).read(0, 5)
