"""Files behind http(s) and in object stores: exactly the bytes asked for, or one sentence that says why not."""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from onefold.data.remote_files import BlobReader, RetryPolicy, open_blob
from onefold.data.tars import read_tar_index
from onefold.errors import BadData
from range_server import RangeServer, seldom, serving

QUICK = RetryPolicy(tries=12, timeout_s=0.3, pause_s=0.001)


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tar of twelve images in two class folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "served" / "s.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for i in range(12):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(out, "PNG")
            entry = tarfile.TarInfo(f"{('even', 'odd')[i % 2]}/{i:04d}.png")
            entry.size = len(out.getvalue())
            tar.addfile(entry, io.BytesIO(out.getvalue()))
    return path


@pytest.fixture
def server(shard: Path) -> Iterator[RangeServer]:
    with serving(shard.parent) as running:
        yield running


def test_a_misbehaving_server_changes_nothing(shard: Path, server: RangeServer) -> None:
    whole = shard.read_bytes()
    blob = open_blob(f"{server.url}/s.tar", QUICK)
    server.fault = seldom(0.3, ("503", "short", "slow"), seed=2)
    assert blob.num_bytes == len(whole)
    found = read_tar_index(blob)
    assert found == read_tar_index(open_blob(shard))
    for member in found.members:
        assert blob.read(member.offset, member.size) == whole[member.offset : member.offset + member.size]
    assert sum(server.requests.values()) > 14  # some were asked for again


@pytest.mark.parametrize(("fault", "tries", "says"), [("404", 1, "404 Not Found"), ("503", 3, r"503 .*\(3 tries\)")])
def test_what_stays_broken_is_one_sentence(server: RangeServer, fault: str, tries: int, says: str) -> None:
    server.fault = lambda path, number: fault
    blob = open_blob(f"{server.url}/s.tar?secret=1", RetryPolicy(tries=3, timeout_s=2, pause_s=0.001))
    with pytest.raises(BadData, match=says) as caught:
        blob.read(0, 5)
    assert sum(server.requests.values()) == tries  # what would be the same again is not asked for again
    assert "s.tar" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_blob_as_a_file_over_the_web(shard: Path, server: RangeServer) -> None:
    whole = shard.read_bytes()
    file = io.BufferedReader(BlobReader(open_blob(f"{server.url}/s.tar", QUICK)), 700)
    assert file.read(1000) == whole[:1000]
    file.seek(-100, io.SEEK_END)
    assert file.read() == whole[-100:]


def test_objects_through_obstore(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = pytest.importorskip("obstore.store")
    monkeypatch.setattr(stores, "from_url", lambda url: stores.LocalStore(str(shard.parent)))
    whole = shard.read_bytes()
    blob = open_blob("s3://bucket/s.tar", QUICK)
    assert blob.num_bytes == len(whole)
    assert blob.read(100, 50) == whole[100:150]
    assert read_tar_index(blob) == read_tar_index(open_blob(shard))
    with pytest.raises(BadData, match="s3://bucket/none"):
        open_blob("s3://bucket/none", QUICK).read(0, 5)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """moto's S3, as a server of its own: `pip install "moto[s3,server]"` anywhere, and moto_server on the PATH."""
    pytest.importorskip("obstore")
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("needs moto_server on the PATH")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    settings = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "REGION": "us-east-1"}
    for name, value in {**settings, "ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with subprocess.Popen([program, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                with suppress(OSError), urllib.request.urlopen(endpoint, timeout=1):
                    break
                time.sleep(0.1)
            yield endpoint
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_tar_in_s3(shard: Path, s3: str) -> None:
    stores = pytest.importorskip("obstore.store")
    make = urllib.request.Request(f"{s3}/photos", method="PUT")
    urllib.request.urlopen(make, timeout=10).close()
    stores.from_url("s3://photos").put(shard.name, shard.read_bytes())
    assert read_tar_index(open_blob("s3://photos/s.tar", QUICK)) == read_tar_index(open_blob(shard))
    with pytest.raises(BadData, match="s3://photos/none"):
        open_blob("s3://photos/none", QUICK).read(0, 5)
