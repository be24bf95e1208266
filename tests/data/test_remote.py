"""Shards behind a URL: a real S3 server (moto's) and a real HTTP server on loopback, through the loader."""

from __future__ import annotations

import functools
import http.server
import itertools
import subprocess
import sys
import threading
import time

import pytest
from test_staging import make, read

from mcf.data import reader
from mcf.data.shards import load_manifest, sight
from mcf.data.storage import storage_of
from mcf.errors import UserError
from mcf.exits import UNAVAILABLE

BUCKETS = itertools.count()


@pytest.fixture
def folder(shards):
    return shards(30, 17, 44, 25)


@pytest.fixture
def s3(folder, monkeypatch):
    """moto's server with the folder in bucket faces; its URL, and the server, to be ended."""
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1", "AWS_ENDPOINT_URL": f"http://{host}:{port}", "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
    bucket = f"faces-{next(BUCKETS)}"  # moto's buckets outlive its server
    files.mkdir(bucket)
    files.put(str(folder), f"{bucket}/packed", recursive=True)
    yield f"s3://{bucket}/packed", server
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def web(folder):
    """An HTTP server that knows ranges, as object stores and nginx do."""

    class Ranges(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            wanted = self.headers.get("Range")
            path = self.translate_path(self.path)
            try:
                content = open(path, "rb").read()  # noqa: SIM115, PTH123
            except OSError:
                self.send_error(404)
                return
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                part = content[int(first) : int(last) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            else:
                part = content
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_bucket_gives_what_the_folder_gives(folder, s3):
    url, _ = s3
    assert load_manifest(url).fingerprint == load_manifest(folder).fingerprint
    assert sight(url) == f"fingerprint {load_manifest(folder).fingerprint} of {url}"
    assert read(make(url), 240) == read(make(folder), 240)


def test_a_bucket_can_be_staged(folder, s3, tmp_path):
    url, server = s3
    plain = read(make(folder), 320)
    loader = make(url, stage=str(tmp_path / "stage"))
    batches, found = iter(loader), []
    for _ in range(20):
        found += zip(*(lambda b: (b.positions.tolist(), b.keys))(next(batches)))
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "stage").rglob("*.tar"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop()  # all is on this side
    for _ in range(60):
        found += zip(*(lambda b: (b.positions.tolist(), b.keys))(next(batches)))
    loader.close()
    assert found == [item[:2] for item in plain]
    assert loader.take_bad() == []


def test_a_bucket_that_stays_away_is_one_line(s3, monkeypatch):
    monkeypatch.setattr(reader, "PATIENCE", 1.0)
    url, server = s3
    loader = make(url, max_bad=0.05)
    batches = iter(loader)
    next(batches)
    server.stop()
    with pytest.raises(UserError, match=rf"{url}: shard-0000\d\.tar cannot be read .* launch again") as caught:
        for _ in range(200):
            next(batches)
    assert caught.value.status == UNAVAILABLE and loader.take_bad() == []
    loader.close()


def test_an_object_that_is_missing_costs_its_samples(folder, s3):
    import s3fs

    url, _ = s3
    s3fs.S3FileSystem().rm(f"{url}/shard-00001.tar")
    loader = make(url, max_bad=0.9)
    found = read(loader, 240)
    bad = loader.take_bad()
    assert {b.shard for b in bad} == {"shard-00001.tar"}
    wanted = {p: (k, h) for p, k, h in read(make(folder), 240)}
    assert all((key, picture) == wanted[position] for position, key, picture in found if not key.startswith("s1"))


def test_http_gives_what_the_folder_gives(folder, web):
    pytest.importorskip("aiohttp")
    assert read(make(web), 160) == read(make(folder), 160)


def test_addresses_that_are_none_are_one_line(folder, s3, web):
    url, _ = s3
    for address, words in [
        (f"{url}/nowhere", "no manifest.json there"),
        ("s3://nowhere/x", "no manifest.json there"),
        (f"{web}/nowhere", "no manifest.json there"),
        ("nothing://x/y", "nothing://x/y: "),
        ("http://127.0.0.1:9/x", "cannot be read"),
    ]:
        with pytest.raises(UserError) as caught:
            load_manifest(address)
        assert words in str(caught.value), str(caught.value)
    import s3fs

    s3_files = s3fs.S3FileSystem()
    s3_files.pipe(f"{url}/manifest.json", b"{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged manifest"):
        load_manifest(url)


def test_a_read_beyond_the_end_is_told(s3):
    url, _ = s3
    with pytest.raises(OSError):
        storage_of(url).read("shard-00000.tar", 10**9, 10)
    size = len(storage_of(url).whole("shard-00000.tar"))
    with pytest.raises(OSError, match="ends 5 bytes early"):
        storage_of(url).read("shard-00000.tar", size - 5, 10)


def test_local_folders_need_no_fsspec(folder):
    code = (
        "import sys; from mcf.data.shards import load_manifest; "
        f"load_manifest({str(folder)!r}).storage.whole('manifest.json'); print('fsspec' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "False\n"
